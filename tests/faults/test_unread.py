"""Promise 3, of answers: a long one is counted until its client has read it, or is cut off."""

import asyncio
import base64
import contextlib
import json
import select
import socket
import time

import pytest
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from app.admission import Admission
from app.answers import Extent, Steps, put_together
from app.errors import DeadlineExceeded, QueueFull
from app.latency import LatencyTable
from app.settings import Settings
from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import (
    ROUNDS,
    another_process,
    closed_loop,
    dial,
    get,
    one,
    percentile,
    post,
    probe,
    read_answer,
    until,
)
from tests.faults.test_bounds import encode_form, observe
from tests.faults.test_turns import NO_LINGER

CLASSES = 60_000  # so that one image's answer is more than a socket holds
FORM = encode_form([make_image()])
LONG = post(
    FORM, f"/classify/batch?top_k={CLASSES}", Content_Type="multipart/form-data; boundary=b"
)
MODEST = post(  # 700 kB
    FORM, "/classify/batch?top_k=6000", Content_Type="multipart/form-data; boundary=b"
)
BASE64 = base64.b64encode(make_image()).decode()


def document(path: str, content: object) -> bytes:
    """Return a request with a JSON document."""
    return post(json.dumps(content).encode(), path, Content_Type="application/json")


ALL = {
    "one image": post(make_image(), f"/classify?top_k={CLASSES}"),
    "a batch": LONG,
    "Hugging Face's": document("/", {"inputs": BASE64, "parameters": {"top_k": CLASSES}}),
    "the inference protocol's": document(
        "/v2/models/fake/infer",
        {
            "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [BASE64]}],
            "outputs": [{"name": "label"}],
            "parameters": {"top_k": CLASSES},
        },
    ),
}


def unread(url: str) -> int:
    """Return the bytes of long answers that are counted as unread."""
    return observe(url)["answer_bytes"]


