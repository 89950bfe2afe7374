"""The load generator: a process of its own that speaks HTTP/1.1 over plain sockets.

Closed loop: each connection sends its next request when it has its answer. Open loop: requests are
due at a constant rate whatever the server does, and latency counts from when each was due, so a
stalled server cannot hide what it kept waiting (coordinated omission).

    python -m tests.benchmarks.load JOB.json RESULT.json
"""

import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

import uvloop

# Times are perf_counter's: uvloop's own clock counts whole milliseconds.
# What has not been answered so long after the last request was due counts as failed.
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Job:
    """One run of load."""

    port: int
    head: str  # request line and headers, with {length} for the body's
    bodies: list[str]  # files, sent in turn
    seconds: float
    connections: int
    rate: float = 0.0  # requests per second; 0 is a closed loop


@dataclass
class Result:
    """What came of it."""

    # A closed loop ends with its last answer, so that no part batch counts; unless one has failed:
    # a server that stands still, or hangs up, would keep the rate that it had before.
    seconds: float = 0.0
    statuses: dict[int, int] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)  # of answers with status 200
    unanswered: int = 0

    @property
    def answered(self) -> int:
        """Requests answered with 200."""
        return len(self.latencies_ms)


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self, load: "Load") -> None:
        self._load = load
        self._buffer = bytearray()
        self._missing = -1  # bytes of the answer still to come; -1 in its head
        self._status = 0
        self.transport: asyncio.WriteTransport  # set once connected
        self.due = 0.0
        self.is_busy = False

    def send(self, request: bytes, due: float) -> None:
        """Send a request that was due at `due`, in seconds of perf_counter."""
        self.due, self.is_busy = due, True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Count an answer when its last byte is there."""
        self._buffer += data
        if self._missing < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end]).lower()
            self._status = int(head[9:12])
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            if not length:
                raise ValueError(f"an answer without Content-Length: {head!r}")
            self._missing = end + 4 + int(length)
        if len(self._buffer) >= self._missing:
            del self._buffer[: self._missing]
            self._missing = -1
            self._load.on_answer(self, self._status)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the load; a request under way is lost."""
        self._load.on_lost(self)

    def close(self) -> None:
        """Hang up; what is still under way has been counted."""
        self.is_busy = False
        self.transport.abort()


class Load:
    """Runs one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        bodies = [Path(body).read_bytes() for body in job.bodies]
        self._requests = [
            job.head.replace("{length}", str(len(body))).encode() + body for body in bodies
        ]
        self._sent = 0
        self._result = Result()
        self._idle: list[Connection] = []
        self._waiting: deque[float] = deque()  # due times of what no connection was free for
        self._stop_at = 0.0
        self._last_in_time: float | None = None
        self._under_way = 0

    async def run(self) -> Result:
        """Return what came of the job."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        connections = [await self._connect() for _ in range(self._job.connections)]
        start = time.perf_counter()
        self._stop_at = start + self._job.seconds
        if self._job.rate:
            self._idle = connections
            await self._send_at_rate(start)
        else:
            for connection in connections:
                self._send(connection, time.perf_counter())
            await asyncio.sleep(self._job.seconds)
        ended = time.perf_counter()
        give_up = time.perf_counter() + PATIENCE_S
        while (self._under_way or self._waiting) and time.perf_counter() < give_up:  # noqa: ASYNC110 - an event would cost every answer a check
            await asyncio.sleep(0.01)
        self._result.unanswered += self._under_way + len(self._waiting)
        has_failed = self._result.unanswered or set(self._result.statuses) - {200}
        if self._last_in_time is not None and not has_failed:
            ended = self._last_in_time
        self._result.seconds = ended - start
        for connection in connections:
            connection.close()
        return self._result

    async def _connect(self) -> Connection:
        connection = Connection(self)
        connection.transport, _ = await self._loop.create_connection(
            lambda: connection, "127.0.0.1", self._job.port
        )
        return connection

    async def _send_at_rate(self, start: float) -> None:
        for number in range(int(self._job.rate * self._job.seconds)):
            due = start + number / self._job.rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if self._idle:
                self._send(self._idle.pop(), due)
            else:
                self._waiting.append(due)

    def _send(self, connection: Connection, due: float) -> None:
        request = self._requests[self._sent % len(self._requests)]
        self._sent += 1
        self._under_way += 1
        connection.send(request, due)

    def on_answer(self, connection: Connection, status: int) -> None:
        """Count an answer and send the connection's next request."""
        now = time.perf_counter()
        connection.is_busy = False
        self._under_way -= 1
        statuses = self._result.statuses
        statuses[status] = statuses.get(status, 0) + 1
        if status == 200 and (self._job.rate or now <= self._stop_at):
            self._result.latencies_ms.append((now - connection.due) * 1000)
            if not self._job.rate:
                self._last_in_time = now
        if self._job.rate:
            if self._waiting:
                self._send(connection, self._waiting.popleft())
            else:
                self._idle.append(connection)
        elif now < self._stop_at:
            self._send(connection, now)

    def on_lost(self, connection: Connection) -> None:
        """Count what a closed connection takes with it; the run goes on without it."""
        if connection.is_busy:
            self._under_way -= 1
            self._result.unanswered += 1
        elif connection in self._idle:
            self._idle.remove(connection)  # the server closes what it finds idle or too many


def main() -> None:
    """Run the job in the first file, write what came of it to the second."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    began = time.process_time()
    result = uvloop.run(Load(job).run())
    document = asdict(result) | {"cpu_s": time.process_time() - began}
    # Not to a pipe: a long result was seen cut off at the 64 KiB that a pipe holds.
    Path(sys.argv[2]).write_text(json.dumps(document))


if __name__ == "__main__":
    main()
