"""One batch on its way through the engine: its entries, its shares, its logits."""

import itertools
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.engine import Engine
from app.entry import Entry
from app.shares import Share


class Batch:
    """Entries that go through the engine together, in shares that threads infer side by side."""

    def __init__(self, entries: Sequence[Entry], shares: Sequence[Share]) -> None:
        self.entries = entries
        self.shares = shares
        self._error: Exception | None = None  # of any share
        self.forming_s = 0.0
        self.inferring = 0.0  # seconds of time.perf_counter()
        ends = list(itertools.accumulate(share.images for share in shares))
        self._slices = [slice(*ends) for ends in itertools.pairwise([0, *ends])]
        self._logits: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(shares)
        self._done = itertools.count(1)

    def infer(self, number: int, engine: Engine) -> bool:
        """Infer one share; return whether it was the last one to be done."""
        try:
            self._logits[number] = self._infer(number, engine)
        except Exception as error:
            self._error = error
        return next(self._done) == len(self.shares)

    def logits(self) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes], once all shares are done.

        Raises:
            Exception: whatever the engine raised.
        """
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # whose traceback knows this frame: pictures would stay for the collector
        return np.concatenate(self._logits)

    def _infer(self, number: int, engine: Engine) -> NDArray[np.float32]:
        forming = time.perf_counter()
        entries = self.entries[self._slices[number]]
        patches = engine.stack([entry.picture.patches for entry in entries])
        if number == 0:
            self.inferring = time.perf_counter()
            self.forming_s = self.inferring - forming
        return infer(engine, patches, self.shares[number])


def infer(engine: Engine, patches: NDArray[np.uint8], share: Share) -> NDArray[np.float32]:
    """Return logits float32 [share, classes], as many as there are images.

    Raises:
        Exception: whatever the engine raises, or the logits are of another number.
    """
    logits = engine.infer(patches, share)
    if len(logits) != len(patches):
        raise RuntimeError(f"the engine gave {len(logits)} logits for {len(patches)} images")
    return logits
