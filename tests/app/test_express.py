"""`POST /classify` past the framework and by its way: a client cannot tell the two apart."""

import asyncio
import gc
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from app.clock import Clock
from app.entry import Entry
from app.express import Express
from app.main import create_app
from app.settings import Settings
from app.usual import express
from tests.fakes import FakeEngine, make_image
from tests.faults.load import dial, get, post, read_answer
from tests.processes import Server, serving

IMAGE = make_image()
# A parameter that nobody knows makes a request unusual: it takes the framework's way.
DETOUR = "detour=1"
BOUNDARY = "b"
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + IMAGE + b"\r\n"
    b"--b--\r\n"
)
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
LONG = {b"content-type": FORM_TYPE.encode()}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[FastAPI]:
    """Return a running application that wants a key."""
    (tmp_path / "keys").write_text("secret\n")
    app = create_app(Settings(api_keys_file=tmp_path / "keys"), FakeEngine())
    with TestClient(app):
        yield app


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a real server around a fake engine."""
    log = tmp_path_factory.mktemp("express") / "log"
    with serving(
        log,
        *("--max-upload-bytes", "100000", "--log-format", "json"),
        module="tests.faults.observed",
        OBSERVED_BATCH_MS="0",
    ) as running:
        yield running


@pytest.mark.parametrize(
    ("target", "headers", "taken"),
    [
        (b"/classify", {}, True),
        (b"/classify?top_k=2", {}, True),
        (b"/classify?top_k=02", {}, False),
        (b"/classify?top_k=x", {}, False),
        (b"/classify?top_k=2&top_k=3", {}, False),
        (b"/classify/batch", {}, False),
        (b"/classify", {b"content-type": FORM_TYPE.encode()}, True),
        (b"/classify", LONG | {b"content-length": b"1048576"}, True),
        (b"/classify", LONG | {b"content-length": b"1048577"}, False),
        (b"/classify", {b"content-length": b"1048577"}, True),
        (b"/classify", {b"content-type": b"application/json"}, False),
        (b"/classify", {b"origin": b"http://page"}, False),
        (b"/classify", {b"expect": b"100-continue"}, False),
        (b"/classify", {b"x-api-key": b"wrong"}, False),
    ],
)
def test_which_requests_take_it(
    app: FastAPI, target: bytes, headers: dict[bytes, bytes], taken: bool
) -> None:
    """Whatever a usual request has not, a foreign key included, makes it take the long way."""
    fields = {b"x-api-key": b"secret"} | headers
    clock = Clock(Mock())
    found = express(app.state.service, target, fields, [], lambda _: None, clock)
    assert (found is not None) is taken


@pytest.mark.parametrize(
    ("query", "body", "headers", "status"),
    [
        ("", IMAGE, {}, 200),
        ("top_k=2", IMAGE, {}, 200),
        ("", FORM, {"Content-Type": FORM_TYPE}, 200),
        ("", IMAGE, {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "X-Request-ID": "me"}, 200),
        ("", IMAGE, {"Connection": "close"}, 200),
        ("top_k=9", IMAGE, {}, 422),
        ("", IMAGE, {"X-Request-Timeout-Ms": "soon"}, 422),
        ("", IMAGE, {"X-Request-Timeout-Ms": ""}, 422),
        ("", b"", {}, 400),
        ("", b"{", {"Content-Type": "Application/JSON"}, 400),
        ("", b"not an image", {}, 415),
        ("", IMAGE, {"Content-Type": "text/plain"}, 415),
        ("", IMAGE, {"Content-Type": "image/png\r\nContent-Type: text/plain"}, 200),
        ("", IMAGE, {"Content-Type": "text/plain\r\nContent-Type: image/png"}, 415),
        ("", IMAGE, {"Content-Type": "text/plain", "X-Request-Timeout-Ms": "soon"}, 415),
        ("", IMAGE, {"Content-Type": "multipart/form-data", "X-Request-Timeout-Ms": "0"}, 400),
        ("", IMAGE[:45], {}, 422),
        ("", FORM[:-20], {"Content-Type": FORM_TYPE}, 400),
        ("", FORM, {"Content-Type": "multipart/form-data"}, 400),
        ("", bytes(100_001), {}, 413),
    ],
)
def test_both_ways_answer_alike(
    server: Server, query: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    """Status, body and the names of the headers are the same, for answers and problems."""
    answers = []
    for path in (f"/classify?{query}".rstrip("?"), f"/classify?{query}&{DETOUR}"):
        with dial(server.url) as client:
            request = post(
                body, path, **{name.replace("-", "_"): headers[name] for name in headers}
            )
            client.sendall(request)
            head, _, content = read_answer(client).partition(b"\r\n\r\n")
        lines = head.decode("ascii").split("\r\n")
        names = sorted(line.partition(":")[0].lower() for line in lines[1:])
        answers.append((lines[0], names, json.loads(content)))
    assert answers[0] == answers[1]
    assert answers[0][0].split()[1] == str(status)


def test_both_ways_are_reported_alike(server: Server) -> None:
    """The log and the metrics know one route, whichever way its requests took."""
    with dial(server.url) as client:
        for number, path in enumerate(("/classify", f"/classify?{DETOUR}")):
            client.sendall(post(IMAGE, path, X_Request_ID=f"twin-{number}"))
            assert read_answer(client).startswith(b"HTTP/1.1 200")
        client.sendall(get("/metrics"))
        assert b'route="/classify",status="200"} ' in read_answer(client)
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if "twin-" in line]
    assert len(lines) == 2
    assert set(lines[0]) == set(lines[1])
    for name in ("method", "route", "status", "outcome", "received_bytes", "images"):
        assert lines[0][name] == lines[1][name]


def test_order_of_a_pipeline(server: Server) -> None:
    """Requests sent ahead are answered in their order, whichever way each takes."""
    requests = [
        post(IMAGE, "/classify?top_k=1", X_Request_ID="0"),
        post(IMAGE, f"/classify?{DETOUR}", X_Request_ID="1"),
        post(b"not an image", X_Request_ID="2"),
        get("/livez"),
        post(IMAGE, X_Request_ID="4"),
    ]
    with dial(server.url) as client:
        client.sendall(b"".join(requests))
        heard = b""
        while heard.count(b"HTTP/1.1 ") < len(requests):
            heard += client.recv(65536)
    statuses = [part[:3] for part in heard.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"200", b"415", b"200", b"200"]
    places = [heard.index(b"x-request-id: %d\r\n" % number) for number in (0, 1, 2, 4)]
    assert places == sorted(places)


def test_refused_body_that_trickles_is_cut_off(tmp_path: Path) -> None:
    """After an early answer the rest of the body has the body's deadline, no longer."""
    with (
        serving(tmp_path / "log", "--body-timeout-s", "0.5") as running,
        dial(running.url) as client,
    ):
        head = post(b"", "/classify", Content_Type="text/plain").replace(b": 0", b": 1000")
        client.sendall(head)
        assert read_answer(client).startswith(b"HTTP/1.1 415")
        client.settimeout(5)
        assert client.recv(1) == b""


