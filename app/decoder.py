"""A process that decodes: `python -m app.decoder SOCKET`, started by nursery.py.

The first process only loads what decoding needs, and forks one decoder for each socket that it is
handed. So a decoder starts within milliseconds, and what all of them have loaded is there once.
"""

import gc
import os
import signal
import socket
import struct
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

from PIL import Image
from pydantic import BaseModel

from app.cpus import DECODING_NICE, give_way
from app.errors import Problem
from app.images import FORMATS, decode
from app.model_card import Preprocessing

# What one picture may take of CPU time, and of memory besides its pixels: a file can always be made
# that costs more than cost.py foresees (metadata that unpacks to gigabytes, pictures one pixel
# wide). The largest honest ones need about as much.
MAX_CPU_S = 1.9
SPARE_BYTES = 128 * 2**20
BYTES_PER_PIXEL = 12
SIZE = struct.Struct("<I")  # of what follows, in bytes; before each message
# What became of an upload, index of the format, width, height; then the patches, or a text.
ANSWER = struct.Struct("<BBxxII")
PICTURE, PROBLEM, BUG = range(3)


class Task(BaseModel):
    """A decoder's first message: how to decode whatever comes after it."""

    preprocessing: Preprocessing
    max_pixels: int
    max_bytes: int  # of an upload


class Found(BaseModel):
    """The problem that an upload turned out to be."""

    name: str  # of the class
    detail: str


def main() -> None:
    """Fork decoders until the service is gone."""
    control = socket.socket(fileno=int(sys.argv[1]))
    service = os.getppid()
    # The service stops in its own time, and what it still has to decode with it: Ctrl+C at a
    # terminal and a signal to the whole group are for the service alone.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # The limit of CPU time is to end a decoder, whatever the service was started with.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel takes care of those that end
    # Pillow warns of odd metadata and large pictures; that is the client's matter, not the log's.
    warnings.filterwarnings("ignore", module="PIL")
    Image.init()  # Pillow would load its plugins when an image first asks for one, in each decoder
    gc.freeze()  # what is loaded stays shared
    while True:
        _, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not sockets:
            return
        link = socket.socket(fileno=sockets[0])
        try:
            pid = os.fork()
        except OSError:  # no memory, or too many processes: whoever asked sees a closed link
            link.close()
            continue
        if pid == 0:
            control.close()
            # A nursery that was started late, by a thread that gives way, is no measure.
            give_way(DECODING_NICE, service)
            with suppress(OSError):  # the service is gone
                send(link, str(os.getpid()).encode())
                serve(link)
            os._exit(0)
        link.close()


def serve(link: socket.socket) -> None:
    """Decode what comes from `link` until it is closed.

    Raises:
        OSError: it is closed while there is something to answer.
    """
    first = receive(link)
    if first is None:
        return
    task = Task.model_validate_json(first)
    try:
        _limit_memory(BYTES_PER_PIXEL * task.max_pixels + SPARE_BYTES + task.max_bytes)
    except (OSError, ValueError) as error:  # no /proc, or a sandbox: start-up tells
        if receive(link) is not None:
            text = f"its memory cannot be limited: {error}"
            send(link, ANSWER.pack(BUG, 0, 0, 0), text.encode())
        return
    while (message := receive(link)) is not None:
        # The kernel's default for this signal is to end the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
        try:
            picture = decode(message, task.preprocessing, task.max_pixels)
        except Problem as problem:
            found = Found(name=type(problem).__name__, detail=problem.detail)
            head, body = (PROBLEM, 0, 0, 0), found.model_dump_json().encode()
        except Exception:
            head, body = (BUG, 0, 0, 0), traceback.format_exc().encode()
        else:
            head = (PICTURE, FORMATS.index(picture.format), picture.width, picture.height)
            body = picture.patches.tobytes()
            del picture  # the pixels behind it need not wait for the next upload
        signal.setitimer(signal.ITIMER_PROF, 0)
        del message
        send(link, ANSWER.pack(*head), body)


def _limit_memory(more_bytes: int) -> None:
    """Let the process take so much more than it has: what asks for more is refused it."""
    if sys.platform == "linux":  # where this limit is one of all private memory
        import resource

        used = Path("/proc/self/statm").read_text().split()[5]  # data and stack, in pages
        limit = int(used) * resource.getpagesize() + more_bytes
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:  # the container's or shell's, which only root may raise
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def send(link: socket.socket, *parts: bytes) -> None:
    """Send one message.

    Raises:
        OSError: the other side is gone.
    """
    total = SIZE.size + sum(map(len, parts))
    whole = [SIZE.pack(total - SIZE.size), *parts]
    sent = link.sendmsg(whole)  # as a rule all of it: one call, and nothing is copied
    if sent < total:
        link.sendall(memoryview(b"".join(whole))[sent:])


def receive(link: socket.socket) -> bytes | None:
    """Return the next message, or None if the other side is gone.

    Raises:
        BlockingIOError: nothing came within the socket's time, if it has any.
    """
    try:
        head = _receive(link, SIZE.size)
        return head and _receive(link, SIZE.unpack(head)[0])
    except ConnectionError:
        return None


def _receive(link: socket.socket, size: int) -> bytes | None:
    message = b""
    while len(message) < size:  # a process that is stopped and goes on gets less
        piece = link.recv(size - len(message), socket.MSG_WAITALL)
        if not piece:
            return None
        message += piece
    return message


if __name__ == "__main__":
    main()
