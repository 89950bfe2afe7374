"""What most people write by hand: FastAPI with `UploadFile`, one session, no batching.

A plain `def` endpoint, as FastAPI's documentation asks for blocking work: it runs in a thread pool.
"""

from typing import Any

import uvicorn
from fastapi import FastAPI, UploadFile

from tests.benchmarks.servers.work import PORT, Work

app = FastAPI()
work = Work()


@app.get("/readyz")
def readyz() -> None:
    """Answer when serving."""


@app.post("/classify")
def classify(file: UploadFile) -> dict[str, Any]:
    """Classify one image."""
    return work.answer(work.infer([work.prepare(file.file.read())])[0])


if __name__ == "__main__":
    uvicorn.run(app, port=PORT, log_level="warning")
