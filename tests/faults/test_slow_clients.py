"""Promise 6: clients that trickle get in nobody's way."""

import asyncio
import contextlib
import socket
import statistics
import time
from pathlib import Path

import pytest
import uvloop

from app.answers import PIECE_BYTES
from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import (
    another_process,
    dial,
    get,
    one,
    open_loop,
    percentile,
    post,
    read_answer,
    until,
)
from tests.faults.test_bounds import observe
from tests.processes import Server

CLIENTS = 500
HEAD = b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Type: image/jpeg\r\n"
FORM_HEAD = (
    b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: 100000\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
)
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


def attack(url: str) -> list[tuple[float, bytes]]:
    """Trickle headers over half of the connections, bodies over the other half."""

    async def run() -> list[tuple[float, bytes]]:
        tasks = []
        for number in range(CLIENTS):
            opening, seconds = (HEAD, 20) if number % 2 else (BODY_HEAD, 40)
            tasks.append(asyncio.create_task(trickle(url, opening, b"x", seconds)))
            await asyncio.sleep(1 / CLIENTS)  # spread over the second, as real ones would be
        return await asyncio.gather(*tasks)

    return uvloop.run(run())


def others_p99_s(server: Server) -> float:
    """Return the median p99 of three rounds of forty requests a second."""
    rounds = [open_loop(server.url, [post(make_image())], 40, 2.5) for _ in range(3)]
    return statistics.median(percentile(answers, 0.99) for answers in rounds)


def test_body_of_a_request_that_had_to_wait(fake: Start) -> None:
    """The body of a request sent ahead has its whole time from when we read on."""
    with (
        fake(batch_ms=2500, max_batch=1, body_timeout_s=2) as server,
        dial(server.url) as client,
    ):
        request = post(make_image())
        client.sendall(request + request[:-9])
        assert b" 200 " in read_answer(client)
        time.sleep(0.5)  # 3 s after its first byte, 0.5 after its turn has come
        client.sendall(request[-9:])
        assert b" 200 " in read_answer(client)


@pytest.mark.slow
@pytest.mark.timed
def test_500_trickling_clients(fake: Start, figure: Figure) -> None:
    """Headers are cut off at 10 s, bodies at 30 s, and meanwhile others wait hardly longer."""
    with fake(batch_ms=5) as server, another_process() as elsewhere:
        others_p99_s(server)  # warm
        calm_s = others_p99_s(server)
        time.sleep(0.5)  # until the server has closed the connections of that load
        descriptors = server.descriptors()
        attacking = elsewhere.submit(attack, server.url)
        while server.descriptors() < descriptors + CLIENTS:
            assert not attacking.done(), "the attack ended before all its connections were open"
            time.sleep(0.1)
        during_s = others_p99_s(server)
        cut = attacking.result()
        give_up = time.monotonic() + 5
        while server.descriptors() > descriptors and time.monotonic() < give_up:
            time.sleep(0.1)
        bodies, headers = cut[::2], cut[1::2]
        figure(
            f"others' p99 {calm_s * 1000:.1f} ms, meanwhile {during_s * 1000:.1f}; headers "
            f"cut off at {statistics.median(s for s, _ in headers):.1f} s, bodies at "
            f"{statistics.median(s for s, _ in bodies):.1f} s; "
            f"{server.descriptors() - descriptors} descriptors left open"
        )
        assert {answer[9:12] for _, answer in cut} == {b"408"}
        assert all(9.9 < seconds < 11 for seconds, _ in headers)
        assert all(29.9 < seconds < 31 for seconds, _ in bodies)
        assert server.descriptors() <= descriptors
        assert during_s <= 1.5 * calm_s


def test_silence(fake: Start, figure: Figure) -> None:
    """A connection that says nothing is closed, one between two requests is kept."""
    with (
        fake(header_timeout_s=2) as server,
        dial(server.url) as silent,
        dial(server.url) as idle,
    ):
        idle.sendall(get("/livez"))
        assert b"200 OK" in read_answer(idle)
        start = time.monotonic()
        assert b" 408 " in read_answer(silent)
        figure(f"silence ends after {time.monotonic() - start:.2f} s of 2")
        time.sleep(0.5)
        idle.sendall(get("/livez"))
        assert b"200 OK" in read_answer(idle)


def test_slow_second_request(fake: Start) -> None:
    """The headers of a later request on the connection have a deadline, too."""
    with fake(header_timeout_s=2) as server, dial(server.url) as client:
        client.sendall(get("/livez"))
        assert b"200 OK" in read_answer(client)
        start = time.monotonic()
        client.sendall(b"GET /live")
        assert b" 408 " in read_answer(client)
        assert 1.9 < time.monotonic() - start < 8


def test_idle_after_an_early_answer(fake: Start) -> None:
    """A connection whose request was refused before its body came is closed like any idle one."""
    head = b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\n"
    with (
        fake(max_requests=1, keep_alive_s=1) as server,
        dial(server.url) as first,
        dial(server.url) as refused,
    ):
        first.sendall(head)
        until(lambda: observe(server.url)["requests"] == 1)
        refused.sendall(head)
        assert b" 429 " in read_answer(refused)
        start = time.monotonic()
        refused.sendall(b"too late.")
        assert refused.recv(1) == b""
        assert 0.5 < time.monotonic() - start < 5


