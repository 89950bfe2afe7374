"""HTTP/1.1 as bytes, where no framework stands between us and the socket."""

from collections.abc import Iterable
from http import HTTPStatus

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii")
    for status in HTTPStatus
}


def head(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return an answer's status line and these headers, to which more may be added."""
    return _STATUS_LINES[status] + b"".join([b"%b: %b\r\n" % header for header in headers])
