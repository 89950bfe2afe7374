"""Mixer Serve with an engine that stands for a fast GPU: fixed time per batch, the GIL released.

What it then serves is what HTTP, decoding and batching can feed.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app import serve
from app.model_card import ModelCard, Preprocessing
from app.shares import Share

# A Mixer-B/16 batch of 16 on a current GPU, in half precision.
BATCH_S = 0.004


class FixedLatencyEngine:
    """Answers zeros after `BATCH_S`."""

    provider = "FixedLatency"
    threads = 1

    def __init__(self, path: Path, *_: object, **__: object) -> None:
        self.card = ModelCard(
            name=path.stem,
            version="0" * 12,
            variant="none",
            parameters=1,
            preprocessing=Preprocessing.model_validate_json(os.environ["BENCH_PREPROCESSING"]),
            labels=tuple(f"class {index}" for index in range(1000)),
            source="none",
            checksum="0" * 64,
        )

    def cut(self, images: int) -> list[Share]:
        """Return one share."""
        return [Share(images)]

    def stack(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return patches uint8 [share, tokens, P·P·3] of single pictures."""
        return np.stack(pictures)

    def infer(self, patches: NDArray[np.uint8], share: Share) -> NDArray[np.float32]:
        """Return what `run` does."""
        del share  # all there is
        return self.run(patches)

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 [batch, 1000] of patches uint8 [batch, tokens, P·P·3]."""
        time.sleep(BATCH_S)
        return np.zeros((len(patches), 1000), np.float32)


if __name__ == "__main__":
    vars(serve)["OnnxEngine"] = FixedLatencyEngine  # the command then builds this one
    sys.exit(serve.main(sys.argv[1:]))
