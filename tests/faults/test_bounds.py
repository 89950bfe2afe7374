"""Promise 3: everything that can pile up has a limit, and memory at the limits is their sum.

ARCHITECTURE.md adds them up; here each is filled by itself.
"""

import asyncio
import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvloop
from fastapi import Request
from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.types import Message

from app import documents
from app.admission import Admission, BodyBudget
from app.latency import LatencyTable
from app.settings import Settings
from tests.fakes import encode, make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import Answer, Load, closed_loop, dial, get, one, post, read_answer, until

BYTES_PER_PIXEL = 12  # of a picture being decoded, at worst: ARCHITECTURE.md
HEAD = b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Type: image/jpeg\r\n"


def observe(url: str) -> dict[str, int]:
    """Return what is in flight."""
    values: dict[str, int] = json.loads(one(url, get("/observed")).body)
    return values


def test_requests(fake: Start, figure: Figure) -> None:
    """The request beyond `max_requests` gets 429, until one of them is done."""
    with fake(max_requests=10) as server:
        held = [dial(server.url) for _ in range(10)]
        for client in held:
            client.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        until(lambda: observe(server.url)["requests"] == 10)
        refused = one(server.url, post(make_image()))
        figure(f"the 11th of 10: {refused.status}, Retry-After {refused.header('Retry-After')}")
        assert refused.status == 429
        assert int(refused.header("Retry-After")) >= 1
        assert one(server.url, get("/livez")).status == 200
        for client in held:
            client.close()
        until(lambda: observe(server.url)["requests"] == 0)
        assert one(server.url, post(make_image())).status == 200


def test_bytes(fake: Start, figure: Figure) -> None:
    """Bytes count as they arrive: a promise of bytes holds nobody up, bytes themselves do."""
    with fake(max_bytes_in_flight=1_000_000, max_upload_bytes=600_000) as server:
        promised = [dial(server.url) for _ in range(20)]
        for client in promised:
            client.sendall(HEAD + b"Content-Length: 600000\r\n\r\n")
        assert one(server.url, post(make_image())).status == 200
        for client in promised[:2]:
            client.sendall(bytes(499_000))
        until(lambda: observe(server.url)["body_bytes"] >= 900_000)
        refused = one(server.url, post(bytes(100_000)))
        figure(f"{observe(server.url)['body_bytes']} of 1,000,000 held: {refused.status}")
        assert refused.status == 429
        for client in promised:
            client.close()
        until(lambda: observe(server.url)["body_bytes"] == 0)
        assert one(server.url, post(make_image())).status == 200


def test_images(fake: Start, figure: Figure) -> None:
    """Decoding and waiting together never hold more than `queue_size` images."""
    with fake(max_batch=2, queue_size=20, queue_budget_ms=3_600_000) as server:

        async def run() -> list[Answer]:
            load, other = Load(server.url), Load(server.url)
            await other.one(get("/observed?hold=1"))  # none is done before the last has come
            for _ in range(60):
                load.fire(post(make_image()), time.monotonic())
            async with asyncio.timeout(30):
                while len(load.answers) < 40:
                    await asyncio.sleep(0.01)
            await other.one(get("/observed?hold=0"))
            await load.settle()
            await other.settle()
            return load.answers

        statuses = [answer.status for answer in uvloop.run(run())]
        figure(f"{statuses.count(200)} × 200, {statuses.count(429)} × 429")
        assert (statuses.count(200), statuses.count(429)) == (20, 40)


def test_four_batches_of_a_slow_model(fake: Start) -> None:
    """Four batches are taken even where the model needs longer for them than the budget."""
    with fake(batch_ms=300, max_batch=4, queue_budget_ms=50) as server:
        answers = closed_loop(server.url, [post(make_image())], 16, 0.2)
        assert [answer.status for answer in answers] == [200] * 16


def test_connections(fake: Start, figure: Figure) -> None:
    """The connection beyond `max_connections`, not the last within, is told so, but for probes."""
    with fake(max_connections=20) as server:
        held = [dial(server.url) for _ in range(20)]
        time.sleep(0.2)
        held[-1].sendall(post(make_image()))
        assert b" 200 " in read_answer(held[-1])
        with dial(server.url) as one_more:
            answer = read_answer(one_more)
        figure(f"the 21st of 20: {answer[9:12].decode()}")
        assert b" 503 " in answer
        for size in (1000, 100_000):  # the answer outlives what was on its way meanwhile
            with dial(server.url) as one_more:
                for piece in (b"POST /classify HTTP/1.1\r\n", bytes(size)):
                    time.sleep(0.05)
                    one_more.sendall(piece)
                assert b" 503 " in read_answer(one_more)
        for path in ("/livez", "/readyz", "/metrics"):
            with dial(server.url) as probe:
                probe.sendall(get(path))
                answer = read_answer(probe)
                assert probe.recv(1) == b""  # the place is for the next probe
            assert b" 200 " in answer, path
        for request in (post(make_image()), get("/model")):
            assert one(server.url, request).status == 503
        for client in held:
            client.close()
        time.sleep(0.2)
        assert one(server.url, get("/livez")).status == 200


