"""Dynamic batching: dispatch at once when the engine is idle, gather only while it is busy.

As many threads as the engine can use take shares of the batch at hand; the first that finds none
left forms the next batch, while the others may still be busy with the last one. Decoders' threads
put pictures in; the event loop gets the logits back, once per batch. So an image crosses threads
thrice (loop, decoder, engine, loop), and no core waits for the event loop or for another core. A
fixed gathering window would cost every quiet request its whole length, and a busy engine fills its
batches by itself. But on a CPU a batch gathers while as many images as it lacks wait for a decoder:
inference would take the time of the decoders, for a smaller batch.
"""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from app.batch import Batch, infer
from app.cpus import INFERENCE_NICE, give_way
from app.engine import Engine
from app.entry import Entry
from app.errors import InferenceFailed
from app.latency import LatencyTable
from app.metrics import Metrics
from app.pulse import FAILURES_UNTIL_NOT_READY, Pulse
from app.shares import Share

logger = logging.getLogger(__name__)

PROBE_PERIOD_S = 1.0
# A request that comes while spare work runs waits for it: no longer than a person could notice.
SPARE_BATCH_S = 0.02
# For more images from decoders that are all busy; how often it is seen whether they still are.
GATHER_S, GATHER_STEP_S = 0.05, 0.005


