"""Images through a model file: the server's own pipeline without a server."""

import asyncio
import time
from pathlib import Path

from app.admission import Admission
from app.classifier import Classifier
from app.client.errors import ImageError, ServerError
from app.client.results import Prediction
from app.engine import OnnxEngine
from app.errors import Problem, StartupError
from app.latency import LatencyTable, warm_up
from app.metrics import Metrics
from app.predictions import best
from app.settings import Settings

# A batch run waits for nobody: an image may take what it takes.
PATIENCE_S = 3600.0
# Nor does a file come from strangers; a decoder has room for one of this size.
LARGEST_BYTES = 256 * 2**20


class LocalClassifier:
    """Opens a model file; use it as an async context manager."""

    def __init__(self, path: Path, top_k: int) -> None:
        self._path = path
        self._top_k = top_k
        self._settings = Settings(
            queue_budget_ms=int(PATIENCE_S * 1000), max_upload_bytes=LARGEST_BYTES
        )
        # While one batch runs, the next one is decoded.
        self.concurrency = 2 * self._settings.max_batch

    async def __aenter__(self) -> "LocalClassifier":
        """Open the model, check its golden sample, start the threads.

        Raises:
            ServerError: the file is no model that can be run, or nothing can be decoded here.
        """
        settings = self._settings
        try:
            engine = await asyncio.to_thread(
                OnnxEngine, self._path, settings.device, settings.threads
            )
        except StartupError as error:
            raise ServerError(str(error).removeprefix("MIXER_MODEL=")) from error
        latency = LatencyTable(settings.max_batch, settings.decode_threads)
        try:
            await asyncio.to_thread(warm_up, engine, settings.max_batch, latency)
            admission = Admission(settings, latency)
            self._classifier = Classifier(engine, settings, latency, admission, Metrics())
        except StartupError as error:
            reason = str(error).partition(": ")[2].removesuffix("; choose fewer")
            raise ServerError(
                f"{self._path}: {reason}; ask a mixer-serve with a smaller MIXER_MAX_BATCH instead"
            ) from error
        except Problem as problem:
            raise ServerError(problem.detail) from problem
        self.model = f"{engine.card.name}@{engine.card.version}"
        self.top_k = min(self._top_k, len(engine.card.labels))
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the threads."""
        await self._classifier.close()

    async def classify(self, data: bytes) -> list[Prediction]:
        """Return an image's best labels.

        Raises:
            ImageError: the image cannot be decoded.
        """
        if len(data) > LARGEST_BYTES:
            raise ImageError(f"The file is larger than {LARGEST_BYTES} bytes.")
        [result] = await self._classifier.classify([data], time.monotonic() + PATIENCE_S)
        if isinstance(result, Problem):
            raise ImageError(result.detail)
        found = best(result.logits, self._classifier.card.labels, self.top_k)
        return [Prediction(**one) for one in found]
