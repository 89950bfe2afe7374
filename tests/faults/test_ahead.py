"""Promise 3, of requests sent ahead: what waits for its turn on a connection is bounded, too."""

import json
import socket
import time
from pathlib import Path

import pytest

from app.turns import MAX_HELD_BYTES, MODEST_BYTES, Backlog, Turns
from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import dial, get, one, post, read_answer
from tests.faults.test_bounds import observe
from tests.processes import serving

CLIENTS = 12


def read_until(client: socket.socket, end: bytes) -> bytes:
    """Return what comes, answers one after the other, until `end` is among it."""
    found = b""
    while end not in found:
        piece = client.recv(65_536)
        assert piece, found
        found += piece
    return found


def test_body_behind_requests_that_wait(fake: Start, figure: Figure) -> None:
    """Behind thirty requests that are answered one by one a body stays with its client."""
    ahead = get("/livez") * 30 + post(make_image())
    body = bytes(8 * 2**20)
    with fake() as server:
        one(server.url, get("/observed?slower_ms=4000"))
        before = server.resident_mib()
        clients = [dial(server.url) for _ in range(CLIENTS)]
        for client in clients:
            client.sendall(ahead + post(body, "/explain")[: 64 * 1024])
            client.setblocking(False)
        give_up = time.monotonic() + 30
        while observe(server.url)["images"] < CLIENTS:
            assert time.monotonic() < give_up
        for _ in range(20):
            for client in clients:
                try:
                    client.send(body[: 2**20])
                except BlockingIOError:
                    time.sleep(0.002)
        growth = server.resident_mib() - before
        held = observe(server.url)
        figure(f"{CLIENTS} bodies of 8 MiB wait; memory grew by {growth:.1f} MiB")
        assert held["images"] > 0  # their turn has not come
        assert growth < 24  # it was 95
        for client in clients:
            client.close()


def test_requests_that_wait_are_answered(fake: Start) -> None:
    """What came in one read is answered in its order, however much of it is a body."""
    large = post(make_image() + bytes(150_000))
    with fake(batch_ms=100) as server, dial(server.url) as client:
        client.sendall(post(make_image()) + get("/livez") + large + large + get("/model"))
        found = read_until(client, b'"labels"')
        assert found.count(b"HTTP/1.1 200 ") == 5
        assert found.count(b'"predictions"') == 3


def test_client_gone_with_requests_that_wait(fake: Start) -> None:
    """What a client has sent ahead goes with it."""
    with fake() as server:
        one(server.url, get("/observed?slower_ms=500"))
        with dial(server.url) as client:
            client.sendall(post(make_image()) + get("/livez") + post(bytes(200_000)) * 3)
            while not (now := observe(server.url))["images"]:
                time.sleep(0.01)
            assert now["held_bytes"] > 20_000  # counted
        give_up = time.monotonic() + 5
        while any((now := observe(server.url))[name] for name in ("images", "held_bytes")):
            assert time.monotonic() < give_up, now
        assert one(server.url, post(make_image())).status == 200


def test_bodies_of_gets(fake: Start, figure: Figure) -> None:
    """A body that no route takes is not kept while its answer waits to be read."""
    request = b"GET /model HTTP/1.1\r\nHost: test\r\nContent-Length: 240000\r\n\r\n"
    with fake(classes=150_000) as server:  # 9 MB of labels: more than a socket holds
        clients = [dial(server.url, receive_buffer=4096) for _ in range(100)]
        for client in clients:
            client.sendall(request)
        one(server.url, get("/livez"))
        before = server.resident_mib()
        for client in clients:
            client.sendall(bytes(240_000))
        time.sleep(0.5)
        growth = server.resident_mib() - before
        figure(f"100 bodies of 240 kB: memory grew by {growth:.1f} MiB")
        assert growth < 16  # the bodies are 24
        for client in clients:
            client.close()


def test_body_of_a_get(fake: Start) -> None:
    """The next request is found behind a body that no route takes."""
    body = b"Host: test\r\nContent-Length: 500000\r\n\r\n" + bytes(500_000)
    with fake() as server, dial(server.url) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\n" + body + get("/model"))
        assert read_until(client, b'"labels"').count(b"HTTP/1.1 200 ") == 2


def test_no_room_for_what_waits(tmp_path: Path) -> None:
    """A usual upload that finds no room to wait for its turn is told so, and counts as refused."""
    request = post(make_image() + bytes(50_000))
    log = tmp_path / "log"
    with (
        serving(
            log,
            module="tests.faults.observed",
            OBSERVED_BATCH_MS="0",
            OBSERVED_SLICE_BYTES="1000",
            OBSERVED_HELD_BYTES="2000",
        ) as server,
        dial(server.url) as client,
    ):
        client.sendall(request[:20])  # so that it is no usual one
        time.sleep(0.1)
        client.sendall(request[20:])
        head, _, body = read_answer(client).partition(b"\r\n\r\n")
        assert b" 503 " in head
        assert b"connection: close" in head
        assert json.loads(body)["detail"] == "Too many bytes wait to be read here."
        assert client.recv(1) == b""
    [line] = [line for line in log.read_text().splitlines() if "/classify" in line]
    assert "503" in line


def test_room_for_those_who_hold_nothing() -> None:
    """The last quarter of what may wait is for connections whose first and modest piece it is."""

    class Silent(Turns):
        def ask(self, step: object) -> None:
            """Let nobody have a turn."""

    turns = Silent()
    greedy = [Backlog(turns, lambda _: None) for _ in range(400)]
    taken = [backlog.add(bytes(256_000)) for backlog in greedy]
    assert 0 < taken.count(True) < 400
    while greedy[0].add(bytes(MODEST_BYTES)):  # it holds something
        pass
    other = Backlog(turns, lambda _: None)
    assert not other.add(bytes(MODEST_BYTES + 1))
    assert other.add(bytes(MODEST_BYTES))
    while Backlog(turns, lambda _: None).add(bytes(MODEST_BYTES)):
        assert turns.held_bytes <= MAX_HELD_BYTES
    assert turns.held_bytes > MAX_HELD_BYTES - MODEST_BYTES
    for backlog in greedy:
        backlog.take()
    assert turns.held_bytes < MAX_HELD_BYTES // 4 + 1


@pytest.mark.parametrize("version", [b"0.9", b"2.0"])
@pytest.mark.parametrize(
    "head", [b"GET /livez HTTP/%b\r\n\r\n", b"GET /livez HTTP/%b\r\nHost: t\r\n\r\n"]
)
def test_other_versions(fake: Start, version: bytes, head: bytes) -> None:
    """A version of HTTP that is not spoken here is refused, with a Host or without."""
    with fake() as server, dial(server.url) as client:
        client.sendall(head % version)
        assert b" 400 " in read_answer(client)[:20]
        assert client.recv(1) == b""