class Batcher:
    """Owns the engine and its queue; `put` from any thread, await `Entry.future` on the loop."""

    def __init__(
        self,
        engine: Engine,
        max_batch: int,
        latency: LatencyTable,
        metrics: Metrics,
        coming: Callable[[], int] = lambda: 0,
    ) -> None:
        """Start the engine's threads.

        `coming` counts the images that wait for the cores that inference needs, too.
        """
        self.pulse = Pulse()
        self._coming = coming
        self._engine = engine
        self._max_batch = max_batch
        self._latency = latency
        self._metrics = metrics
        self._spare: deque[Entry] = deque()
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._turn = threading.Lock()  # of the thread that takes a share, or forms a batch
        self._left: Iterator[tuple[Batch, int]] = iter(())  # shares that nobody has taken
        self._books = threading.Lock()  # of what is counted
        self._loop = asyncio.get_running_loop()
        self._threads = [
            threading.Thread(target=self._serve, name="mixer-engine", daemon=True)
            for _ in range(engine.threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, entry: Entry) -> None:
        """Queue an entry whose picture is decoded for the next batch that has room."""
        self._queue.put(entry)

    def close(self) -> None:
        """Finish what is queued, then end the engine's threads."""
        self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        give_way(INFERENCE_NICE)
        while (taken := self._take()) is not None:
            batch, number = taken
            with self.pulse.inferring():
                is_last = batch.infer(number, self._engine)
            if is_last:
                self._finish(batch)
            del taken, batch  # their pictures would stay until the next ones come

    def _take(self) -> tuple[Batch, int] | None:
        """Take a share of the batch at hand, or form the next batch; None when closed.

        One thread waits for images, and the others for that one.
        """
        with self._turn:
            while (taken := next(self._left, None)) is None:
                self._left = iter(())  # nor here
                entries = self._gather()
                if entries is None:
                    self._queue.put(None)  # for the next thread
                    return None
                # Some may have been given up while others were waited for, spare work in its lane.
                if alive := [entry for entry in entries if entry.is_alive()]:
                    self._deal(alive)
            return taken

    def _deal(self, entries: Sequence[Entry]) -> None:
        """Lay out the shares of a new batch."""
        try:
            batch = Batch(entries, self._engine.cut(len(entries)))
        except Exception:  # else the thread would end, and nobody hear of these images again
            logger.exception("a batch of %d could not be formed", len(entries))
            self._loop.call_soon_threadsafe(_settle, entries, None)
        else:
            self._left = zip(itertools.repeat(batch), range(len(batch.shares)))

    def _finish(self, batch: Batch) -> None:
        """Count a batch whose shares are all done, and hand its logits to the event loop."""
        took_s = time.perf_counter() - batch.inferring
        logits = None
        is_useless = False
        with self._books:
            try:
                logits = self._count(batch.logits(), took_s)
                if not batch.entries[0].is_spare:
                    self._metrics.finish_batch(len(logits), batch.forming_s, took_s)
                for entry in batch.entries:
                    entry.inferring, entry.inferred = batch.inferring, batch.inferring + took_s
                is_useless = not np.isfinite(logits).any()
            except Exception:
                # Whatever it was, only this batch fails: the next may well pass.
                logits = None
                ids = ", ".join(entry.request_id for entry in batch.entries)
                size = len(batch.entries)
                logger.exception("a batch of %d failed, of the requests %s", size, ids)
                self.pulse.fail()
        if is_useless:  # the images' doing or the engine's? One client's must not end the service
            self._probe()
        self._loop.call_soon_threadsafe(_settle, batch.entries, logits)

    def _count(self, logits: NDArray[np.float32], seconds: float) -> NDArray[np.float32]:
        """Take in the time of an inference, and whether it was of any use."""
        self._latency.observe_batch(len(logits), seconds)
        if np.isfinite(logits).any():
            self.pulse.recover()
        return logits

    def _gather(self) -> list[Entry] | None:
        """Wait for one entry, take along what has come meanwhile; None when closed."""
        batch: list[Entry] = []
        while self._spare and not self._spare[0].is_alive():
            self._spare.popleft()  # even if there is never a moment to spare
        try:
            entry = self._queue.get_nowait() if self._spare else self._wait()
            until = time.monotonic() + GATHER_S
            while entry is not None:
                if entry.is_alive():
                    (self._spare if entry.is_spare else batch).append(entry)
                if len(batch) == self._max_batch:
                    return batch
                entry = self._next(len(batch), until)
        except queue.Empty:
            return batch or self._spare_batch()
        if batch:
            self._queue.put(None)  # closed: run this last batch, then meet the mark again
            return batch
        return None

    def _next(self, size: int, until: float) -> Entry | None:
        """Return the next entry of a batch of `size` so far.

        Wait for it where enough are coming, until `time.monotonic()` is `until`.

        Raises:
            Empty: there is none.
        """
        while True:
            try:
                return self._queue.get_nowait()
            except queue.Empty:
                is_worth_it = size and size + self._coming() >= self._max_batch
                if not is_worth_it or time.monotonic() >= until:
                    raise
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=GATHER_STEP_S)

    def _spare_batch(self) -> list[Entry]:
        """Return spare work for one short inference, nothing else being there to do."""
        size = self._latency.images_within(SPARE_BATCH_S)
        return [self._spare.popleft() for _ in range(min(size, len(self._spare)))]

    def _wait(self) -> Entry | None:
        """Wait for an entry; meanwhile probe an engine that has failed too often to get any."""
        while True:
            try:  # not without end: a batch that another thread has may be the one failure too many
                return self._queue.get(timeout=PROBE_PERIOD_S)
            except queue.Empty:
                if self.pulse.failures >= FAILURES_UNTIL_NOT_READY:
                    self._probe()

    def _probe(self) -> None:
        """Infer nothing in particular, to see whether the engine works again."""
        preprocessing = self._engine.card.preprocessing
        patches = np.zeros((1, preprocessing.tokens, preprocessing.patch_bytes), np.uint8)
        start = time.perf_counter()
        try:
            with self.pulse.inferring():
                logits = infer(self._engine, patches, Share(1))
            if not np.isfinite(logits).any():
                raise RuntimeError("the logits are not finite")
            with self._books:
                self._count(logits, time.perf_counter() - start)
        except Exception:
            logger.exception("the engine failed on a probe")
            with self._books:
                self.pulse.fail()


def _settle(batch: Sequence[Entry], logits: NDArray[np.float32] | None) -> None:
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
            entry.future.set_result(row.copy())  # else whoever keeps it keeps its batch's
