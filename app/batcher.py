"""Dynamic batching: dispatch at once when the engine is idle, gather only while it is busy.

One thread owns the queue and the engine. Decode threads put patches in; the event loop gets the
logits back, once per batch. So an image crosses threads twice (loop to decoder, engine to loop)
and the engine never waits for the event loop. A fixed gathering window would cost every quiet
request its whole length, and a busy engine fills its batches by itself.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from app.engine import Engine
from app.errors import DeadlineExceeded, InferenceFailed
from app.images import Picture

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Entry:
    """One image on its way through the queue."""

    future: asyncio.Future[NDArray[np.float32]]  # logits [classes]
    deadline: float = math.inf  # time.monotonic() seconds
    picture: Picture = field(init=False)  # set by the decode thread

    def is_alive(self) -> bool:
        """Return whether anybody still waits for the answer."""
        return not self.future.cancelled()

    def is_late(self) -> bool:
        """Return whether the request's time has run out."""
        return time.monotonic() > self.deadline

    def fail(self, error: Exception) -> None:
        """Answer with `error`; on the event loop only."""
        if not self.future.done():
            self.future.set_exception(error)


class Batcher:
    """Owns the engine and its queue; `put` from any thread, await `Entry.future` on the loop."""

    def __init__(self, engine: Engine, max_batch: int) -> None:
        self._engine = engine
        self._max_batch = max_batch
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._serve, name="mixer-engine", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Queue an entry whose picture is decoded for the next batch that has room."""
        self._queue.put(entry)

    def close(self) -> None:
        """Finish what is queued, then end the engine thread."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (batch := self._gather()) is not None:
            if batch:
                self._loop.call_soon_threadsafe(_settle, batch, self._infer(batch))

    def _gather(self) -> list[Entry] | None:
        """Wait for one entry, take along what has come meanwhile; None when closed."""
        batch: list[Entry] = []
        entry = self._queue.get()
        while entry is not None:
            if not entry.is_alive():
                pass  # the client has gone: nobody would read the answer
            elif entry.is_late():
                late = DeadlineExceeded("The request's time ran out while it was queued.")
                self._loop.call_soon_threadsafe(entry.fail, late)
            else:
                batch.append(entry)
            if len(batch) == self._max_batch:
                return batch
            try:
                entry = self._queue.get_nowait()
            except queue.Empty:
                return batch
        if batch:
            self._queue.put(None)  # closed: run this last batch, then meet the mark again
            return batch
        return None

    def _infer(self, batch: list[Entry]) -> NDArray[np.float32] | None:
        """Return the batch's logits [batch, classes], or None if the engine raised."""
        try:
            return self._engine.run(np.stack([entry.picture.patches for entry in batch]))
        except Exception:
            # Whatever it was, only this batch fails: the next may well pass.
            logger.exception("the engine failed on a batch of %d", len(batch))
            return None


def _settle(batch: list[Entry], logits: NDArray[np.float32] | None) -> None:
    """Give each entry its own row of the logits, on the event loop."""
    for row, entry in enumerate(batch):
        if logits is None:
            entry.fail(InferenceFailed("The engine failed on this batch; the next may pass."))
        elif not np.isfinite(logits[row]).all():
            entry.fail(InferenceFailed("The model's logits are not finite."))
        elif not entry.future.done():
            entry.future.set_result(logits[row])
