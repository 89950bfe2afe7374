"""mosec: a preprocessing stage of one process per core, an inference stage with dynamic batching.

As its computer-vision examples do: bytes in, stages in processes of their own.
"""

from typing import Any

import numpy as np
from mosec import Server, Worker
from numpy.typing import NDArray

from app.cpus import available_cpus
from tests.benchmarks.servers.work import MAX_BATCH, Preparation, Work


class Preprocess(Worker):
    """Decodes images."""

    def __init__(self) -> None:
        super().__init__()
        self._preparation = Preparation()

    def deserialize(self, data: bytes) -> bytes:
        """Take the raw body."""
        return data

    def forward(self, data: bytes) -> NDArray[np.uint8]:
        """Return patches uint8 [tokens, P·P·3]."""
        return self._preparation.prepare(data)


class Inference(Worker):
    """Runs the model on batches."""

    def __init__(self) -> None:
        super().__init__()
        self._work = Work()

    def forward(self, data: list[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """Return one answer per image."""
        return [self._work.answer(logits) for logits in self._work.infer(data)]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Preprocess, num=available_cpus())
    server.append_worker(Inference, num=1, max_batch_size=MAX_BATCH)
    server.run()
