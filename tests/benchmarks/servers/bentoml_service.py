"""BentoML: a batchable API with adaptive batching, which its documentation recommends."""

from pathlib import Path
from typing import Annotated, Any

import bentoml
from bentoml.validators import ContentType

from tests.benchmarks.servers.work import MAX_BATCH, Work


@bentoml.service(workers="cpu_count", traffic={"timeout": 30})
class Classify:
    """One service, a worker for each core: one alone would be limited by its GIL."""

    def __init__(self) -> None:
        self._work = Work()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)
    def classify(
        self, images: list[Annotated[Path, ContentType("image/jpeg")]]
    ) -> list[dict[str, Any]]:
        """Return one answer per image."""
        patches = [self._work.prepare(image.read_bytes()) for image in images]
        return [self._work.answer(logits) for logits in self._work.infer(patches)]
