"""The decoders: processes of their own, so that the event loop shares its GIL with none of them.

A thread that decodes holds the GIL for an eighth of its time, and may lose its core with the GIL in
hand: under overload the event loop then waits for milliseconds, and on many cores everybody does.
"""

import atexit
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from app.decoder import ANSWER, BUG, MAX_CPU_S, PROBLEM, SIZE, Refusal, Task, receive, send
from app.errors import CorruptImage, DecoderLost, Problem, TooManyPixels, UnsupportedFormat
from app.images import FORMATS, Picture

logger = logging.getLogger(__name__)

# What `decode` may raise; a decoder names them.
_PROBLEMS: dict[str, type[Problem]] = {
    kind.__name__: kind for kind in (CorruptImage, TooManyPixels, UnsupportedFormat)
}
# An upload of the usual size then goes with one call, without waiting for the decoder to read.
_BUFFER_BYTES = 1 << 20
_ENVIRONMENT = {
    # Pillow keeps as many blocks of up to this size for the next picture. Memory fresh from the
    # system is zeroed page by page, which is a tenth of decoding a photo.
    "PILLOW_BLOCKS_MAX": "2",
    "PILLOW_BLOCK_SIZE": "4m",
    # Likewise the C library (mallopt(3)). Pillow's blocks of large pictures must not come from its
    # heap: anything small that lies behind them would keep them for good.
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**20),
    # numpy's threads would be there for nothing, and a process with threads cannot be forked well.
    "OPENBLAS_NUM_THREADS": "1",
}


class Decoders:
    """As many decoders as threads may ask for one at once."""

    def __init__(self, count: int, task: Task) -> None:
        """Start them; the first in a process takes half a second, all others milliseconds."""
        self._free: SimpleQueue[Decoder] = SimpleQueue()
        self._all = [Decoder(task) for _ in range(count)]
        for decoder in self._all:
            self._free.put(decoder)

    def decode(self, upload: bytes) -> Picture:
        """Decode in a process that has nothing else to do.

        Raises:
            UnsupportedFormat, TooManyPixels, CorruptImage: as `images.decode`; the last also for
                what takes longer than decoder.MAX_CPU_S.
            DecoderLost: the process ended; the next upload gets another one.
        """
        decoder = self._free.get()
        try:
            return decoder.decode(upload)
        finally:
            self._free.put(decoder)

    def close(self) -> None:
        """End the processes; nobody may be waiting for one."""
        for decoder in self._all:
            decoder.close()


class Decoder:
    """One process and the socket to it, for one thread at a time."""

    def __init__(self, task: Task) -> None:
        self._task = task
        preprocessing = task.preprocessing
        patch_bytes = preprocessing.tokens * preprocessing.patch_bytes
        self._usual_bytes = SIZE.size + ANSWER.size + patch_bytes
        self._connect()

    def decode(self, upload: bytes) -> Picture:
        """Send an upload, wait for its picture; raises what Decoders.decode does."""
        for _ in range(2):
            try:
                answer, took_s = self._ask(upload)
                break
            except OSError as error:  # it had not even read the upload, which is not to blame
                logger.error("decoder %d has ended (%s); another comes", self.pid, error)  # noqa: TRY400 - the place in our code says nothing
                self._replace()
        else:
            raise DecoderLost("No process could take the upload.")
        if answer is None:
            pid = self.pid
            self._replace()
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
        except MemoryError:
            self.close()  # what is still to come would be taken for the next upload's answer
            raise
        return answer, time.monotonic() - start

    def _replace(self) -> None:
        self.close()
        self._connect()

    def _connect(self) -> None:
        self._link = nursery().new_link()
        hello = receive(self._link)
        if hello is None:
            raise DecoderLost("A process that decodes has ended as it began.")
        self.pid = int(hello)
        send(self._link, self._task.model_dump_json().encode())


class Nursery:
    """The process that forks decoders, one for all that this process will ever need."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start()
        atexit.register(self._end)

    def new_link(self) -> socket.socket:
        """Return the socket to a new decoder."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        with self._lock, theirs:
            if self._process.poll() is not None:
                self._control.close()
                self._start()
            socket.send_fds(self._control, [b"1"], [theirs.fileno()])
        return ours

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
                [sys.executable, "-m", "app.decoder", str(theirs.fileno())],
                cwd=Path(__file__).parent.parent,  # where the package is, installed or not
                env={**os.environ, **_ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def _end(self) -> None:
        self._control.close()
        self._process.kill()  # it holds nothing that could be lost
        self._process.wait()


@cache
def nursery() -> Nursery:
    """Return this process's nursery; the first call starts it, and it takes half a second."""
    return Nursery()
