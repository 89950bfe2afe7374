"""The way of an image after its upload: decoded in one of a few processes, batched, inferred."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from app.admission import Admission
from app.batcher import Batcher
from app.decode_queue import DecodeQueue
from app.decoders import Decoders, task_of
from app.engine import Engine
from app.entry import Entry
from app.errors import GONE, DeadlineExceeded, Problem
from app.images import Picture
from app.latency import LatencyTable
from app.metrics import Metrics
from app.pulse import FAILURES_UNTIL_NOT_LIVE, FAILURES_UNTIL_NOT_READY
from app.runtime import CPU
from app.settings import Settings
from app.trace import Trace, current

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Classified:
    """One image's picture and its logits float32 [classes]."""

    picture: Picture
    logits: NDArray[np.float32]


class Classifier:
    """Takes uploads from the event loop through decoders and batcher, and back."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        latency: LatencyTable,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        self.card = engine.card
        self.provider = engine.provider
        self._latency = latency
        self._admission = admission
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self.work_in_decoders = 0  # of `in_decoder`, those included that nobody waits for any more
        self._decoders = Decoders(
            settings.decode_threads, task_of(engine.card.preprocessing, settings)
        )
        self._queue = DecodeQueue(self._decoders, settings.decode_threads)
        # A GPU, or a core without a decoder, would stand still where these cores have other work.
        is_shared = engine.provider == CPU and settings.decode_threads >= engine.threads
        coming = self._queue.waiting if is_shared else lambda: 0
        self._batcher = Batcher(engine, settings.max_batch, latency, metrics, coming)

    @property
    def is_ready(self) -> bool:
        """Return whether engine and decoders work: a balancer may send requests."""
        return self._failures < FAILURES_UNTIL_NOT_READY

    @property
    def is_live(self) -> bool:
        """Return whether they may still recover; if not, replace the process."""
        return self._failures < FAILURES_UNTIL_NOT_LIVE

    @property
    def _failures(self) -> int:
        return max(self._batcher.pulse.failures, self._decoders.failures)

    async def classify(
        self, uploads: Sequence[bytes], deadline: float
    ) -> list[Classified | Problem]:
        """Classify each upload, in order; a bad one leaves its neighbours alone.

        `deadline` is in seconds of `time.monotonic()`; what is not done by then is a problem.

        Raises:
            TooManyImages, QueueFull, DeadlineExceeded: refused at the door, see Admission.queue.
            Exception: a bug, whatever came of the others.
        """
        trace = current()
        request_id = trace.request_id if trace else ""
        with self._admission.queue(len(uploads), deadline) as predicted_s:
            entries = [self.submit(upload, request_id) for upload in uploads]
            try:
                await asyncio.wait(
                    [entry.future for entry in entries], timeout=deadline - time.monotonic()
                )
            except asyncio.CancelledError:
                for _ in entries:
                    self._metrics.finish_image(None, GONE)
                raise
            finally:
                # Time is up, or the client has gone: what is left never reaches the engine.
                for entry in entries:
                    entry.release()
        return self.collect(entries, predicted_s, trace)

    def submit(self, upload: bytes, request_id: str) -> Entry:
        """Send one admitted upload on its way; `collect` it when its future is done."""
        entry = Entry(upload, self._loop.create_future(), request_id=request_id)
        self._queue.put(partial(self._decode, entry))
        return entry

    def collect(
        self, entries: Sequence[Entry], predicted_s: float, trace: Trace | None
    ) -> list[Classified | Problem]:
        """Return what became of entries that are done, and note their times."""
        self._report(entries, predicted_s, trace)
        return [_result(entry) for entry in entries]

    async def infer_spare(
        self, pictures: Sequence[Picture], deadline: float
    ) -> list[NDArray[np.float32]]:
        """Return the logits [classes] of each picture, inferred while nothing else waits.

        Raises:
            DeadlineExceeded: the engine had no spare time before `deadline`.
            InferenceFailed: the engine failed.
        """
        entries = [self._spare(picture) for picture in pictures]
        del pictures  # an error's traceback would hold them
        futures = [entry.future for entry in entries]
        try:
            await asyncio.wait(futures, timeout=deadline - time.monotonic())
        finally:
            for entry in entries:
                entry.release()
        if any(future.cancelled() for future in futures):
            raise DeadlineExceeded("The service had no time to spare for an explanation.")
        results = [future.result() for future in futures]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return [result for result in results if not isinstance(result, Exception)]

    def _spare(self, picture: Picture) -> Entry:
        entry = Entry(b"", self._loop.create_future(), is_spare=True)
        entry.picture = picture
        self._batcher.put(entry)
        return entry

    async def in_decoder(self, work: Callable[[], Answer], deadline: float) -> Answer:
        """Run `work`, as long as decoding an image, in one of the threads that wait for decoders.

        Raises:
            QueueFull, DeadlineExceeded: refused at the door, see Admission.queue.
        """
        done: Future[Answer] = Future()
        self._admission.admit(1, deadline)
        self.work_in_decoders += 1

        def run() -> None:
            try:
                if done.set_running_or_notify_cancel():  # else nobody waits any more
                    done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            finally:
                self._loop.call_soon_threadsafe(self._end_work)

        self._queue.put(run)
        return await asyncio.wrap_future(done)

    def _end_work(self) -> None:
        self.work_in_decoders -= 1
        self._admission.dismiss(1)

    async def close(self) -> None:
        """Answer what was admitted, then end the threads."""
        await asyncio.to_thread(self._queue.close)
        self._decoders.close()
        await asyncio.to_thread(self._batcher.close)

    def _decode(self, entry: Entry) -> None:
        """Have one upload decoded, and queue it; runs in a thread that waits for decoders."""
        upload = entry.upload
        if not entry.is_alive():
            return
        entry.decoding = time.perf_counter()
        try:
            entry.picture = self._decoders.decode(upload)
        except Problem as problem:
            # Its traceback would hold the upload, in a cycle, until the garbage collector comes.
            problem.__traceback__ = problem.__cause__ = problem.__context__ = None
            self._loop.call_soon_threadsafe(entry.fail, problem)
        except Exception as error:
            # Every error has a request that waits for it: this one is a bug, and a 500.
            self._loop.call_soon_threadsafe(entry.fail, error)
        else:
            entry.decoded = time.perf_counter()
            if entry.is_alive():  # else its picture may have been let go before it was there
                self._batcher.put(entry)
        self._latency.observe_decode(time.perf_counter() - entry.decoding)

    def _report(self, entries: Sequence[Entry], predicted_s: float, trace: Trace | None) -> None:
        """Give the metrics each image's outcome and times, the trace those of the slowest."""
        slowest = None
        for entry in entries:
            stages = entry.stages()
            self._metrics.finish_image(stages, entry.outcome())
            if stages is not None and (slowest is None or stages.inferred > slowest.inferred):
                slowest = stages
        if slowest is not None:
            self._metrics.compare(predicted_s, time.perf_counter() - slowest.received)
        if trace is not None:
            trace.images, trace.stages = len(entries), slowest


def _result(entry: Entry) -> Classified | Problem:
    if entry.future.cancelled():
        return DeadlineExceeded("The request's time ran out before its image was classified.")
    result = entry.future.result()
    if isinstance(result, Problem):
        return result
    if isinstance(result, Exception):
        raise result
    return Classified(entry.picture, result)
