"""Load: requests at a fixed rate, whether or not earlier ones have been answered (open loop).

Each request has a connection of its own, so that none fails for a reason on the client's side.
"""

import asyncio
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

ANSWER_TIMEOUT_S = 40.0  # above everything that a balancer may wait for, retries included
UPLOAD_S = 0.02  # between a head and its body: neither comes with the other, as over any network
BROKEN = 0  # the status of an answer that never came, or came in pieces


@dataclass(frozen=True)
class Answer:
    """What became of one request; `seconds` counts from when it was due."""

    status: int
    seconds: float
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Report:
    """All answers of one run of load."""

    answers: list[Answer] = field(default_factory=list)

    @property
    def statuses(self) -> Counter[int]:
        """Return how many answers had each status."""
        return Counter(answer.status for answer in self.answers)

    @property
    def failed(self) -> int:
        """Return how many requests were not classified."""
        return len(self.answers) - self.statuses[200]

    @property
    def p99_s(self) -> float:
        """Return the 99th percentile of the answer times."""
        return statistics.quantiles((answer.seconds for answer in self.answers), n=100)[98]

    def __str__(self) -> str:
        """Return the run in one line."""
        slowest = max(answer.seconds for answer in self.answers)
        return (
            f"{len(self.answers)} requests, {dict(self.statuses)}, "
            f"p99 {self.p99_s * 1000:.0f} ms, slowest {slowest * 1000:.0f} ms"
        )


@contextmanager
def loading(port: int, photo: bytes, rate: float) -> Iterator[Report]:
    """Send `rate` requests a second until the end of the block, then wait for their answers."""
    report = Report()
    ending = threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(_send_at(port, photo, rate, ending, report)), daemon=True
    )
    thread.start()
    try:
        yield report
    finally:
        ending.set()
        thread.join(2 * ANSWER_TIMEOUT_S)
    assert not thread.is_alive(), "the load did not end"


def saturate(port: int, photo: bytes, clients: int, seconds: float) -> Report:
    """Let each of `clients` send its next request as soon as the last is answered."""
    report = Report()

    async def client() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            report.answers.append(await classify(port, photo, time.monotonic()))

    async def all_clients() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    asyncio.run(all_clients())
    return report


async def classify(port: int, photo: bytes, due: float) -> Answer:
    """Post one photo over a new connection."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            status, headers, body = await _exchange(port, photo)
    except (OSError, ValueError, EOFError, TimeoutError):
        return Answer(BROKEN, time.monotonic() - due)
    return Answer(status, time.monotonic() - due, headers, body)


async def _exchange(port: int, photo: bytes) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = (
            "POST /classify HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n"
            f"Content-Type: image/jpeg\r\nContent-Length: {len(photo)}\r\n\r\n"
        )
        writer.write(head.encode())
        await asyncio.sleep(UPLOAD_S)
        writer.write(photo)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers["content-length"]))
        return int(first.split()[1]), headers, body
    finally:
        writer.close()


async def _send_at(
    port: int, photo: bytes, rate: float, ending: threading.Event, report: Report
) -> None:
    async def one(due: float) -> None:
        report.answers.append(await classify(port, photo, due))

    began = time.monotonic()
    async with asyncio.TaskGroup() as requests:
        sent = 0
        while not ending.is_set():
            due = began + sent / rate
            await asyncio.sleep(due - time.monotonic())
            requests.create_task(one(due))
            sent += 1
