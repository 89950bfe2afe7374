"""Dynamic batching: dispatch at once when the engine is idle, gather only while it is busy.

One thread owns the queue and the engine. Decoders' threads put pictures in; the event loop gets the
logits back, once per batch. So an image crosses threads twice (loop to decoder, engine to loop)
and the engine never waits for the event loop. A fixed gathering window would cost every quiet
request its whole length, and a busy engine fills its batches by itself.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from app.cpus import give_way
from app.engine import Engine
from app.errors import DeadlineExceeded, InferenceFailed, Problem
from app.images import Picture
from app.latency import LatencyTable
from app.metrics import Metrics
from app.trace import Stages

logger = logging.getLogger(__name__)

# A batch that fails may have been unlucky; three in a row mean a broken engine (a poisoned CUDA
# context fails every call), and three probes later it has not recovered by itself.
FAILURES_UNTIL_NOT_READY = 3
FAILURES_UNTIL_NOT_LIVE = 6
PROBE_PERIOD_S = 1.0
# A request that comes while spare work runs waits for it: no longer than a person could notice.
SPARE_BATCH_S = 0.02


@dataclass(slots=True, eq=False)
class Entry:
    """One image on its way through the queue.

    An error is a result, too: one that nobody came to read would else be reported as a fault.
    """

    # Released with the request: what waits for a thread must not outlive its count. Not for logs.
    upload: bytes = field(repr=False)
    future: asyncio.Future[NDArray[np.float32] | Exception]  # logits [classes]
    picture: Picture = field(init=False)  # set when it is decoded
    request_id: str = ""
    is_spare: bool = False  # runs only while nothing else waits
    # Seconds of time.perf_counter(), each set where it happens.
    received: float = field(default_factory=time.perf_counter)
    decoding: float = 0.0
    decoded: float = 0.0
    inferring: float = 0.0
    inferred: float = 0.0

    def is_alive(self) -> bool:
        """Return whether anybody still waits: the client is there and its time not run out."""
        return not self.future.cancelled()

    def outcome(self) -> str:
        """Return what became of it, once it is settled: `ok`, or the kind of its problem."""
        if self.future.cancelled():
            return DeadlineExceeded("").kind
        result = self.future.result()
        if isinstance(result, Exception):
            return result.kind if isinstance(result, Problem) else "bug"
        return "ok"

    def stages(self) -> Stages | None:
        """Return the times of an entry that has been through the engine."""
        if not self.inferred:
            return None
        return Stages(self.received, self.decoding, self.decoded, self.inferring, self.inferred)

    def fail(self, error: Exception) -> None:
        """Answer with `error`; on the event loop only."""
        if not self.future.done():
            self.future.set_result(error)

    def release(self) -> None:
        """Stop waiting: whoever still has the entry in hand drops it."""
        self.upload = b""
        self.future.cancel()


class Batcher:
    """Owns the engine and its queue; `put` from any thread, await `Entry.future` on the loop."""

    def __init__(
        self, engine: Engine, max_batch: int, latency: LatencyTable, metrics: Metrics
    ) -> None:
        self.failures = 0  # of the engine, in a row
        self._engine = engine
        self._max_batch = max_batch
        self._latency = latency
        self._metrics = metrics
        self._spare: deque[Entry] = deque()
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
        give_way()
        while (batch := self._gather()) is not None:
            if not batch:
                continue
            logits = None
            try:
                logits = self._run(batch)
            except Exception:
                # Whatever it was, only this batch fails: the next may well pass.
                ids = ", ".join(entry.request_id for entry in batch)
                logger.exception("a batch of %d failed, of the requests %s", len(batch), ids)
                self.failures += 1
            self._loop.call_soon_threadsafe(_settle, batch, logits)

    def _run(self, batch: list[Entry]) -> NDArray[np.float32]:
        """Return logits [batch, classes], whatever the engine raises passed on."""
        forming = time.perf_counter()
        patches = np.stack([entry.picture.patches for entry in batch])
        inferring = time.perf_counter()
        logits = self._infer(patches)
        inferred = time.perf_counter()
        self._metrics.finish_batch(len(batch), inferring - forming, inferred - inferring)
        for entry in batch:
            entry.inferring, entry.inferred = inferring, inferred
        return logits

    def _gather(self) -> list[Entry] | None:
        """Wait for one entry, take along what has come meanwhile; None when closed."""
        batch: list[Entry] = []
        try:
            entry = self._queue.get_nowait() if self._spare else self._wait()
            while entry is not None:
                if entry.is_alive():
                    (self._spare if entry.is_spare else batch).append(entry)
                if len(batch) == self._max_batch:
                    return batch
                entry = self._queue.get_nowait()
        except queue.Empty:
            return batch or self._spare_batch()
        if batch:
            self._queue.put(None)  # closed: run this last batch, then meet the mark again
            return batch
        return None

    def _spare_batch(self) -> list[Entry]:
        """Return spare work for one short inference, nothing else being there to do."""
        size = self._latency.images_within(SPARE_BATCH_S)
        entries = [self._spare.popleft() for _ in range(min(size, len(self._spare)))]
        return [entry for entry in entries if entry.is_alive()]

    def _wait(self) -> Entry | None:
        """Wait for an entry; meanwhile probe an engine that has failed too often to get any."""
        while self.failures >= FAILURES_UNTIL_NOT_READY:
            try:
                return self._queue.get(timeout=PROBE_PERIOD_S)
            except queue.Empty:
                preprocessing = self._engine.card.preprocessing
                shape = (1, preprocessing.tokens, preprocessing.patch_bytes)
                try:
                    self._infer(np.zeros(shape, np.uint8))
                except Exception:
                    logger.exception("the engine failed on a probe")
                    self.failures += 1
        return self._queue.get()

    def _infer(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits [batch, classes], and count how often in a row they were useless."""
        start = time.perf_counter()
        logits = self._engine.run(patches)
        if len(logits) != len(patches):
            raise RuntimeError(f"the engine gave {len(logits)} logits for {len(patches)} images")
        self._latency.observe_batch(len(patches), time.perf_counter() - start)
        self.failures = 0 if np.isfinite(logits).any() else self.failures + 1
        return logits


def _settle(batch: list[Entry], logits: NDArray[np.float32] | None) -> None:
    """Give each entry its own row of the logits, on the event loop."""
    if logits is None:
        for entry in batch:
            entry.fail(InferenceFailed("The engine failed on this batch; the next may pass."))
        return
    finite = np.logical_and.reduce(np.isfinite(logits), axis=1).tolist()
    for entry, row, is_finite in zip(batch, logits, finite, strict=True):
        if not is_finite:
            entry.fail(InferenceFailed("The model's logits are not finite."))
        elif not entry.future.done():
            entry.future.set_result(row)