async def answered_by_express(app: FastAPI, request_id: bytes) -> tuple[Express, bytes]:
    """Return a request for one image, without a connection, and what it is answered."""
    fields = {b"content-type": b"image/png", b"x-request-id": request_id}
    answered, written = asyncio.Event(), Mock()
    clock = Clock(asyncio.get_running_loop())
    found = express(app.state.service, b"/classify", fields, [], written, clock)
    assert isinstance(found, Express)
    found.begin(answered.set)
    found.feed(IMAGE)
    found.complete()
    await answered.wait()
    return found, written.call_args.args[0]


def test_open_connection_holds_no_picture() -> None:
    """Between requests a connection keeps neither the last picture nor its logits."""
    app = create_app(Settings(), FakeEngine())

    async def ask() -> int:
        found, answer = await answered_by_express(app, b"the-last-one")
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert found.response_complete
        give_up = time.monotonic() + 5
        while (left := count_entries("the-last-one")) and time.monotonic() < give_up:  # noqa: ASYNC110 - no event says that the engine's thread has let go of its batch
            await asyncio.sleep(0.01)
        return left

    with TestClient(app) as client:
        assert client.portal is not None
        assert client.portal.call(ask) == 0


def test_bug_is_logged_with_its_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The traceback of a bug has the ID that its client was told."""
    monkeypatch.setattr("app.express.classification", lambda *_: 1 // 0)
    app = create_app(Settings(), FakeEngine())

    with TestClient(app) as client:
        assert client.portal is not None
        _, answer = client.portal.call(answered_by_express, app, b"the-bug")
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"x-request-id: the-bug\r\n" in answer
    [record] = [record for record in caplog.records if record.exc_info]
    assert vars(record)["request_id"] == "the-bug"


def count_entries(request_id: str) -> int:
    """Return how many entries of a request anything still holds."""
    gc.collect()
    entries = [one for one in gc.get_objects() if isinstance(one, Entry)]
    return sum(entry.request_id == request_id for entry in entries)


def test_a_bug_is_a_500(server: Server) -> None:
    """An engine that raises is answered with 500, and the connection serves on."""
    with dial(server.url) as client:
        for fault, status in ((b"raise", b"500"), (b"none", b"200")):
            client.sendall(b"GET /observed?fault=%b HTTP/1.1\r\nHost: x\r\n\r\n" % fault)
            read_answer(client)
            client.sendall(post(IMAGE))
            assert read_answer(client).startswith(b"HTTP/1.1 " + status)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a real server of one place, which a request that never ends holds."""
    log = tmp_path_factory.mktemp("full") / "log"
    options = ("--max-requests", "1", "--max-upload-bytes", "100000", "--log-format", "json")
    with serving(log, *options) as running, dial(running.url) as holder:
        holder.sendall(post(b"", "/classify").replace(b": 0", b": 9"))
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with dial(running.url) as scraper:
                scraper.sendall(get("/metrics"))
                if b"mixer_requests_in_flight 1.0" in read_answer(scraper):
                    break
        yield running


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Request-ID": "me", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"},
        {"Connection": "close"},
        {"Content-Type": "application/json"},
    ],
)
def test_both_ways_refuse_alike(full: Server, headers: dict[str, str]) -> None:
    """A refusal at the door is the same answer and the same line in the log, either way."""
    answers, fields = [], []
    for number, path in enumerate(("/classify", f"/classify?{DETOUR}")):
        name = f"refused-{number}-{len(headers)}-{'-'.join(headers.values())[:9]}"
        named = {k.replace("-", "_"): v for k, v in headers.items()} | {"X_Request_ID": name}
        with dial(full.url) as client:
            client.sendall(post(IMAGE, path, **named))
            head, _, content = read_answer(client).partition(b"\r\n\r\n")
        lines = head.decode("ascii").split("\r\n")
        assert f"x-request-id: {name}" in lines
        names = sorted(line.partition(":")[0].lower() for line in lines[1:])
        answers.append((lines[0], names, json.loads(content)))
        changing = ("time", "request_id", "total_ms", "span_id", "received_bytes")
        fields.append({k: v for k, v in _line_of(full, name).items() if k not in changing})
    assert answers[0] == answers[1]
    assert answers[0][0] == "HTTP/1.1 429 Too Many Requests"
    assert fields[0] == fields[1]
    assert fields[0]["outcome"] == "queue-full"


