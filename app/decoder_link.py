"""One decoder from the service's side: its process, the socket to it, and what comes back.

A process that ends over an image is replaced here, and the image's request told so.
"""

import logging
import os
import signal
import socket
import time
from contextlib import suppress

import numpy as np

from app.decoder import ANSWER, BUG, MAX_CPU_S, PROBLEM, SIZE, Found, Task, receive, send
from app.errors import (
    CorruptImage,
    DecoderLost,
    EmptyBody,
    NoDecoder,
    Problem,
    TooManyPixels,
    UnsupportedFormat,
)
from app.images import FORMATS, Picture
from app.nursery import nursery

logger = logging.getLogger(__name__)

# What `decode` may raise; a decoder names them.
_PROBLEMS: dict[str, type[Problem]] = {
    kind.__name__: kind for kind in (CorruptImage, EmptyBody, TooManyPixels, UnsupportedFormat)
}


class DecoderLink:
    """A process that decodes and the socket to it, for one thread at a time.

    Raises:
        NoDecoder: there cannot be a process.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        preprocessing = task.preprocessing
        patch_bytes = preprocessing.tokens * preprocessing.patch_bytes
        self._usual_bytes = SIZE.size + ANSWER.size + patch_bytes
        self._link = socket.socket()  # to nobody
        self._connect()

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
                self._connect()
        else:
            raise NoDecoder("No process could take the upload: they end as they begin.")
        if answer is None:
            pid = self.pid
            with suppress(NoDecoder):  # the next upload's matter
                self._connect()
            if took_s >= MAX_CPU_S:  # its own limit; a crash seldom comes so late
                logger.warning("decoder %d was stopped after %.1f s over one image", pid, took_s)
                raise CorruptImage("The image takes too long to decode.")
            logger.error("decoder %d has ended over an image; another one takes its place", pid)
            raise DecoderLost("The process that decoded the image has ended.")
        kind, file_format, width, height = ANSWER.unpack_from(answer, SIZE.size)
        body = memoryview(answer)[SIZE.size + ANSWER.size :]
        if kind == PROBLEM:
            found = Found.model_validate_json(bytes(body))
            raise _PROBLEMS[found.name](found.detail)
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

    def _connect(self) -> None:
        """Get another process.

        Raises:
            NoDecoder: none can be had.
        """
        self.close()
        try:
            self._link = nursery().new_link()
            asked = time.monotonic()  # of the one that has just come, if it is new
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
        except MemoryError:
            self.close()  # the process waits for its task: the next upload would be taken for that
            raise
