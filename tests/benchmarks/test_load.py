"""The load generator counts what really happened, and the report what the figures say."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from tests.benchmarks.load import Job, Load, Result
from tests.benchmarks.measure import Figures, goodput, summary
from tests.benchmarks.photos import load_photos
from tests.benchmarks.rounds import median

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class SlowServer:
    """Answers each request after `delay_s`, one at a time, the first after `stall_s` more."""

    def __init__(
        self,
        delay_s: float,
        stall_s: float = 0.0,
        status: bytes = b"200",
        closes: bool = False,
    ) -> None:
        self._delay_s = delay_s
        self._closes = closes
        self._stall_s = stall_s
        self._answer = ANSWER.replace(b"200", status)
        self._turn = asyncio.Lock()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        with contextlib.suppress(ConnectionError):  # the load hangs up without a word
            while await reader.read(2**16):
                async with self._turn:
                    await asyncio.sleep(self._delay_s + self._stall_s)
                    self._stall_s = 0.0
                writer.write(self._answer)
                if self._closes:
                    break
        writer.close()


def run(server: SlowServer, tmp_path: Path, connections: int, rate: float = 0.0) -> Result:
    """Load a server for half a second."""
    body = tmp_path / "body"
    body.write_bytes(b"photo")

    async def both() -> Result:
        listener = await asyncio.start_server(server, "127.0.0.1", 0)
        async with listener:
            port = listener.sockets[0].getsockname()[1]
            head = "POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n"
            result = await Load(Job(port, head, [str(body)], 0.5, connections, rate)).run()
            await asyncio.sleep(0.05)  # the server sees the connections go
            return result

    return asyncio.run(both())


def test_open_loop_counts_from_when_a_request_was_due(tmp_path: Path) -> None:
    """A server that stalls for 300 ms makes every request due meanwhile late, not only one."""
    result = run(SlowServer(0.0, stall_s=0.3), tmp_path, connections=1, rate=100)
    late = [latency for latency in result.latencies_ms if latency > 100]
    assert result.answered == 50
    assert len(late) >= 15


def test_closed_connections_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server closes after an answer is used no more; what finds no connection has failed."""
    monkeypatch.setattr("tests.benchmarks.load.PATIENCE_S", 0.2)
    result = run(SlowServer(0.0, closes=True), tmp_path, connections=4, rate=20)
    assert result.answered == 4
    assert result.unanswered == 6


def test_server_that_hangs_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs up does not keep the rate that it had before."""
    monkeypatch.setattr("tests.benchmarks.load.PATIENCE_S", 0.2)
    assert run(SlowServer(0.0, closes=True), tmp_path, connections=4).seconds >= 0.5
    assert run(SlowServer(0.3), tmp_path, connections=1).seconds < 0.5


def test_closed_loop_waits_for_each_answer(tmp_path: Path) -> None:
    """Four connections to a server of 20 ms, one at a time, see 80 ms and 50 requests a second."""
    result = run(SlowServer(0.02), tmp_path, connections=4)
    assert 5 <= result.answered <= 27
    assert min(result.latencies_ms[4:]) >= 60
    assert result.unanswered == 0


def test_refusals_are_no_answers(tmp_path: Path) -> None:
    """What is not 200 counts by its status and as failed, and has no latency."""
    result = run(SlowServer(0.01, status=b"429"), tmp_path, connections=2)
    assert result.latencies_ms == []
    assert set(result.statuses) == {429}
    figures = summary(
        {
            "latencies_ms": [],
            "statuses": {"429": result.statuses[429]},
            "unanswered": 1,
            "seconds": 0.5,
            "cpu_s": 0.1,
        },
        cpu_s=1.0,
    )
    assert figures["failed"] == result.statuses[429] + 1
    assert figures["cpu_ms"] == 1000  # not the less for what was refused


def test_goodput_is_the_highest_rate_within_the_objective() -> None:
    """The goodput is found to an eighth of a step; a failure that does not come again passes."""
    asked = []

    def load(limit: float, rate: float, failed: int = 0) -> Figures:
        asked.append(rate)
        return {"p99_ms": 200 if rate <= limit else 201, "failed": failed, "answered": 1000}

    def find(limit: float, *, hiccup_at: float = 0.0, failed: int = 0) -> float:
        loads = {rate: load(limit, rate, failed) for rate in (100.0, 200.0, 300.0, 400.0)}
        if hiccup_at:
            loads[hiccup_at]["p99_ms"] = 1000
        asked.clear()
        return goodput(loads, lambda rate: load(limit, rate, failed))

    assert find(262) == 262.5 - 12.5
    assert asked == [300, 250, 275, 262.5]
    assert find(262, hiccup_at=100) == 250
    assert find(999, failed=10) == 400
    assert find(999, failed=11) == 0
    assert find(99) == 87.5
    assert asked == [100, 50, 75, 87.5]
    assert find(1) == 0


def test_median_of_nested_figures() -> None:
    """Rounds of one shape become one, each number the median of its own."""
    rounds = [{"a": {"b": value}, "c": -value} for value in (3.0, 1.0, 2.0)]
    assert median(rounds) == {"a": {"b": 2.0}, "c": -2.0}


def test_generated_photos_are_like_real_ones(tmp_path: Path) -> None:
    """Without an archive 32 JPEGs of 80 to 160 kB are made, the same ones each time."""
    photos = load_photos(tmp_path / "absent")
    assert len(photos) == 32
    assert all(80_000 < len(photo) < 160_000 for photo in photos), [len(p) for p in photos]
    assert load_photos(tmp_path / "absent")[:3] == photos[:3]


@pytest.mark.parametrize("name", ["a.jpg", "b.JPEG"])
def test_photos_of_a_folder(tmp_path: Path, name: str) -> None:
    """A folder's JPEGs are taken by their suffix, whatever its case."""
    (tmp_path / name).write_bytes(b"jpeg")
    (tmp_path / "notes.txt").write_bytes(b"text")
    assert load_photos(tmp_path) == [b"jpeg"]
