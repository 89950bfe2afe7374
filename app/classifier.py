"""The way of one image after its upload: admitted, decoded in a thread, batched, inferred."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.batcher import Batcher, Entry
from app.engine import Engine
from app.errors import DeadlineExceeded, Problem, QueueFull, TooManyImages
from app.images import Picture, decode
from app.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Classified:
    """One image's picture and its logits float32 [classes]."""

    picture: Picture
    logits: NDArray[np.float32]


class Classifier:
    """Decodes uploads in a bounded pool and hands them to the batcher; lives on the event loop."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.card = engine.card
        self.provider = engine.provider
        self._settings = settings
        self._pending = 0  # images admitted and not yet answered
        self._loop = asyncio.get_running_loop()
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "mixer-decode")
        self._batcher = Batcher(engine, settings.max_batch)

    async def classify(self, uploads: Sequence[bytes]) -> list[Classified | Problem]:
        """Classify each upload, in order; one that fails leaves its neighbours alone.

        Raises:
            TooManyImages: more uploads than the queue can ever hold.
            QueueFull: no room for all of them now.
        """
        with self._admitted(len(uploads)):
            entries = [Entry(self._loop.create_future()) for _ in uploads]
            for entry, data in zip(entries, uploads, strict=True):
                self._decoders.submit(self._decode, entry, data)
            # When the client hangs up, gather cancels the futures and the entries are dropped.
            answers = await asyncio.gather(*(e.future for e in entries), return_exceptions=True)
        results: list[Classified | Problem] = []
        for entry, answer in zip(entries, answers, strict=True):
            if isinstance(answer, Problem):
                results.append(answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                results.append(Classified(entry.picture, answer))
        return results

    async def close(self) -> None:
        """Answer what was admitted, then end the threads."""
        await asyncio.to_thread(self._decoders.shutdown)
        await asyncio.to_thread(self._batcher.close)

    @contextmanager
    def _admitted(self, images: int) -> Iterator[None]:
        """Hold places in the queue for `images`, or refuse at the door."""
        limit = self._settings.queue_size
        if images > limit:
            raise TooManyImages(f"The request holds {images} images; at most {limit} are taken.")
        if self._pending + images > limit:
            raise QueueFull("The queue is full.", retry_after_s=1)
        self._pending += images
        try:
            yield
        finally:
            self._pending -= images

    def _decode(self, entry: Entry, data: bytes) -> None:
        """Decode and queue one upload; runs in a decode thread."""
        if not entry.is_alive():
            return
        try:
            if entry.is_late():
                raise DeadlineExceeded("The request's time ran out before it was decoded.")
            entry.picture = decode(data, self.card.preprocessing, self._settings.max_pixels)
            self._batcher.put(entry)
        except Exception as error:
            # Every error has a request that waits for it: a Problem becomes its answer, anything
            # else is a bug that the request answers with 500.
            self._loop.call_soon_threadsafe(entry.fail, error)
