"""A load generator: open loop, so that a slow server cannot slow the load down.

Latency counts from when a request was due, not from when it could be sent: what waits for the
generator itself is not left out (coordinated omission). It shares its cores with the server, so it
is made of bytes and callbacks alone.
"""

import asyncio
import gc
import multiprocessing
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import uvloop

REFUSED, BROKEN = -1, -2  # in place of a status: no connection, or none any more
# More open connections than this and the generator, not the server, is the one in trouble.
MAX_CONNECTIONS = 4000
ANSWER_S = 60.0  # a test whose answer never comes shall fail, not hang
# Other work on the same cores spoils a round; one good round shows what the service does.
ROUNDS = int(os.environ.get("FAULTS_ROUNDS", "3"))
LENGTH = re.compile(rb"(?i)\r\ncontent-length: (\d+)")


@dataclass(slots=True)
class Answer:
    """What became of one request; times in seconds of `time.monotonic()`."""

    due: float
    done: float = 0.0
    status: int = 0
    head: bytes = b""
    body: bytes = b""

    @property
    def latency_s(self) -> float:
        """Seconds from when it was due to its last byte."""
        return self.done - self.due

    def header(self, name: str) -> str:
        """Return a header's value, or nothing."""
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name.lower():
                return value.strip()
        return ""


def post(body: bytes, path: str = "/classify", **headers: str) -> bytes:
    """Return the bytes of a POST request."""
    fields = {"Host": "test", "Content-Type": "application/octet-stream"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in fields.items()]
    head = "\r\n".join([f"POST {path} HTTP/1.1", *lines, f"Content-Length: {len(body)}", "", ""])
    return head.encode() + body


def get(path: str) -> bytes:
    """Return the bytes of a GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request at a time."""

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.answer: Answer | None = None
        self.buffer = b""
        self.length = -1  # of the answer, once its head is there
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # what it is
        """Keep the transport."""
        self.transport = transport

    def send(self, request: bytes, answer: Answer) -> None:
        """Send one request."""
        self.answer, self.buffer, self.length = answer, b"", -1
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Collect the answer."""
        self.buffer += data
        if self.answer is None:
            return
        if self.length < 0:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self.answer.head = self.buffer[:end]
            length = LENGTH.search(self.answer.head)
            self.length = end + 4 + (int(length[1]) if length else 0)
        if len(self.buffer) >= self.length:
            self.answer.body = self.buffer[len(self.answer.head) + 4 :]
            self._finish(int(self.buffer[9:12]))

    def connection_lost(self, _: Exception | None) -> None:
        """Count a request that is cut off as broken."""
        self.load.idle.discard(self)
        self.load.open -= 1
        if self.answer is not None:
            self._finish(BROKEN)

    def _finish(self, status: int) -> None:
        assert self.answer is not None
        answer, self.answer = self.answer, None
        answer.status, answer.done = status, time.monotonic()
        self.load.pending -= 1
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # refused before all of it was sent
        elif status > 0 and b"onnection: close" not in answer.head:
            self.load.idle.add(self)
        else:
            self.transport.close()
        self.load.settled(answer)


@dataclass
class Load:
    """Requests to one server, over as many connections as it takes."""

    url: str
    answers: list[Answer] = field(default_factory=list)
    idle: set[Connection] = field(default_factory=set)
    open: int = 0
    pending: int = 0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        self.address = (str(parts.hostname), int(parts.port or 80))

    def settled(self, answer: Answer) -> None:
        """Take note of an answer; a closed loop overrides it."""
        self.answers.append(answer)

    def fire(self, request: bytes, due: float) -> None:
        """Send a request now, without waiting for it."""
        answer = Answer(due)
        self.pending += 1
        if self.idle:
            self.idle.pop().send(request, answer)
        else:
            asyncio.get_running_loop().create_task(self._connect(request, answer))

    async def run(self, requests: Sequence[bytes], rate: float, seconds: float) -> None:
        """Send `rate` requests a second with exponential gaps, whatever the answers do."""
        gaps = random.Random(20)
        start = due = time.monotonic()
        count = 0
        while due < start + seconds:
            wait = due - time.monotonic()
            if wait > 0.001:
                await asyncio.sleep(wait)
            self.fire(requests[count % len(requests)], due)
            count += 1
            due += gaps.expovariate(rate)

    async def settle(self, timeout_s: float = 30) -> None:
        """Wait for the answers that are still out, then close all connections."""
        give_up = time.monotonic() + timeout_s
        while self.pending and time.monotonic() < give_up:
            await asyncio.sleep(0.005)
        for connection in list(self.idle):
            connection.transport.close()
        await asyncio.sleep(0)

    async def one(self, request: bytes) -> Answer:
        """Send one request and wait for its answer."""
        before = len(self.answers)
        self.fire(request, time.monotonic())
        async with asyncio.timeout(ANSWER_S):
            while len(self.answers) == before:
                await asyncio.sleep(0.0005)
        return self.answers[-1]

    async def _connect(self, request: bytes, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        try:
            if self.open >= MAX_CONNECTIONS:
                raise OSError("the generator has run out of connections")
            self.open += 1
            _, connection = await loop.create_connection(lambda: Connection(self), *self.address)
        except OSError:
            self.open -= 1
            self.pending -= 1
            answer.status, answer.done = REFUSED, time.monotonic()
            self.settled(answer)
        else:
            connection.send(request, answer)


class Loop(Load):
    """A closed loop: each connection sends its next request when its answer is there."""

    async def keep_busy(self, requests: Sequence[bytes], connections: int, seconds: float) -> None:
        """Send as fast as `connections` allow, for `seconds`."""
        self._requests = requests
        self._until = time.monotonic() + seconds
        for _ in range(connections):
            self._next()
        await asyncio.sleep(seconds)
        await self.settle()

    def settled(self, answer: Answer) -> None:
        """Send the next one."""
        super().settled(answer)
        if time.monotonic() < self._until and answer.status != REFUSED:
            self._next()

    def _next(self) -> None:
        self.fire(self._requests[len(self.answers) % len(self._requests)], time.monotonic())


@contextmanager
def undisturbed() -> Iterator[None]:
    """Collect no garbage: its pauses would be counted as the server's."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def open_loop(url: str, requests: Sequence[bytes], rate: float, seconds: float) -> list[Answer]:
    """Return the answers to an open loop of `rate` requests a second."""

    async def run() -> list[Answer]:
        load = Load(url)
        await load.run(requests, rate, seconds)
        await load.settle()
        return load.answers

    with undisturbed():
        return uvloop.run(run())