def test_connections_beyond_the_probes(fake: Start) -> None:
    """A flood of idle connections is told at once, and a second later probes are answered."""
    with fake(max_connections=20) as server:
        held = [dial(server.url) for _ in range(36)]
        time.sleep(0.2)
        with dial(server.url) as one_more:
            began = time.monotonic()
            assert b" 503 " in read_answer(one_more)
            assert time.monotonic() - began < 0.9  # 1 s in the place of a probe
        time.sleep(1)
        until(lambda: one(server.url, get("/livez")).status == 200, 3)
        for client in held:
            client.close()


def test_places_come_back_after_a_spike(fake: Start, figure: Figure) -> None:
    """Eight clients with ten places are served again after a spike, though all dial anew each time.

    Their uploads outlast the refusals of the spike, and a connection that lingers behind its
    refusal is not seen to go.
    """
    request = post(bytes(400_000))
    answers: list[tuple[float, int]] = []

    def upload() -> int:
        with dial(server.url) as client:
            try:
                for start in range(0, len(request), 16_384):
                    client.sendall(request[start : start + 16_384])
                    time.sleep(0.001)
            except OSError:  # refused
                pass
            try:
                return int(client.recv(100)[9:12] or 0)
            except OSError:
                return 0

    def come_again(until: float, pause_s: float) -> None:
        while time.monotonic() < until:
            answers.append((time.monotonic(), upload()))
            time.sleep(pause_s)

    with fake(max_connections=10) as server, ThreadPoolExecutor(68) as pool:
        begin = time.monotonic()
        for _ in range(8):
            pool.submit(come_again, begin + 8, 0.1)
        for _ in range(60):
            pool.submit(come_again, begin + 2.5, 0)
        time.sleep(7)
        probe = one(server.url, get("/readyz")).status
    spike = [status for at, status in answers if at < begin + 2.5]
    after = [status for _, status in sorted(answers)[-20:]]
    figure(
        f"{spike.count(503)} of {len(spike)} refused in the spike, "
        f"{after.count(503)} of the last {len(after)}"
    )
    assert 503 in spike
    assert set(after) == {415}
    assert probe == 200


def test_memory_at_the_limit_of_bodies(fake: Start, figure: Figure) -> None:
    """Uploads that fill the budget of bytes hold little more than that, however often."""
    budget = 64 * 2**20
    with fake(max_bytes_in_flight=budget) as server:
        one(server.url, post(make_image()))
        before = server.resident_mib()
        peaks = []
        for _ in range(3):
            held = [dial(server.url) for _ in range(12)]
            for client in held:
                client.sendall(HEAD + b"Content-Length: 8000000\r\n\r\n" + bytes(7_900_000))
            time.sleep(1)
            peaks.append(server.resident_mib() - before)
            for client in held:
                client.close()
            time.sleep(0.5)
        # The allocator may keep some of it for the next time, which then must not add to it.
        after = server.resident_mib() - before
        figure(f"{[round(p) for p in peaks]} MiB held for a budget of 64, {after:.0f} after")
        assert max(peaks) < 64 * 1.5 + 16


def test_memory_of_forms_not_yet_whole(fake: Start, figure: Figure) -> None:
    """A form whose last byte is missing holds its content once."""
    part = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
    form = part + bytes(20 * 2**20 - 100) + b"\r\n--b--\r\n"
    request = post(form + b"\n", Content_Type="multipart/form-data; boundary=b")[:-1]
    with fake() as server:
        one(server.url, post(make_image()))
        before = server.resident_mib()
        held = [dial(server.url) for _ in range(12)]
        for client in held:
            client.sendall(request)
        until(lambda: observe(server.url)["body_bytes"] >= 12 * len(form))
        growth = server.resident_mib() - before
        for client in held:
            client.close()
    figure(f"memory grew by {growth:.0f} MiB for 12 forms of 20")
    assert growth < 330


