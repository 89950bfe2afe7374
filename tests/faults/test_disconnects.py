"""Promise 4: a client that hangs up costs nothing more."""

import json
import socket
import struct
import time
from itertools import product

import pytest

from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import dial, get, one, post, read_answer
from tests.faults.test_bounds import encode_form, observe

CLIENTS = 200


def reset(client: socket.socket) -> None:
    """Hang up with a reset, as a killed process does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


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
    with fake(
        batch_ms=1000, max_batch=4, queue_budget_ms=3_600_000, request_timeout_ms=600_000
    ) as server:
        before = observe(server.url)["inferred"]
        busy = dial(server.url)
        busy.sendall(post(make_image()))
        time.sleep(0.1)  # this one is in the engine
        clients = [dial(server.url) for _ in range(CLIENTS)]
        for client in clients:
            client.sendall(request_)
        while observe(server.url)["images"] < CLIENTS + 1:
            time.sleep(0.01)
        for client in clients:
            reset(client)
        start = time.monotonic()
        while (state := observe(server.url))["images"] > 1:
            assert time.monotonic() < start + 5
        took_ms = (time.monotonic() - start) * 1000
        assert b"200 OK" in read_answer(busy)
        busy.close()
        time.sleep(0.05)
        state = observe(server.url)
        figure(f"gauges at 0 after {took_ms:.0f} ms, {state['inferred'] - before - 1} inferred")
        assert took_ms < 250
        assert (state["requests"], state["body_bytes"], state["images"]) == (0, 0, 0)
        assert state["inferred"] == before + 1
        log = server.log.read_text()
        assert "Traceback" not in log
        assert "never retrieved" not in log


def test_clients_gone_behind_requests_sent_ahead(fake: Start, figure: Figure) -> None:
    """A client that has sent more requests than it has answers to is missed all the same."""
    ways = list(product(["/classify", "/classify?detour", "/"], [reset, socket.socket.close]))
    with fake(batch_ms=1500, max_batch=4, queue_budget_ms=60_000) as server:
        before = observe(server.url)["inferred"]
        for number, (path, leave) in enumerate(ways, start=1):
            with dial(server.url) as busy:
                busy.sendall(post(make_image()))
                time.sleep(0.1)
                clients = [dial(server.url) for _ in range(20)]
                for client in clients:
                    ahead = post(make_image(), "/explain") + get("/livez")
                    client.sendall(post(make_image(), path) + ahead)
                while observe(server.url)["images"] < 21:
                    time.sleep(0.01)
                for client in clients:
                    leave(client)
                start = time.monotonic()
                while observe(server.url)["images"] > 1:
                    assert time.monotonic() < start + 1, (path, leave)
                took_ms = (time.monotonic() - start) * 1000
                figure(f"{path}, {leave.__name__}: gauges at 0 after {took_ms:.0f} ms")
                assert took_ms < 250
                assert b"200 OK" in read_answer(busy)
            state = observe(server.url)
            assert (state["requests"], state["body_bytes"], state["images"]) == (0, 0, 0)
            assert state["inferred"] == before + number
            counted = one(server.url, get("/metrics")).body
            assert b'mixer_images_total{outcome="client-gone"} %d.0' % (20 * number) in counted
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
        time.sleep(0.25)
        state = json.loads(one(server.url, get("/observed")).body)
        figure(f"{state}")
        assert (state["requests"], state["body_bytes"], state["images"]) == (0, 0, 0)
        assert "Traceback" not in server.log.read_text()