def closed_loop(
    url: str, requests: Sequence[bytes], connections: int, seconds: float
) -> list[Answer]:
    """Return the answers to a closed loop over `connections` connections."""

    async def run() -> list[Answer]:
        loop = Loop(url)
        await loop.keep_busy(requests, connections, seconds)
        return loop.answers

    with undisturbed():
        return uvloop.run(run())


def one(url: str, request: bytes) -> Answer:
    """Return the answer to one request on its own connection."""

    async def run() -> Answer:
        load = Load(url)
        answer = await load.one(request)
        await load.settle()
        return answer

    return uvloop.run(run())


def probe(url: str, request: bytes, every_s: float, seconds: float) -> list[Answer]:
    """Return the answers to one request after the other; to be run in a process of its own."""
    answers = []
    end = time.monotonic() + seconds
    with dial(url) as client:
        while time.monotonic() < end:
            answer = Answer(time.monotonic())
            client.sendall(request)
            answer.head = read_answer(client)
            answer.status, answer.done = int(answer.head[9:12]), time.monotonic()
            answers.append(answer)
            time.sleep(every_s)
    return answers


def another_process() -> ProcessPoolExecutor:
    """Return a place for one task whose work must not disturb this process's own measuring."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def dial(url: str, receive_buffer: int = 0) -> socket.socket:
    """Return a plain connected socket, for what no HTTP client would do."""
    parts = urlsplit(url)
    plain = socket.socket()
    if receive_buffer:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    plain.settimeout(40)
    plain.connect((str(parts.hostname), int(parts.port or 80)))
    return plain


def read_answer(plain: socket.socket) -> bytes:
    """Return one whole answer from a plain socket, or what came before it was closed."""
    answer = b""
    while chunk := plain.recv(65536):
        answer += chunk
        head, _, body = answer.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if length and len(body) >= int(length[1]):
            break
    return answer


def until(condition: Callable[[], bool], within_s: float = 30) -> None:
    """Wait until the condition holds, which it must within so many seconds."""
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, f"not within {within_s} s"
        time.sleep(0.01)


def percentile(answers: Sequence[Answer], share: float) -> float:
    """Return the latency in seconds that `share` of the answers stay below."""
    latencies = sorted(answer.latency_s for answer in answers)
    return latencies[min(len(latencies) - 1, int(share * len(latencies)))]
