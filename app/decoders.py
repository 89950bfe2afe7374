"""The decoders: processes of their own, so that the event loop shares its GIL with none of them.

A thread that decodes holds the GIL for an eighth of its time, and may lose its core with the GIL in
hand: under overload the event loop then waits for milliseconds, and on many cores everybody does.
"""

import io
import logging
import threading
import time
from contextlib import closing
from queue import SimpleQueue

from PIL import Image

from app.decoder import Task
from app.decoder_link import DecoderLink
from app.errors import (
    DecoderLost,
    NoDecoder,
    NotReady,
    Problem,
    StartupError,
)
from app.images import Picture
from app.model_card import Preprocessing
from app.nursery import STUCK_S
from app.settings import Settings

logger = logging.getLogger(__name__)

# Who finds no process so soon after another counts with it: all may ask in one bad moment.
BLIP_S = 1.0


def _sample() -> bytes:
    """Return the smallest picture there is, since `max_pixels` may be 1."""
    sample = io.BytesIO()
    Image.new("RGB", (1, 1)).save(sample, "JPEG")
    return sample.getvalue()


_SAMPLE = _sample()


def task_of(preprocessing: Preprocessing, settings: Settings) -> Task:
    """Return what all decoders of a service have to do."""
    return Task(
        preprocessing=preprocessing,
        max_pixels=settings.max_pixels,
        max_bytes=settings.max_upload_bytes,
    )


class Decoders:
    """As many decoders as threads may ask for one at once.

    Raises:
        NoDecoder: there cannot be so many processes.
    """

    def __init__(self, count: int, task: Task) -> None:
        """Start them; the first in a process takes half a second, all others milliseconds."""
        self.failures = 0  # in a row: uploads and probes for which there was no process
        self._failed, self._books = -BLIP_S, threading.Lock()  # when, by time.monotonic()
        self._free: SimpleQueue[DecoderLink] = SimpleQueue()
        self._all: list[DecoderLink] = []
        try:
            for _ in range(count):
                self._all.append(DecoderLink(task))
                self._free.put(self._all[-1])
        except NoDecoder:
            self.close()
            raise

    def decode(self, upload: bytes) -> Picture:
        """Decode in a process that has nothing else to do.

        Raises:
            EmptyBody, UnsupportedFormat, TooManyPixels, CorruptImage: as `images.decode`; the last
                also for what takes longer than decoder.MAX_CPU_S.
            DecoderLost: the process ended, and the next upload gets another one.
            NotReady: there is none; the upload was never read.
            RuntimeError: a bug in the decoder; the process goes on.
        """
        for _ in self._all:  # one that could not be replaced leaves the work to others
            decoder = self._free.get()
            start = time.monotonic()
            try:
                picture = decoder.decode(upload)
            except NoDecoder as error:
                logger.error("%s", error.detail)  # noqa: TRY400 - the place in our code says nothing
                continue
            except DecoderLost:
                # No answer is no sign of life. A crash may be the image's matter, a hang is not.
                if time.monotonic() - start >= STUCK_S:
                    self._fail()
                raise
            except Problem:
                self._recover()  # the image's matter: there was a process
                raise
            finally:
                self._free.put(decoder)
            self._recover()
            return picture
        self._fail()
        raise NotReady("There is no process that could decode the image; ask another replica.")

    def probe(self) -> None:
        """See whether processes can be had again, while no upload comes that would tell."""
        decoder = self._free.get()
        try:
            decoder.decode(_SAMPLE)
        except Exception:  # whatever it is, the thread that looks must go on
            logger.exception("there is still no process that decodes")
            self._fail()
        else:
            self._recover()
        finally:
            self._free.put(decoder)

    def _recover(self) -> None:
        if self.failures:
            with self._books:
                self.failures, self._failed = 0, -BLIP_S

    def _fail(self) -> None:
        with self._books:
            now = time.monotonic()
            if now - self._failed >= BLIP_S:
                self._failed = now
                self.failures += 1

    def close(self) -> None:
        """End the processes; nobody may be waiting for one."""
        for decoder in self._all:
            decoder.close()


def check_decoders(count: int, task: Task) -> None:
    """Start so many processes, and have a picture decoded as uploads are.

    Raises:
        StartupError: there cannot be so many, or they cannot do it here.
    """
    try:
        with closing(Decoders(count, task)) as decoders:
            decoders.decode(_SAMPLE)
    except (Problem, RuntimeError) as error:
        reason = error.detail if isinstance(error, Problem) else str(error)
        raise StartupError(f"images cannot be decoded here: {reason}") from error
