"""Where decoders come from: a process that has loaded what decoding needs, and forks one for each.

So a decoder starts within milliseconds, and what all of them have loaded is there once.
"""

import atexit
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache

# An upload of the usual size then goes with one call, without waiting for the decoder to read.
_BUFFER_BYTES = 1 << 20
# The longest honest picture takes two seconds of CPU time; on a crowded machine, far longer.
STUCK_S = 30
_LAST_WORD_S = 1.0
_PATIENCE = struct.pack("ll", STUCK_S, 0)  # struct timeval
_ENVIRONMENT = {
    # Pillow keeps as many blocks of up to this size for the next picture. Memory fresh from the
    # system is zeroed page by page, which is a tenth of decoding a photo.
    "PILLOW_BLOCKS_MAX": "2",
    "PILLOW_BLOCK_SIZE": "4m",
    # Likewise the C library (mallopt(3)). Pillow's blocks of large pictures, of almost 4 MiB each,
    # must not come from its heap: anything small that lies behind them would keep them for good.
    "MALLOC_MMAP_THRESHOLD_": str(7 * 2**19),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**20),
    # numpy's threads would be there for nothing, and a process with threads cannot be forked well.
    "OPENBLAS_NUM_THREADS": "1",
}


class Nursery:
    """The process that forks decoders, one for all that this process will ever need."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._orphaned: list[int] = []  # groups of processes whose first one has ended
        self._start()
        atexit.register(self._end)

    def new_link(self) -> socket.socket:
        """Return the socket to a new decoder.

        Raises:
            OSError: there cannot be another socket or process.
        """
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, _PATIENCE)
        with self._lock, theirs:
            if self._process.poll() is not None:
                self._control.close()
                self._start_again()
            self._reap()
            try:
                socket.send_fds(self._control, [b"1"], [theirs.fileno()])
            except OSError:  # it has just ended, together with the decoder that is missed
                self._end()
                self._start_again()
                socket.send_fds(self._control, [b"1"], [theirs.fileno()])
        return ours

    def replace(self, asked: float) -> None:
        """Replace a process that has not answered since `asked`, seconds of `time.monotonic()`."""
        with self._lock:
            if self._started < asked:  # else somebody has done so already
                self._control.close()
                self._process.kill()
                with suppress(subprocess.TimeoutExpired):  # nothing ends what waits for a lost disk
                    self._process.wait(_LAST_WORD_S)
                self._start_again()

    def _start(self) -> None:
        self._started = time.monotonic()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
                [sys.executable, "-P", "-m", "app.decoder", str(theirs.fileno())],
                # It imports from where we do, and in that order: an installed package that is named
                # as one of the standard library stays behind it.
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # a terminal's Ctrl+C is for the service alone
            )

    def _start_again(self) -> None:
        self._orphaned.append(self._process.pid)
        self._start()

    def _reap(self) -> None:
        """Take leave of decoders that have ended after the process that forked them.

        In a container they are ours then, as everything that process 1 has not started.
        """
        for group in tuple(self._orphaned):
            try:
                while os.waitpid(-group, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:  # none is left, or they are somebody else's
                self._orphaned.remove(group)

    def _end(self) -> None:
        self._control.close()
        self._process.kill()  # it holds nothing that could be lost
        self._process.wait()


@cache
def nursery() -> Nursery:
    """Return this process's nursery; the first call starts it, and it takes half a second."""
    return Nursery()
