"""The head of the usual request: read as the parser reads it, or not at all."""

from typing import Any

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.head import objection_to, read_head

NAMES = st.sampled_from(
    [
        "Host",
        "content-type",
        "X-Request-ID",
        "Accept",
        "Content-Length",
        "CONNECTION",
        "Cookie",
        "Transfer-Encoding",
        "Expect",
        "Upgrade",
        "a b",
        "",
        "X:Y",
        "xé",
    ]
)
VALUES = st.sampled_from(["", "a", "0", "7", "00", "keep-alive", "close", "chunked", "+1", "1,1"])
SPACES = st.sampled_from(["", " ", "\t ", "  "])
ENDS = st.sampled_from(["\r\n"] * 8 + ["\n", "\r", "\r\n ", "\x00\r\n"])
LINES = st.tuples(NAMES, st.sampled_from([":"] * 8 + [" :", "", "::"]), SPACES, VALUES, SPACES)
STARTS = st.sampled_from(
    ["POST /classify HTTP/1.1\r\n"] * 6
    + ["POST /classify?top_k=1 HTTP/1.1\r\n", "POST  /classify HTTP/1.1\r\n"]
    + ["POST /classify HTTP/1.0\r\n", "post /classify HTTP/1.1\r\n", "GET / HTTP/1.1\r\n"]
    + ["\r\nPOST / HTTP/1.1\r\n", "POST /\x7f HTTP/1.1\r\n", "POST / HTTP/1.1\n"]
)


class Parsed:
    """What httptools makes of a message."""

    def __init__(self, data: bytes) -> None:
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.bodies: list[bytes] = [b""]
        self.messages = 0
        self.parser: Any = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        """Collect the targets of all messages."""
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect the first message's headers."""
        if not self.messages:
            self.headers.append((name.lower(), value.strip(b" \t")))

    def on_body(self, body: bytes) -> None:
        """Collect the bodies."""
        self.bodies[-1] += body

    def on_message_complete(self) -> None:
        """Go on to the next message."""
        self.messages += 1
        self.bodies.append(b"")


@given(start=STARTS, lines=st.lists(st.tuples(LINES, ENDS), max_size=6))
@example(start="POST / HTTP/1.1\r\n", lines=[(("Content-Length", ":", " ", "7", " "), "\r\n")])
@example(
    start="POST / HTTP/1.1\r\n",
    lines=[
        (("Content-Length", ":", " ", "7", ""), "\r\n"),
        (("Transfer-Encoding", ":", " ", "chunked", ""), "\r\n"),
    ],
)
def test_never_another_reading_than_the_parsers(
    start: str, lines: list[tuple[tuple[str, ...], str]]
) -> None:
    """What is read as a usual head, the parser reads alike: target, headers, end of the body."""
    head = start + "".join("".join(line) + end for line, end in lines) + "\r\n"
    data = head.encode("latin-1")
    found = read_head(data)
    if found is None:
        return
    assert found.size == len(data)
    body = b"b" * found.body_size
    parsed = Parsed(data + body + b"POST /next HTTP/1.1\r\nContent-Length: 1\r\n\r\nn")
    assert parsed.target == found.target + b"/next"
    assert parsed.headers == list(found.fields.items())
    assert parsed.bodies == [body, b"n", b""]
    assert parsed.parser.should_keep_alive()


def test_usual_head() -> None:
    """A head as clients send it is read: names in lower case, values without the space around."""
    head = b"POST /classify HTTP/1.1\r\nHost: a:80\r\nContent-Length:12 \r\nX-Empty:\r\n\r\n"
    found = read_head(head + b"body")
    assert found is not None
    assert found.target == b"/classify"
    assert found.fields == {b"host": b"a:80", b"content-length": b"12", b"x-empty": b""}
    assert (found.size, found.body_size) == (len(head), 12)


def test_host_of_a_usual_head() -> None:
    """What is no host is left to the parser, and refused behind it."""
    for host in (*HOSTS, *NO_HOSTS):
        found = read_head(b"POST / HTTP/1.1\r\nHost: %s\r\nContent-Length: 1\r\n\r\n" % host)
        assert (found is None) == (host in NO_HOSTS)


def test_half_a_head() -> None:
    """A head that is not whole is left to the parser, wherever it was cut."""
    head = b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\n\r\n"
    assert all(read_head(head[:end]) is None for end in range(len(head)))


HOST = (b"host", b"here")
HOSTS = (
    b"",
    b"a-b.c_d:80",
    b"a:",
    b"[::1]:8000",
    b"[fe80::1%25eth0]",
    b"10.0.0.1",
    b"xn--bcher-kva.de",
)
NO_HOSTS = (
    b"a b",
    b"a/b",
    b"a:b",
    b"::1",
    b"me@here",
    b"[::1",
    b"a?",
    b"a\xe9",
    b"http://a",
    b"a:1:2",
)


@pytest.mark.parametrize(
    ("target", "headers", "version", "status"),
    [
        (b"/" + b"a" * 1023, [HOST], "1.1", None),
        (b"/" + b"a" * 1024, [HOST], "1.1", 414),
        (b"/", [HOST, (b"x", b"a" * 65_518)], "1.1", None),
        (b"/", [HOST, (b"x", b"a" * 65_519)], "1.1", 431),
        (b"/", [HOST, (b"transfer-encoding", b"Chunked")], "1.1", None),
        (b"/", [HOST, (b"transfer-encoding", b"gzip, chunked")], "1.1", 400),
        (b"/", [], "1.1", 400),
        (b"/", [], "1.0", None),
        (b"/", [HOST, HOST], "1.0", 400),
        *((b"/", [(b"host", host)], "1.1", None) for host in HOSTS),
        *((b"/", [(b"host", host)], "1.1", 400) for host in NO_HOSTS),
        (b"/", [(b"host", b"a b")], "1.0", 400),
    ],
)
def test_what_no_head_may_be(
    target: bytes, headers: list[tuple[bytes, bytes]], version: str, status: int | None
) -> None:
    """Target and headers have limits; one coding is taken, and one host, which HTTP/1.1 demands."""
    found = objection_to(target, headers, version)
    assert (found and found.status) == status
