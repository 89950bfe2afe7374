"""Promise 6: clients that trickle get in nobody's way."""

import asyncio
import statistics
import time

import pytest
import uvloop

from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import (
    Answer,
    Load,
    closed_loop,
    dial,
    get,
    one,
    percentile,
    post,
    read_answer,
)
from tests.processes import Server

CLIENTS = 500
HEAD = b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Type: image/jpeg\r\n"
BODY_HEAD = HEAD + b"Content-Length: 100000\r\n\r\n"


async def trickle(url: str, opening: bytes, byte: bytes, seconds: float) -> tuple[float, bytes]:
    """Send a byte now and then; return after how long we were cut off, and what was said."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    start = time.monotonic()
    writer.write(opening)
    reading = asyncio.ensure_future(reader.read())
    while time.monotonic() < start + seconds and not reading.done():
        await asyncio.wait([reading], timeout=1)
        writer.write(byte)
    cut_off_s = time.monotonic() - start
    writer.close()
    try:
        return cut_off_s, await reading
    except ConnectionError:
        return cut_off_s, b""


async def steady(url: str, seconds: float) -> list[Answer]:
    """Return the answers to forty requests a second, as others would see them."""
    load = Load(url)
    await load.run([post(make_image())], 40, seconds)
    await load.settle()
    return load.answers


@pytest.mark.slow
def test_500_trickling_clients(fake: Start, figure: Figure) -> None:
    """Headers are cut off at 10 s, bodies at 30 s, and meanwhile others wait hardly longer."""

    async def run(server: Server) -> None:
        descriptors = server.descriptors()
        headers = [trickle(server.url, HEAD, b"x", 20) for _ in range(CLIENTS // 2)]
        bodies = [trickle(server.url, BODY_HEAD, b"x", 40) for _ in range(CLIENTS // 2)]
        attack = asyncio.gather(*headers, *bodies)
        await asyncio.sleep(1)
        ratios, notes = [], []
        for _ in range(3):
            # Of 500 connections each sends a byte a second: the same bytes in one connection are
            # the baseline's, so that only what the connections cost is compared.
            during = percentile(await steady(server.url, 6), 0.99)
            ratios.append(during)
        cut = await attack
        await asyncio.sleep(1)
        calm = [percentile(await steady(server.url, 6), 0.99) for _ in range(3)]
        ratio = min(ratios) / min(calm)
        header_cuts = [c for c, _ in cut[: CLIENTS // 2]]
        body_cuts = [c for c, _ in cut[CLIENTS // 2 :]]
        said = [answer[9:12] for _, answer in cut]
        await asyncio.sleep(1)
        left = server.descriptors() - descriptors
        notes.append(
            f"others' p99 {min(ratios) * 1000:.1f} ms to {min(calm) * 1000:.1f} ms ({ratio:.2f}×); "
            f"headers cut off at {statistics.median(header_cuts):.1f} s, bodies at "
            f"{statistics.median(body_cuts):.1f} s; {left} descriptors left open"
        )
        figure(notes[0])
        assert set(said) == {b"408"}
        assert 9.5 < min(header_cuts) <= max(header_cuts) < 13
        assert 29.5 < min(body_cuts) <= max(body_cuts) < 33
        assert left <= 1
        assert ratio <= 1.5

    with fake(batch_ms=5) as server:
        closed_loop(server.url, [post(make_image())], 4, 1)
        uvloop.run(run(server))


def test_silence(fake: Start, figure: Figure) -> None:
    """A connection that says nothing is closed, one between two requests is kept."""
    with (
        fake(header_timeout_s=0.5) as server,
        dial(server.url) as silent,
        dial(server.url) as idle,
    ):
        idle.sendall(get("/livez"))
        assert b"200 OK" in read_answer(idle)
        start = time.monotonic()
        assert b" 408 " in read_answer(silent)
        figure(f"silence ends after {time.monotonic() - start:.2f} s of 0.5")
        time.sleep(0.5)
        idle.sendall(get("/livez"))
        assert b"200 OK" in read_answer(idle)


def test_slow_second_request(fake: Start) -> None:
    """The headers of a later request on the connection have a deadline, too."""
    with fake(header_timeout_s=0.5) as server, dial(server.url) as client:
        client.sendall(get("/livez"))
        assert b"200 OK" in read_answer(client)
        client.sendall(b"GET /live")
        start = time.monotonic()
        assert b" 408 " in read_answer(client)
        assert 0.4 < time.monotonic() - start < 2


def test_client_that_does_not_read(fake: Start, figure: Figure) -> None:
    """A client that never reads its answers is dropped, and its descriptor comes back."""
    with fake(body_timeout_s=1) as server:
        before = server.descriptors()
        with dial(server.url, receive_buffer=4096) as client:
            client.settimeout(0.2)
            start = time.monotonic()
            try:
                while time.monotonic() < start + 20:
                    client.sendall(get("/openapi.json") * 10)
            except TimeoutError:
                pass  # it does not read ours either: both wait
            except ConnectionError:
                pass  # dropped already
            while server.descriptors() > before and time.monotonic() < start + 20:
                time.sleep(0.05)
            figure(f"dropped after {time.monotonic() - start:.1f} s")
            assert server.descriptors() <= before
        assert one(server.url, get("/livez")).status == 200
