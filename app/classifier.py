"""The way of an image after its upload: decoded in a bounded pool of threads, batched, inferred."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.admission import Admission
from app.batcher import FAILURES_UNTIL_NOT_LIVE, FAILURES_UNTIL_NOT_READY, Batcher, Entry
from app.engine import Engine
from app.errors import DeadlineExceeded, Problem
from app.images import Picture, decode
from app.latency import LatencyTable
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class Classified:
    """One image's picture and its logits float32 [classes]."""

    picture: Picture
    logits: NDArray[np.float32]


class Classifier:
    """Takes uploads from the event loop through decode threads and batcher, and back."""

    def __init__(
        self, engine: Engine, settings: Settings, latency: LatencyTable, admission: Admission
    ) -> None:
        self.card = engine.card
        self.provider = engine.provider
        self._max_pixels = settings.max_pixels
        self._latency = latency
        self._admission = admission
        self._loop = asyncio.get_running_loop()
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "mixer-decode")
        self._batcher = Batcher(engine, settings.max_batch, latency)

    @property
    def is_ready(self) -> bool:
        """Return whether the engine works: a balancer may send requests."""
        return self._batcher.failures < FAILURES_UNTIL_NOT_READY

    @property
    def is_live(self) -> bool:
        """Return whether the engine may still recover; if not, replace the process."""
        return self._batcher.failures < FAILURES_UNTIL_NOT_LIVE

    async def classify(
        self, uploads: Sequence[bytes], deadline: float
    ) -> list[Classified | Problem]:
        """Classify each upload, in order; one that fails leaves its neighbours alone.

        `deadline` is in seconds of `time.monotonic()`; what is not done by then is a problem.

        Raises:
            TooManyImages, QueueFull, DeadlineExceeded: refused at the door, see Admission.queue.
        """
        with self._admission.queue(len(uploads), deadline):
            entries = [Entry(upload, self._loop.create_future()) for upload in uploads]
            for entry in entries:
                self._decoders.submit(self._decode, entry)
            try:
                await asyncio.wait(
                    [entry.future for entry in entries], timeout=deadline - time.monotonic()
                )
            finally:
                # Time is up, or the client has gone: what is left never reaches the engine.
                for entry in entries:
                    entry.release()
        return [_result(entry) for entry in entries]

    async def close(self) -> None:
        """Answer what was admitted, then end the threads."""
        await asyncio.to_thread(self._decoders.shutdown)
        await asyncio.to_thread(self._batcher.close)

    def _decode(self, entry: Entry) -> None:
        """Decode and queue one upload; runs in a decode thread."""
        upload = entry.upload
        if not entry.is_alive():
            return
        start = time.perf_counter()
        try:
            entry.picture = decode(upload, self.card.preprocessing, self._max_pixels)
        except Problem as problem:
            # Its traceback would hold the upload, in a cycle, until the garbage collector comes.
            problem.__traceback__ = problem.__cause__ = problem.__context__ = None
            self._loop.call_soon_threadsafe(entry.fail, problem)
        except Exception as error:
            # Every error has a request that waits for it: this one is a bug, and a 500.
            self._loop.call_soon_threadsafe(entry.fail, error)
        else:
            self._batcher.put(entry)
        self._latency.observe_decode(time.perf_counter() - start)


def _result(entry: Entry) -> Classified | Problem:
    if entry.future.cancelled():
        return DeadlineExceeded("The request's time ran out before its image was classified.")
    result = entry.future.result()
    if isinstance(result, Problem):
        return result
    if isinstance(result, Exception):
        raise result
    return Classified(entry.picture, result)
