"""Promise 11: whatever comes through the socket, the service answers or hangs up, and lives on."""

import asyncio
import os
import random
import time
from collections import Counter

import pytest
import uvloop

from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import dial, get, one, post, read_answer
from tests.processes import Server

MALFORMED = int(os.environ.get("FAULTS_MALFORMED", "10000"))
SEED = int(os.environ.get("FAULTS_SEED", "11"))
FORM = b"multipart/form-data; boundary=b"
METHODS = [b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"CONNECT", b"TRACE", b"PRI", b"get", b""]
TARGETS = [
    b"/classify", b"/classify/batch", b"/livez", b"/model", b"/", b"*", b"", b"//", b"/%00", b"/%",
    b"/..%2f..%2fetc/passwd", b"http://test/livez", b"http://[::1/livez", b"test:443", b"/\xff",
    b"/classify?top_k=1", b"/classify?top_k=" + b"9" * 5000, b"/" + b"a" * 70_000, b"/ livez",
]  # fmt: skip
VERSIONS = [b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9.9", b"HTTP/0.9", b"HTTP", b"ICY", b""]
HEADERS = [
    b"Host: test", b"Host: a\r\nHost: b", b"Content-Length: 5", b"Content-Length: -1",
    b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: 99999999999999999999",
    b"Content-Length: 0x5", b"Content-Length: 5, 5", b"Content-Length: +5", b"Content-Length:",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity", b"Transfer-Encoding: x",
    b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding: chunked\r\nContent-Length: 3",
    b"Connection: close", b"Connection: keep-alive", b"Connection: Upgrade\r\nUpgrade: websocket",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA",
    b"Expect: 100-continue", b"Expect: 200-ok", b"X-Request-Timeout-Ms: 1",
    b"X-Request-Timeout-Ms: -1", b"X-Request-Timeout-Ms: \xd9\xa1", b"Accept: \xff\xfe",
    b"Content-Type: image/jpeg", b"Content-Type: " + FORM, b"Content-Type: multipart/form-data",
    b"Content-Type: multipart/form-data; boundary=" + b"b" * 300, b"Content-Type: \xff/\xff",
    b"Content-Type: multipart/form-data; boundary=\"\xff\"", b"Content-Encoding: gzip",
    b"Authorization: Bearer \xff", b"No colon at all", b" folded: value", b"X: a\r\n b", b": empty",
    b"Na me: x", b"X: \x00", b"X: " + b"a" * 20_000, b"\r\n".join([b"A: b"] * 3000), b"Range: x",
]  # fmt: skip
BODIES = [
    b"", b"hello", make_image(), make_image()[:30], b"5\r\nhello\r\n0\r\n\r\n", b"z\r\n",
    b"FFFFFFFFFFFFFFFFF\r\nx", b"-1\r\nx\r\n", b"5;x=y\r\nhello\r\n0\r\nTrailer: x\r\n\r\n",
    b"0\r\n" + b"T: " + b"x" * 70_000 + b"\r\n\r\n", b"--b\r\n\r\n", b"--b--", b"--b\r\n" * 2000,
    b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n',
    b"--b\r\nContent-Disposition: form-data; name=\xff; filename=../../x\r\n\r\n\r\n--b--\r\n",
    b"--b\r\n" + b"X: y\r\n" * 5000 + b"\r\n\r\n--b--", b"\r\n--b", b"\x16\x03\x01\x02\x00\x01\x00",
]  # fmt: skip


def malformed(chance: random.Random) -> bytes:
    """Return one request that is wrong somewhere, most of them recognisable."""
    body = chance.choice(BODIES)
    fields = chance.sample(HEADERS, chance.randrange(5))
    if chance.random() < 0.5:
        fields += [b"Host: test", b"Content-Length: %d" % len(body)]
    first = b" ".join((chance.choice(METHODS[:4]), chance.choice(TARGETS), VERSIONS[0]))
    if chance.random() < 0.3:
        first = chance.choice((b" ", b"\t", b"  ")).join(
            (chance.choice(METHODS), chance.choice(TARGETS), chance.choice(VERSIONS))
        )
    request = bytearray(b"\r\n".join([first, *fields, b"", b""]) + body)
    for _ in range(chance.choice((0, 0, 1, 3))):
        place = chance.randrange(len(request) + 1)
        request[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(4))
    if chance.random() < 0.1:
        request *= chance.choice((2, 20))  # pipelined
    if chance.random() < 0.05:
        request = bytearray(chance.randbytes(chance.randrange(1, 500)))
    return bytes(request)


def converse(server: Server, request: bytes, silence_s: float = 1.0) -> bytes:
    """Send a request and return what comes back until the end, or a silence."""
    with dial(server.url) as client:
        client.settimeout(silence_s)
        answer = b""
        try:
            client.sendall(request)
            while chunk := client.recv(65536):
                answer += chunk
        except (ConnectionError, TimeoutError):
            pass  # it may hang up on such a client, and wait for what never comes
        return answer


async def converse_with_many(server: Server, requests: list[bytes]) -> list[bytes]:
    """Do the same with many requests, a hundred at a time."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    places = asyncio.Semaphore(100)

    async def one_of_them(request: bytes) -> bytes:
        answer = b""
        async with places:
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(request)
                async with asyncio.timeout(0.7):
                    while chunk := await reader.read(65536):
                        answer += chunk
            except (ConnectionError, TimeoutError):
                pass
            finally:
                writer.close()
        return answer

    return await asyncio.gather(*(one_of_them(request) for request in requests))


@pytest.mark.slow
def test_malformed_requests(fake: Start, figure: Figure) -> None:
    """10,000 malformed requests: no 5xx, no traceback, nobody left waiting, and it lives on."""
    chance = random.Random(SEED)
    statuses: Counter[str] = Counter()
    with fake(body_timeout_s=0.5, header_timeout_s=0.5, max_upload_bytes=100_000) as server:
        before, descriptors = server.resident_mib(), server.descriptors()
        for _ in range(0, MALFORMED, 1000):
            requests = [malformed(chance) for _ in range(1000)]
            answers = uvloop.run(converse_with_many(server, requests))
            for request, answer in zip(requests, answers, strict=True):
                status = answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else ""
                statuses[status or "none"] += 1
                assert answer == b"" or status.isdigit(), (request[:500], answer[:200])
                assert not status.startswith("5"), (request[:900], answer[:500])
                assert b"Traceback" not in answer
        growth = server.resident_mib() - before
        figure(f"{dict(sorted(statuses.items()))}; memory grew by {growth:.1f} MiB")
        assert growth < 32
        assert one(server.url, post(make_image())).status == 200
        give_up = time.monotonic() + 10
        while server.descriptors() > descriptors + 1 and time.monotonic() < give_up:
            time.sleep(0.1)
        assert server.descriptors() <= descriptors + 1
        assert "Traceback" not in server.log.read_text()


def test_many_pipelined_requests(fake: Start, figure: Figure) -> None:
    """A flood of pipelined requests is answered as far as is fair, in bounded memory."""
    with fake() as server:
        one(server.url, post(make_image()))
        before = server.resident_mib()
        answers = b""
        for _ in range(10):
            answers = converse(server, get("/livez") * 20_000)
        growth = server.resident_mib() - before
        figure(f"{answers.count(b'HTTP/1.1 200')} answered, memory grew by {growth:.1f} MiB")
        assert converse(server, get("/livez") * 20).count(b"HTTP/1.1 200") == 20
        assert 20 < answers.count(b"HTTP/1.1 200") < 100
        assert growth < 16


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (
            b"POST /classify HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n",
            400,
        ),
        (
            b"POST /classify HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            400,
        ),
        (b"GET /livez HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: identity\r\n\r\n", 400),
        (
            b"GET /livez HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST /classify HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", 400),
        (
            b"POST /explain HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\naa\r\n",
            400,
        ),
        (b"CONNECT test:443 HTTP/1.1\r\nHost: test\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (post(make_image()).replace(b"Host: test", b"Host: a\r\nHost: b"), 400),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),
        (post(make_image()).replace(b"Host: test\r\n", b""), 400),
        (
            post(make_image())
            .replace(b"Host: test", b"Expect: 100-continue")
            .replace(b"1.1", b"1.0"),
            200,
        ),
        (b"GET http://test/livez HTTP/1.1\r\nHost: test\r\n\r\n", 200),
        (b"GET /livez HTTP/1.0\r\n\r\n", 200),
        (b"OPTIONS /classify HTTP/1.1\r\nHost: test\r\n\r\n", 405),
        (b"HEAD /livez HTTP/1.1\r\nHost: test\r\n\r\n", 200),
        (b"GET /livez HTTP/1.1\r\nHost: h\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", 431),
        (get("/livez?" + "a" * 1017), 200),
        (get("/livez?" + "a" * 1018), 414),
        (post(make_image(), "/classify?top_k=" + "0" * 1006 + "1"), 200),
        (post(make_image(), "/classify?top_k=" + "0" * 1008 + "1"), 414),
        (
            b"GET /livez HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            200,
        ),
    ],
)
def test_unusual_requests(fake: Start, request_: bytes, status: int) -> None:
    """Requests that are unusual or ambiguous get one plain answer."""
    with fake() as server:
        answer = converse(server, request_)
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        assert answer.count(b"HTTP/1.1 ") == 1
        if status >= 400:
            assert b"application/problem+json" in answer
        assert "Traceback" not in server.log.read_text()


def test_expect_continue(fake: Start) -> None:
    """A client that waits for 100 gets it where its body is wanted, else the refusal alone."""
    head = b"POST /classify HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: "
    with fake() as server:
        with dial(server.url) as client:
            client.sendall(head + b"%d\r\n\r\n" % len(make_image()))
            assert client.recv(4096).startswith(b"HTTP/1.1 100 ")
            client.sendall(make_image())
            assert read_answer(client).startswith(b"HTTP/1.1 200 ")
        with dial(server.url) as client:
            client.sendall(head + b"99999999\r\n\r\n")
            answer = read_answer(client)
            assert answer.startswith(b"HTTP/1.1 413 ")
            assert b"connection: close" in answer.lower()