def test_memory_of_unread_answers(fake: Start, figure: Figure) -> None:
    """Clients that do not read long answers hold three quarters of the limit; others are served."""
    with fake(classes=CLASSES) as server:
        length = len(one(server.url, LONG).body)
        before = server.resident_mib()
        held = [dial(server.url, receive_buffer=4096) for _ in range(30)]
        for number, client in enumerate(held):
            client.sendall(LONG)
            if number < 48 * 2**20 // length:  # one after the other; the rest are refused
                give_up = time.monotonic() + 20
                while unread(server.url) < (number + 1) * length:
                    assert time.monotonic() < give_up
                    time.sleep(0.01)
        assert all(b" 429 " in read_answer(client)[:20] for client in held[48 * 2**20 // length :])
        counted = unread(server.url)
        growth = server.resident_mib() - before
        figure(
            f"30 answers of {length / 1e6:.1f} MB unread: {counted / 2**20:.0f} MiB counted, "
            f"memory grew by {growth:.0f} MiB"
        )
        assert 48 * 2**20 - length < counted <= 48 * 2**20
        assert growth < 64 + 64  # one more is put together
        refused = one(server.url, LONG)
        assert refused.status == 429
        assert int(refused.header("Retry-After")) >= 1
        for modest in (post(make_image()), MODEST, get("/model")):
            answers = closed_loop(server.url, [modest], 4, 0.5)
            assert {answer.status for answer in answers} == {200}
        for client in held:
            client.close()
        until(lambda: not unread(server.url))
        assert one(server.url, LONG).status == 200
        assert server.resident_mib() - before < 64


@pytest.mark.parametrize("request_", ALL.values(), ids=ALL)
def test_long_answer(fake: Start, request_: bytes) -> None:
    """A long answer comes whole to who reads it late, and counts until then."""
    with fake(classes=CLASSES) as server:
        with dial(server.url, receive_buffer=4096) as client:
            client.sendall(request_)
            until(lambda: unread(server.url) > 0)
            counted = unread(server.url)
            time.sleep(0.1)
            assert unread(server.url) == counted
            head, _, body = read_answer(client).partition(b"\r\n\r\n")
            assert b" 200 " in head
            assert len(body) == counted
            assert json.loads(body)
            client.sendall(get("/livez"))  # the connection stays
            assert b" 200 " in read_answer(client)
        until(lambda: unread(server.url) == 0, 5)


def test_reader_that_trickles(fake: Start, figure: Figure) -> None:
    """A client that reads its answer a little at a time has the time of a body for all of it."""
    with fake(classes=CLASSES, body_timeout_s=1) as server:
        with dial(server.url, receive_buffer=65_536) as client:
            client.sendall(LONG)
            until(lambda: unread(server.url) > 0)
            began, read = time.monotonic(), 0
            while unread(server.url):  # the socket takes another piece again and again
                assert time.monotonic() < began + 30
                read += len(client.recv(100_000))
                time.sleep(0.04)
            took = time.monotonic() - began
            with contextlib.suppress(ConnectionResetError):
                while data := client.recv(100_000):
                    read += len(data)
        figure(f"cut off after {took:.2f} s, {read / 1e6:.2f} MB read")
        assert 0.5 < took < 3
        assert read < 7_000_000


def test_reader_that_is_in_time(fake: Start) -> None:
    """A client that has read its answer in the time of a body keeps its connection."""
    with (
        fake(classes=CLASSES, body_timeout_s=4) as server,
        dial(server.url, receive_buffer=65_536) as client,
    ):
        client.sendall(LONG)
        until(lambda: unread(server.url) > 0)
        time.sleep(0.5)
        assert unread(server.url)
        assert b" 200 " in read_answer(client)
        time.sleep(4)  # the time of an answer that is read is over
        client.sendall(get("/livez"))
        assert b" 200 " in read_answer(client)


def test_client_gone_with_its_answer_unread(fake: Start) -> None:
    """What a client has not read is not held once it is gone."""
    with fake(classes=CLASSES) as server:
        held = [dial(server.url, receive_buffer=4096) for _ in range(4)]
        for client in held:
            client.sendall(LONG)
        until(lambda: unread(server.url) >= 4 * 7_000_000)
        for client in held:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            client.close()
        until(lambda: unread(server.url) == 0, 5)
        until(lambda: observe(server.url)["requests"] == 0, 5)


@pytest.mark.parametrize("kind", ["one image", "a batch"])
def test_long_answers_one_after_the_other(fake: Start, figure: Figure, kind: str) -> None:
    """Long answers leave the event loop to others, and those that would come late are refused."""
    hasty = ALL[kind].replace(b"Host: test", b"Host: test\r\nX-Request-Timeout-Ms: 1000")
    with fake(classes=CLASSES) as server, another_process() as elsewhere:
        asking = elsewhere.submit(closed_loop, server.url, [hasty], 16, 3)
        probes = probe(server.url, get("/livez"), 0.02, 3)
        statuses = [answer.status for answer in asking.result()]
        figure(
            f"/livez p50 {percentile(probes, 0.5) * 1000:.0f} ms, "
            f"p99 {percentile(probes, 0.99) * 1000:.0f}; {statuses.count(200)} × 200, "
            f"{statuses.count(429)} × 429, {statuses.count(504)} × 504"
        )
        assert set(statuses) <= {200, 429, 504}
        assert 200 in statuses
        assert statuses.count(429) > statuses.count(504)
        assert percentile(probes, 0.5) < 0.1
        assert unread(server.url) == 0


def test_uploads_behind_long_answers(fake: Start, figure: Figure) -> None:
    """Bodies stay counted while their answer waits for others to be put together."""
    junk = post(
        encode_form([b"x" * 15_000_000]),
        "/classify/batch",
        Content_Type="multipart/form-data; boundary=b",
    )
    with fake(classes=CLASSES, queue_budget_ms=5000) as server:
        held = [dial(server.url) for _ in range(6)]
        for client, request in zip(held, [LONG] * 5 + [junk], strict=True):
            client.sendall(request)
        counted, give_up = 0, time.monotonic() + 30
        while (now := observe(server.url))["answer_images"] or not now["answer_bytes"]:
            assert time.monotonic() < give_up
            if now["answer_images"]:
                counted = now["body_bytes"]  # at last only those of the last one
        answers = [read_answer(client) for client in held]
        for client in held:
            client.close()
        figure(f"{counted / 1e6:.0f} MB counted of the last one that waits")
        assert all(b" 200 " in answer[:20] for answer in answers)
        assert counted > 1_000_000


def test_best_of_many_images(fake: Start, figure: Figure) -> None:
    """Looking for the best labels of a thousand images keeps nobody's long answer waiting long."""
    images = 1000
    costly = document(
        "/v2/models/fake/infer",
        {
            "inputs": [
                {
                    "name": "image",
                    "datatype": "BYTES",
                    "shape": [images],
                    "data": [BASE64] * images,
                }
            ],
            "outputs": [{"name": name} for name in ("label", "index", "score")]
            + [{"name": "probabilities", "parameters": {"classification": 5}}],
            "parameters": {"top_k": 5},
        },
    )
    other = LONG.replace(b"top_k=60000", b"top_k=20000")
    patient = {"request_timeout_ms": 120_000, "queue_budget_ms": 60_000}
    with fake(classes=21_843, decode_threads=2, **patient) as server:
        alone_s = min(one(server.url, other).latency_s for _ in range(3))
        most_s = max(2.5, 20 * alone_s)  # the latter on a slow machine
        for _ in range(ROUNDS):
            with dial(server.url) as client:
                client.sendall(costly)
                give_up = time.monotonic() + 120  # decoders come last on a busy machine
                while not (now := observe(server.url))["answer_images"] or now["images"]:
                    if select.select([client], [], [], 0.01)[0]:
                        break  # it came before we looked
                    assert time.monotonic() < give_up
                answer = one(server.url, other)
                assert b'"predictions"' in answer.body
                assert b" 200 " in read_answer(client)[:20]
            figure(
                f"after {answer.latency_s:.2f} s behind {now['answer_images']} images, "
                f"{alone_s:.2f} alone"
            )
            if now["answer_images"] == images and answer.latency_s < most_s:
                return
    pytest.fail("no round held the promise")


def test_answer_that_is_late() -> None:
    """An answer that comes too late, or to nobody, is given up between two images."""
    taken = 0
    durations: list[float] = []
    given_up: list[float] = []

    def took(seconds: float, *, at_least: bool = False) -> None:
        (given_up if at_least else durations).append(seconds)

    async def never() -> Message:
        return await asyncio.Future()

    async def gone() -> Message:
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    def steps(many: int) -> Steps[int]:
        nonlocal taken
        for _ in range(many):
            yield
            taken += 1
            time.sleep(0.001)
        return many

    async def ask(many: int, seconds: float, receive: Receive = never) -> int:
        request = Request({"type": "http"}, receive)
        extent = Extent(1000, 5, 1000)
        return await put_together(request, time.monotonic() + seconds, extent, took, steps(many))

    with pytest.raises(DeadlineExceeded):
        asyncio.run(ask(3000, 0.1))
    with pytest.raises(DeadlineExceeded):  # no last second, since others were in time
        asyncio.run(ask(3000, 0.2))
    with pytest.raises(ClientDisconnect):
        asyncio.run(ask(3000, 9, gone))
    assert asyncio.run(ask(3, 1)) == 3
    assert asyncio.run(ask(3, 0)) == 3  # the last second
    assert 6 < taken < 3000
    assert len(durations) == 2
    assert max(given_up) >= 0.1
    assert all(0.003 <= seconds < 1 for seconds in durations)


@pytest.mark.parametrize(
    ("extent", "least_s", "most_s"),
    [
        (Extent(1, 21_843, predictions=5), 0, 0),
        (Extent(32, 1000, predictions=5), 0, 0),
        (Extent(1, 10, values=10), 0, 0),
        (Extent(1, 21_843, values=21_843), 0.004, 0.02),
        (Extent(100, 21_843, predictions=5), 0.03, 0.1),
        (Extent(1, 100_000, predictions=100_000), 0.15, 0.4),
    ],
)
def test_what_answers_take(extent: Extent, least_s: float, most_s: float) -> None:
    """What is put together in a millisecond is short, and a long answer is known to take longer."""
    assert least_s <= extent.seconds <= most_s


def test_limit_of_unread_answers() -> None:
    """The largest answers leave a quarter to those of batches; one alone is always taken."""
    admission = Admission(Settings(), LatencyTable(16, 2))
    mib = 2**20

    def refuses(size: int) -> bool:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(admission.answer(size))
            except QueueFull:
                return True
        return False

    assert not refuses(100 * mib)
    with admission.answer(47 * mib):
        assert refuses(2 * mib)
        assert not refuses(mib)
        with admission.answer(mib), contextlib.ExitStack() as others:
            for _ in range(16):
                others.enter_context(admission.answer(mib))
            assert refuses(40_000)
    assert admission.answer_bytes == 0


def test_long_answers_that_wait() -> None:
    """Long answers hold as many images as the queue does, and take as long as its budget."""
    admission = Admission(Settings(queue_size=10, queue_budget_ms=1000), LatencyTable(16, 2))
    late, soon = time.monotonic() + 10, time.monotonic() + 0.5
    with admission.answering(20, 1.5, late), pytest.raises(QueueFull), admission.answering(1, 1, 9):
        pass
    with admission.answering(9, 0.4, late):
        for images, seconds, deadline in ((2, 0.1, late), (1, 0.7, late), (1, 0.2, soon)):
            with (
                pytest.raises(QueueFull) as refused,
                admission.answering(images, seconds, deadline),
            ):
                pass
            assert refused.value.headers == {"Retry-After": "1"}
        with admission.answering(1, 0.25, late), admission.answering(99, 0, soon):
            assert admission.answer_images == 10
    assert (admission.answer_images, admission.answer_s) == pytest.approx((0, 0))


def test_long_answers_on_a_slow_machine() -> None:
    """Long answers are expected to take what the last ones took; a slow spell passes."""
    admission = Admission(Settings(queue_budget_ms=1000), LatencyTable(16, 2))
    late = time.monotonic() + 10

    def takes_two(expected_s: float) -> bool:
        with admission.answering(1, expected_s, late):
            try:
                with admission.answering(1, expected_s, late):
                    return True
            except QueueFull:
                return False

    def put_together(times_as_long: float) -> None:
        with admission.answering(1, 0.2, late) as took:
            took(0.2 * times_as_long)

    assert takes_two(0.34)
    assert not takes_two(0.36)
    put_together(1000)  # counts as four times what was expected
    assert takes_two(0.1)
    for _ in range(20):
        put_together(3)
    assert takes_two(0.11)
    assert not takes_two(0.13)
    with admission.answering(1, 0.2, late) as took:
        for _ in range(20):
            took(0.01, at_least=True)  # given up, after no more than is expected
    assert takes_two(0.11)
    assert not takes_two(0.13)
    with admission.answering(1, 0.2, late) as took:
        took(0.9, at_least=True)
    assert not takes_two(0.11)
    for _ in range(20):
        put_together(0.5)
    with admission.answering(1, 0, late) as took:  # a short one
        took(9)
    assert takes_two(0.6)
    assert not takes_two(0.8)


def test_short_answers_beside_long_ones(fake: Start, figure: Figure) -> None:
    """Who asks for little is served beside clients who ask for all classes, again and again."""
    alone = json.loads(ALL["the inference protocol's"].partition(b"\r\n\r\n")[2])
    alone["parameters"] = {"top_k": 5}
    with fake(classes=21_843) as server, another_process() as elsewhere:
        greedy = LONG.replace(b"top_k=60000", b"top_k=21843")
        asking = elsewhere.submit(closed_loop, server.url, [greedy], 60, 4)
        time.sleep(1)
        answers = closed_loop(server.url, [document("/v2/models/fake/infer", alone)], 1, 2)
        others = [answer.status for answer in asking.result()]
        figure(
            f"p50 {percentile(answers, 0.5) * 1000:.0f} ms, p99 "
            f"{percentile(answers, 0.99) * 1000:.0f}; others {others.count(200)} × 200, "
            f"{others.count(429)} × 429, {others.count(504)} × 504"
        )
        assert {answer.status for answer in answers} == {200}
        assert percentile(answers, 0.5) < 0.5
        assert 504 not in others
        assert 200 in others


def test_late_images_of_a_long_answer(fake: Start) -> None:
    """A batch of which some images are late is answered with the others, however many classes."""
    request = post(
        encode_form([make_image()] * 16),
        "/classify/batch",
        Content_Type="multipart/form-data; boundary=b",
        X_Request_Timeout_Ms="1200",
    )
    with fake(classes=999, max_batch=4, decode_threads=1) as server:
        assert one(server.url, request).status == 200
        one(server.url, get("/observed?slower_ms=500"))
        answer = one(server.url, request)
        assert answer.status == 200
        late = [
            result.get("problem", {}).get("status") for result in json.loads(answer.body)["results"]
        ]
        assert late.count(504) > 0
        assert late.count(None) > 0
