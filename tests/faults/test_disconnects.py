"""Promise 4: a client that hangs up costs nothing more."""

import socket
import struct
import time
from collections.abc import Callable
from itertools import product

import pytest

from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import ROUNDS, dial, get, one, post, read_answer, until
from tests.faults.test_bounds import encode_form, observe
from tests.processes import Server


def reset(client: socket.socket) -> None:
    """Hang up with a reset, as a killed process does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def in_flight(server: Server) -> tuple[int, int, int]:
    """Return the requests, the bytes of their bodies and their images."""
    state = observe(server.url)
    return state["requests"], state["body_bytes"], state["images"]


def gone_after_ms(
    server: Server, request: bytes, leave: Callable[[socket.socket], None], clients: int
) -> float:
    """Return after how long clients that leave the queue are no longer counted.

    The engine holds the batch before theirs all the while, however slow this machine is.
    """
    before = observe(server.url)["inferred"]
    one(server.url, get("/observed?hold=1"))
    with dial(server.url) as busy:
        busy.sendall(post(make_image()))
        until(lambda: observe(server.url)["inferred"] == before + 1)
        alone = in_flight(server)
        queued = [dial(server.url) for _ in range(clients)]
        for client in queued:
            client.sendall(request)
        until(lambda: observe(server.url)["images"] == clients + 1)
        for client in queued:
            leave(client)
        start = time.monotonic()
        until(lambda: in_flight(server) == alone)
        took_ms = (time.monotonic() - start) * 1000
        one(server.url, get("/observed?hold=0"))
        assert b"200 OK" in read_answer(busy)
    until(lambda: in_flight(server) == (0, 0, 0), 5)
    assert observe(server.url)["inferred"] == before + 1
    return took_ms


@pytest.mark.parametrize(
    "request_",
    [
        post(make_image()),
        post(
            encode_form([make_image()]),
            "/classify/batch",
            Content_Type="multipart/form-data; boundary=b",
        ),
    ],
    ids=["/classify", "/classify/batch"],
)
def test_queued_clients_reset(fake: Start, figure: Figure, request_: bytes) -> None:
    """200 queued clients reset: the gauges are back at 0 within 250 ms, and none is inferred."""
    with fake(max_batch=4, queue_budget_ms=3_600_000, request_timeout_ms=600_000) as server:
        for _ in range(ROUNDS):
            took_ms = gone_after_ms(server, request_, reset, 200)
            figure(f"gauges at 0 after {took_ms:.0f} ms, none inferred")
            if took_ms < 250:
                break
        assert took_ms < 250
        log = server.log.read_text()
        assert "Traceback" not in log
        assert "never retrieved" not in log


def test_clients_gone_behind_requests_sent_ahead(fake: Start, figure: Figure) -> None:
    """A client that has sent more requests than it has answers to is missed all the same."""
    ahead = post(make_image(), "/explain") + get("/livez")
    ways = product(["/classify", "/classify?detour", "/"], [reset, socket.socket.close])
    rounds = 0
    with fake(max_batch=4, queue_budget_ms=3_600_000, request_timeout_ms=600_000) as server:
        for path, leave in ways:
            for _ in range(ROUNDS):
                rounds += 1
                request = post(make_image(), path) + ahead
                took_ms = gone_after_ms(server, request, leave, 20)
                figure(f"{path}, {leave.__name__}: gauges at 0 after {took_ms:.0f} ms")
                if took_ms < 250:
                    break
            assert took_ms < 250, (path, leave)
            counted = one(server.url, get("/metrics")).body
            assert b'mixer_images_total{outcome="client-gone"} %d.0' % (20 * rounds) in counted
        assert "Traceback" not in server.log.read_text()


def test_hang_up_during_the_upload(fake: Start, figure: Figure) -> None:
    """Clients that hang up in the middle of their upload leave no request and no byte behind."""
    with fake() as server:
        for cut in range(0, 200, 5):
            client = dial(server.url)
            client.sendall(post(make_image(side=64))[: 60 + cut])
            if cut % 10:
                reset(client)
            else:
                client.close()
        time.sleep(0.25)  # until all is read
        until(lambda: in_flight(server) == (0, 0, 0), 5)
        figure(f"{observe(server.url)}")
        assert "Traceback" not in server.log.read_text()