_PART = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'


@pytest.mark.parametrize("path", ["/classify", "/classify/batch"])
@pytest.mark.parametrize(
    "body",
    [
        (_PART + b"\r\n") * 200_000 + b"--b--\r\n",
        _PART + b"x\r\n--b" + b" " * 10_000_000,  # blanks behind a boundary
        _PART + b"\r\n--b-X" * 1_400_000,  # what begins like one
        _PART + b"x\r\n--b--\r\n" + b"x" * 10_000_000,
        _PART[:-2] + b"X: y\r\n" * 1_200_000,
    ],
    ids=["parts", "blanks", "false boundaries", "epilogue", "headers"],
)
def test_form_of_little_content(fake: Start, figure: Figure, path: str, body: bytes) -> None:
    """A form of anything but content is refused before it costs the event loop its time."""
    with fake() as server:
        one(server.url, post(make_image()))
        before = server.resident_mib()
        start, cpu = time.monotonic(), server.cpu_s()
        answer = one(server.url, post(body, path, Content_Type="multipart/form-data; boundary=b"))
        probe = one(server.url, get("/livez"))
        figure(
            f"{len(body) / 2**20:.0f} MiB: {answer.status} after {time.monotonic() - start:.2f} s, "
            f"memory grew by {server.resident_mib() - before:.0f} MiB"
        )
        assert answer.status in (400, 413)  # the latter where there are parts without end
        assert probe.status == 200
        assert server.cpu_s() - cpu < 0.5
        assert server.resident_mib() - before < 64


def test_batch_larger_than_the_budget(fake: Start) -> None:
    """A batch that alone outlasts the queue budget is served when nobody waits."""
    image = encode_form([make_image()] * 40)
    with fake(batch_ms=50, max_batch=1, queue_budget_ms=500) as server:
        answer = one(
            server.url,
            post(image, "/classify/batch", Content_Type="multipart/form-data; boundary=b"),
        )
        assert answer.status == 200
        assert len(json.loads(answer.body)["results"]) == 40


def encode_form(images: list[bytes]) -> bytes:
    """Return a multipart form of the repeated field `files`."""
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
    return b"".join(head + image + b"\r\n" for image in images) + b"--b--\r\n"


@pytest.mark.slow
def test_memory_of_the_largest_pictures(fake: Start, figure: Figure) -> None:
    """Pictures of `max_pixels` in all decoders hold no more than the sum allows them."""
    threads = 2
    most = threads * 7000 * 7000 * BYTES_PER_PIXEL / 2**20
    patient = {"request_timeout_ms": 120_000, "queue_budget_ms": 60_000}
    with fake(decode_threads=threads, **patient) as server:
        one(server.url, post(make_image()))
        before = server.resident_mib()
        kinds = (("WEBP", "RGBA", 4000), ("JPEG", "RGB", 7000), ("PNG", "RGBA", 7000))
        for file_format, mode, side in (*kinds, ("PNG", "I;16", 7000)):
            picture = Image.effect_noise((64, 64), 60).resize((side, side))
            request = post(encode(picture.convert(mode), file_format, quality=10))
            answers = closed_loop(server.url, [request], 2 * threads, 4)
            # On a slow core some may be stopped at the limit of time, with their memory full.
            slow = [a for a in answers if a.status == 422 and b"too long" in a.body]
            assert {answer.status for answer in answers if answer not in slow} <= {200}
            peak = server.peak_mib() - before
            figure(f"{file_format} {mode}: {peak:.0f} MiB at the most so far, of {most:.0f}")
            assert peak < most
        assert peak > most / 4  # the sum is no fancy


def test_documents_of_clients_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that nobody waits for any more is not held for its turn to be read."""
    turn = threading.Event()

    class Body:
        def image(self) -> bytes:
            return b""

    async def read_body(*_: object) -> tuple[Body, float]:
        return Body(), time.monotonic() + 10

    async def hang_up() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    def parse(data: bytes) -> bytes:
        turn.wait(10)
        return data

    async def run() -> None:
        monkeypatch.setattr(documents, "read_body", read_body)
        budget = BodyBudget(Admission(Settings(), LatencyTable(16, 2)))
        for _ in range(4):  # the first is being read, and the others wait
            request = Request({"type": "http"}, hang_up)
            with pytest.raises(ClientDisconnect):
                await documents.read_alone(request, Settings(), budget, parse)
        held = [found for found in gc.get_objects() if type(found) is Body]
        turn.set()
        assert held == []

    asyncio.run(run())