def _closed_after_s(client: socket.socket, more: bytes) -> float:
    """Send `more` ten times a second; return after how long the server closes, 10 s at most."""
    start = time.monotonic()
    client.settimeout(0.1)
    heard = b"more"
    while heard and time.monotonic() < start + 10:
        try:
            heard = client.recv(65536)
        except TimeoutError:
            client.sendall(more)
        except ConnectionError:
            heard = b""
    return time.monotonic() - start


@pytest.mark.parametrize("body", [make_image(), b"no image"])
def test_empty_lines(fake: Start, body: bytes) -> None:
    """Empty lines after a request neither end an idle connection early nor hold it longer."""
    with fake(header_timeout_s=0.5, keep_alive_s=2) as server, dial(server.url) as client:
        client.sendall(post(body) + b"\r\n")
        assert b"HTTP/1.1 " in read_answer(client)
        time.sleep(1)
        client.sendall(b"\r\n\r\n" + post(body))
        assert b"HTTP/1.1 " in read_answer(client)
        assert 1.5 < _closed_after_s(client, b"\r\n") < 5


@pytest.mark.slow
def test_half_a_connection_that_does_not_read(fake: Start) -> None:
    """A client that sends no more, and leaves less than a buffer unread, is dropped, too."""
    with fake() as server, dial(server.url, receive_buffer=4096) as client:
        style = get("/static/page.css")
        size = len(one(server.url, style).body)
        assert 5_000 < size < PIECE_BYTES  # of more than that it is waited for that it is read
        for _ in range(2000):
            held = _held_by_the_kernel(client)
            client.sendall(style)
            give_up = time.monotonic() + 1
            while (more := _held_by_the_kernel(client) - held) < size:
                if time.monotonic() > give_up:
                    break
                time.sleep(0.001)
            if more < size:  # the server has the rest
                break
        before = server.descriptors()
        client.shutdown(socket.SHUT_WR)
        start = time.monotonic()
        while server.descriptors() >= before and time.monotonic() < start + 30:
            time.sleep(0.1)
        assert 5 < time.monotonic() - start < 20


def _held_by_the_kernel(client: socket.socket) -> int:
    """Return the bytes of answers that are sent and not read, on both sides."""
    port = f":{client.getsockname()[1]:04X}"
    total = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, ours, theirs, _, queues, *_ = line.split()
        sent, received = queues.split(":")
        if theirs.endswith(port):
            total += int(sent, 16)
        elif ours.endswith(port):
            total += int(received, 16)
    return total


@pytest.mark.parametrize(
    ("rest", "more"),
    [
        (b"POST /cl", b""),
        (b"POST /cl", b"x"),
        (BODY_HEAD, b""),
        (BODY_HEAD, b"x"),
    ],
)
def test_what_comes_along_with_a_whole_request(fake: Start, rest: bytes, more: bytes) -> None:
    """What follows a refused request in the same packet has its deadline, trickling or not."""
    with (
        fake(max_requests=1, header_timeout_s=1, body_timeout_s=3) as server,
        dial(server.url) as first,
        dial(server.url) as refused,
    ):
        first.sendall(BODY_HEAD)
        until(lambda: observe(server.url)["requests"] == 1)
        start = time.monotonic()
        refused.sendall(post(b"too early") + rest)
        _closed_after_s(refused, more)
        least_s = 2.9 if rest is BODY_HEAD else 0.9
        assert least_s < time.monotonic() - start < 8


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ([FORM_HEAD + b"no form at all"], 400),
        ([BODY_HEAD.replace(b"/classify", b"/classify?top_k=999")], 422),
        ([BODY_HEAD.replace(b"/classify", b"/classify?top_k=999")[:-2], b"\r\n"], 422),
    ],
)
def test_silence_after_an_early_answer(fake: Start, pieces: list[bytes], status: int) -> None:
    """A client that has its answer and leaves its body unsent is cut off after the body's time."""
    with fake(body_timeout_s=1) as server, dial(server.url) as client:
        start = time.monotonic()
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.1)
        assert b" %d " % status in read_answer(client)
        client.settimeout(10)
        assert client.recv(1) == b""
        assert 0.5 < time.monotonic() - start < 5


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


def test_client_that_reads_late(fake: Start) -> None:
    """A client that pauses before it reads its answers is served on as any other."""
    with fake(body_timeout_s=1) as server, dial(server.url, receive_buffer=65536) as client:
        client.sendall(get("/static/redoc.standalone.js") * 8)
        time.sleep(0.2)  # more is written than is taken
        client.settimeout(1.2)
        with contextlib.suppress(TimeoutError):  # all has come, and it rests for a while
            while client.recv(2**20):
                pass
        client.sendall(get("/livez"))
        assert b" 200 " in read_answer(client)
