"""The decoders: processes of their own, so that the event loop shares its GIL with none of them.

A thread that decodes holds the GIL for an eighth of its time, and may lose its core with the GIL in
hand: under overload the event loop then waits for milliseconds, and on many cores everybody does.
"""

import io
import logging
import os
import signal
import socket
import threading
import time
from contextlib import closing, suppress
from queue import SimpleQueue

import numpy as np
from PIL import Image

from app.decoder import ANSWER, BUG, MAX_CPU_S, PROBLEM, SIZE, Refusal, Task, receive, send
from app.errors import (
    CorruptImage,
    DecoderLost,
    EmptyBody,
    NotReady,
    Problem,
    StartupError,
    TooManyPixels,
    UnsupportedFormat,
)
from app.images import FORMATS, Picture
from app.nursery import nursery

logger = logging.getLogger(__name__)

# Who finds no process so soon after another counts with it: all may ask in one bad moment.
BLIP_S = 1.0
# What `decode` may raise; a decoder names them.
_PROBLEMS: dict[str, type[Problem]] = {
    kind.__name__: kind for kind in (CorruptImage, EmptyBody, TooManyPixels, UnsupportedFormat)
}


def _sample() -> bytes:
    """Return the smallest picture there is, since `max_pixels` may be 1."""
    sample = io.BytesIO()
    Image.new("RGB", (1, 1)).save(sample, "JPEG")
    return sample.getvalue()


_SAMPLE = _sample()


class NoDecoder(DecoderLost):
    """No process that decodes can be had; an upload is still to be decoded."""


class Decoders:
    """As many decoders as threads may ask for one at once.

    Raises:
        NoDecoder: there cannot be so many processes.
    """

    def __init__(self, count: int, task: Task) -> None:
        """Start them; the first in a process takes half a second, all others milliseconds."""
        self.failures = 0  # in a row: uploads and probes for which there was no process
        self._failed, self._books = -BLIP_S, threading.Lock()  # when, by time.monotonic()
        self._free: SimpleQueue[Decoder] = SimpleQueue()
        self._all: list[Decoder] = []
        try:
            for _ in range(count):
                self._all.append(Decoder(task))
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
            try:
                picture = decoder.decode(upload)
            except NoDecoder as error:
                logger.error("%s", error.detail)  # noqa: TRY400 - the place in our code says nothing
                continue
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
        except (Problem, RuntimeError):
            logger.exception("there is still no process that decodes")
            self._fail()
        else:
            self._recover()
        finally:
            self._free.put(decoder)

    def _recover(self) -> None:
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


class Decoder:
    """One process and the socket to it, for one thread at a time.

    Raises:
        NoDecoder: there cannot be a process.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        preprocessing = task.preprocessing
        patch_bytes = preprocessing.tokens * preprocessing.patch_bytes
        self._usual_bytes = SIZE.size + ANSWER.size + patch_bytes
        self._link = socket.socket()  # to nobody
        self.connect()

    def decode(self, upload: bytes) -> Picture:
        """Send an upload, wait for its picture.

        Raises:
            NoDecoder: the process has ended, and no other can be had.
            EmptyBody, UnsupportedFormat, TooManyPixels, CorruptImage, DecoderLost, RuntimeError: as
                Decoders.decode.
        """
        for _ in range(2):
            try:
                answer, took_s = self._ask(upload)
                break
            except OSError as error:  # it had not even read the upload, which is not to blame
                logger.error("decoder %d has ended (%s); another comes", self.pid, error)  # noqa: TRY400 - the place in our code says nothing
                self.connect()
        else:
            raise NoDecoder("No process could take the upload: they end as they begin.")
        if answer is None:
            pid = self.pid
            with suppress(NoDecoder):  # the next upload's matter
                self.connect()
            if took_s >= MAX_CPU_S:  # its own limit; a crash seldom comes so late
                logger.warning("decoder %d was stopped after %.1f s over one image", pid, took_s)
                raise CorruptImage("The image takes too long to decode.")
            logger.error("decoder %d has ended over an image; another one takes its place", pid)
            raise DecoderLost("The process that decoded the image has ended.")
        kind, file_format, width, height = ANSWER.unpack_from(answer, SIZE.size)
        body = memoryview(answer)[SIZE.size + ANSWER.size :]
        if kind == PROBLEM:
            refusal = Refusal.model_validate_json(bytes(body))
            raise _PROBLEMS[refusal.name](refusal.detail)
        if kind == BUG:
            raise RuntimeError(f"in decoder {self.pid}: {bytes(body).decode()}")
        preprocessing = self._task.preprocessing
        patches = np.frombuffer(body, np.uint8).reshape(preprocessing.tokens, -1)
        return Picture(FORMATS[file_format], width, height, patches)

    def close(self) -> None:
        """Close the socket, which ends the process."""
        self._link.close()

    def _ask(self, upload: bytes) -> tuple[bytes | None, float]:
        """Return the answer, its size before it, or None if the decoder ended; and the seconds.

        As a rule with two calls: after each the thread has to wait for the GIL.

        Raises:
            OSError: the decoder ended before it had read all of the upload.
        """
        start = time.monotonic()
        answer = b""
        missing = self._usual_bytes
        try:
            send(self._link, upload)
            while missing > 0:
                piece = self._link.recv(missing)  # a reset, if what was sent is still unread
                if not piece:
                    return None, time.monotonic() - start
                answer += piece
                if len(answer) >= SIZE.size:
                    missing = SIZE.size + SIZE.unpack_from(answer)[0] - len(answer)
        except BlockingIOError:  # it is stopped, or waits for a disk that is gone
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            return None, 0.0
        except MemoryError:
            self.close()  # what is still to come would be taken for the next upload's answer
            raise
        return answer, time.monotonic() - start

    def connect(self) -> None:
        """Get another process.

        Raises:
            NoDecoder: none can be had.
        """
        self.close()
        asked = time.monotonic()
        try:
            self._link = nursery().new_link()
            try:
                hello = receive(self._link)
            except BlockingIOError:
                nursery().replace(asked)  # for the next one to ask
                self.close()
                raise NoDecoder("No decoder has come: what forks them hangs.") from None
            if hello is None:
                self.close()
                raise NoDecoder("A process that decodes has ended as it began.")
            self.pid = int(hello)
            send(self._link, self._task.model_dump_json().encode())
        except OSError as error:
            self.close()
            raise NoDecoder(f"No process that decodes can be started: {error}") from None


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