def test_both_ways_count_alike(full: Server) -> None:
    """A refusal at the door adds one to the same counters, either way."""
    added = []
    for number, path in enumerate(("/classify", f"/classify?{DETOUR}")):
        before = _counts(full)
        with dial(full.url) as client:
            client.sendall(post(IMAGE, path, X_Request_ID=f"counted-{number}"))
            read_answer(client)
        _line_of(full, f"counted-{number}")
        added.append({k: v - before.get(k, 0) for k, v in _counts(full).items()})
    ones = [{name for name, more in counters.items() if more == 1} for counters in added]
    assert ones[0] == ones[1]
    assert ones[0] == {
        'mixer_requests_total{outcome="queue-full",route="/classify",status="429"}',
        'mixer_refusals_total{reason="requests"}',
    }


def _counts(server: Server) -> dict[str, float]:
    """Return what is counted of requests for /classify, and of refusals."""
    with dial(server.url) as scraper:
        scraper.sendall(get("/metrics"))
        lines = read_answer(scraper).decode().splitlines()
    pairs = [line.rpartition(" ") for line in lines if line.startswith("mixer_re")]
    kinds = ("requests_total", "request_seconds_count", "refusals_total")
    return {
        name: float(value)
        for name, _, value in pairs
        if any(kind in name for kind in kinds) and "/metrics" not in name
    }


def _line_of(server: Server, request_id: str) -> dict[str, object]:
    """Return a request's line in the log, which may be written after its answer."""
    for _ in range(100):
        for line in server.log.read_text().splitlines():
            if f'"{request_id}"' in line:
                found: dict[str, object] = json.loads(line)
                return found
        time.sleep(0.02)
    raise AssertionError(f"no line of {request_id}")


@pytest.mark.parametrize("size", [1, 7, 60, 150, 1000, 10**6])
def test_bodies_of_refused_requests_are_passed_over(full: Server, size: int) -> None:
    """However the bytes are cut up, each request behind a refused one begins where it begins."""
    trap = b"POST /classify HTTP/1.1\r\nContent-Length: 0\r\n\r\n"  # looks like a request
    requests = [post(trap), get("/livez"), post(trap * 3), get("/livez"), post(b""), post(trap)]
    whole = b"".join(requests)
    with dial(full.url) as client:
        for start in range(0, len(whole), size):
            client.sendall(whole[start : start + size])
        heard = b""
        while heard.count(b"HTTP/1.1 ") < len(requests):
            heard += client.recv(65536)
        client.shutdown(socket.SHUT_WR)  # then nothing more than the rest of the last answer comes
        while chunk := client.recv(65536):
            heard += chunk
    statuses = [part[:3] for part in heard.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"429", b"200", b"429", b"200", b"429", b"429"]


@pytest.mark.parametrize("size", [1, 30, 120, 400, 10**6])
def test_usual_requests_in_pieces(server: Server, size: int) -> None:
    """An image is the same image, however its request was cut up."""
    whole = post(IMAGE, X_Request_ID="a") + post(IMAGE, X_Request_ID="b")
    with dial(server.url) as client:
        for start in range(0, len(whole), size):
            client.sendall(whole[start : start + size])
        heard = b""
        while heard.count(b"HTTP/1.1 200") < 2:
            heard += client.recv(65536)
    assert heard.index(b"x-request-id: a") < heard.index(b"x-request-id: b")


def test_refused_while_it_is_sent(tmp_path: Path) -> None:
    """An answer that ends the connection is read by a client that is still sending."""
    whole = post(bytes(90_000), Content_Type="text/plain")
    with serving(tmp_path / "log", "--drain-delay-s", "10") as running:
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with dial(running.url) as client:
            for start in range(0, len(whole), 30_000):
                client.sendall(whole[start : start + 30_000])
                time.sleep(0.05)
            assert read_answer(client).startswith(b"HTTP/1.1 415")
