"""Promise 11, in pieces: how the network cuts a request changes nothing about what it says."""

import base64
import time
from collections.abc import Sequence
from contextlib import suppress

import pytest

from tests.fakes import make_image
from tests.faults.conftest import Start
from tests.faults.load import dial, get, post, read_answer
from tests.processes import Server

IMAGE = make_image()
FORM_TYPE = "multipart/form-data; boundary=b"
OFFER = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}  # as Java's client makes it
CHUNKED = (
    b"POST /classify HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(IMAGE), IMAGE)
)


def send(server: Server, pieces: Sequence[bytes], answers: int = 1) -> bytes:
    """Send one piece after the other; return what comes back until the end, or a silence.

    So many answers may each take their time, however slow this machine is; a surplus one may not.
    """
    with dial(server.url) as client:
        client.settimeout(20)
        answer = b""
        try:
            for piece in pieces:
                client.sendall(piece)
                time.sleep(0.01)
            while chunk := client.recv(65536):
                answer += chunk
                if len(statuses(answer)) >= answers:
                    client.settimeout(0.5)
        except (ConnectionError, TimeoutError):
            pass
        return answer


def statuses(answer: bytes) -> list[int]:
    """Return the statuses of the answers, in order."""
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize("request_", [post(IMAGE, **OFFER), CHUNKED], ids=["length", "chunks"])
def test_offer_of_another_protocol(fake: Start, request_: bytes) -> None:
    """A POST that offers an upgrade is served as HTTP/1.1, wherever its head is cut."""
    head = request_.index(b"\r\n\r\n") + 4
    with fake() as server:
        for cut in (*range(head - 4, head + 2), request_.index(b"grade: h2c"), len(request_)):
            answer = send(server, [request_[:cut], request_[cut:]])
            assert statuses(answer) == [200], cut
            assert b"connection: close" in answer.lower()
        assert statuses(send(server, [b"\r\n\r\n" + request_])) == [200]
        assert statuses(send(server, [get("/livez") + request_], 2)) == [200, 200]
        assert statuses(send(server, [request_ + get("/livez")])) == [200]


def test_what_follows_an_offer_is_no_body(fake: Start) -> None:
    """The request that makes an offer is the connection's last; the next one's body is not its."""
    document = b'{"image": "%b"}' % base64.b64encode(IMAGE)
    offer = post(document, Content_Type="application/json", **OFFER)
    with fake() as server:
        assert statuses(send(server, [offer + post(b"no JSON")])) == [200]


def test_bodies_are_no_heads(fake: Start) -> None:
    """Nothing inside a body is read as a header, or as a request, wherever the head is cut."""
    smuggled = get("/model")
    second = post(smuggled)
    gap = b" " * (len(second) - len(smuggled))
    body = b"--b\r\nUpgrade" + gap + b": x\r\n\r\n" + IMAGE + b"\r\n--b--\r\n"
    first = post(body, Content_Type=FORM_TYPE)
    head = first.index(b"\r\n\r\n") + 4
    with fake() as server:
        for cut in range(head - 4, head + 1):
            answer = send(server, [first[:cut], first[cut:] + second], 2)
            assert statuses(answer) == [400, 415], cut


@pytest.mark.parametrize("path", ["/classify", "/classify/batch"])
@pytest.mark.parametrize(
    "bad",
    [
        b"GARBAGE\r\n\r\n",
        b"GET http://host HTTP/1.1\r\nHost: h\r\n\r\n",
        b"CONNECT a:443 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: identity\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n",
    ],
)
def test_what_came_before_is_answered(fake: Start, path: str, bad: bytes) -> None:
    """A request that cannot be read takes none of those before it along."""
    form = b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\n' + IMAGE + b"\r\n--b--\r\n"
    good = post(IMAGE) if path == "/classify" else post(form, path, Content_Type=FORM_TYPE)
    with fake(batch_ms=50) as server:
        answer = send(server, [good + good + bad], 2)
        assert statuses(answer) == [200, 200]
        assert answer.lower().count(b"connection: close") == 1


def test_one_answer_to_a_request(fake: Start) -> None:
    """A body that goes wrong behind its request's answer gets no second one."""
    head = "{} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n{}\r\n5\r\nhello\r\n"
    with fake() as server:
        for line, status in (("POST /classify", 415), ("GET /livez", 200), ("PUT /classify", 405)):
            request = head.format(line, "Content-Type: text/plain\r\n").encode()
            assert statuses(send(server, [request, b"ZZ\r\n"])) == [status]


@pytest.mark.parametrize("waste", [b"1;a=%b\r\nx", b"0\r\nX: %b"], ids=["extension", "trailer"])
def test_bytes_beside_a_body(fake: Start, waste: bytes) -> None:
    """Behind a long body, too, extensions and trailers are no longer than headers may be."""
    body = IMAGE + bytes(100_000)
    head = b"POST /classify HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    with fake() as server:
        for size, count in ((60_000, 1), (100_000, 0)):
            chunks = b"%x\r\n%b\r\n" % (len(body), body) + waste % (b"a" * size)
            ends = b"\r\n0\r\n\r\n" if waste.startswith(b"1") else b"\r\n\r\n"
            with dial(server.url) as client:
                client.settimeout(5)  # the body's own time is 30 s
                answer = b""
                with suppress(ConnectionError):  # refused unread
                    client.sendall(head + chunks + (ends if count else b""))
                    answer = read_answer(client)
                assert statuses(answer) == [200] * count


def test_headers_mean_the_same(fake: Start) -> None:
    """Spaces behind a value are none of it, and a trailer is no header, in one piece or in two."""
    spaced = post(IMAGE, X_Request_ID="abc \t", X_Request_Timeout_Ms="5000 ")
    chunks = (
        b"POST /classify HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n"
    )
    trailed = chunks % (len(IMAGE), IMAGE) + b"X-Request-ID: no\r\nX-Request-Timeout-Ms: no\r\n\r\n"
    with fake() as server:
        for pieces in ([spaced], [spaced[:40], spaced[40:]]):
            answer = send(server, pieces)
            assert statuses(answer) == [200]
            assert b"x-request-id: abc\r\n" in answer
        for pieces in ([trailed], [trailed[:40], trailed[40:]]):
            answer = send(server, pieces)
            assert statuses(answer) == [200]
            assert b"x-request-id: no\r\n" not in answer
        closing = post(IMAGE, Proxy_Connection="close")  # an old name of Connection
        for pieces in ([closing], [closing[:40], closing[40:]]):
            assert b"connection: close" in send(server, pieces).lower()
        for path in (b"/classify", b"/classify?detour"):
            odd = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Type: \xa0application/json\r\n" % path
            assert statuses(send(server, [odd + b"Content-Length: 2\r\n\r\n{}"])) == [415]
