"""HTTP/1.1 as bytes, where no framework stands between us and the socket."""

import re
from collections.abc import Iterable
from http import HTTPStatus

_UPGRADE = re.compile(rb"(?i)\r\nUpgrade[ \t]*:")
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii")
    for status in HTTPStatus
}


def head(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return an answer's status line and these headers, to which more may be added."""
    return _STATUS_LINES[status] + b"".join([b"%b: %b\r\n" % header for header in headers])


def without_upgrade(data: bytes) -> bytes:
    """Hide the offer of another protocol: the parser would take the body for that protocol's.

    Java's HTTP client offers HTTP/2 with its first request, and a server may go on without
    (RFC 9110, section 7.8). Only what comes together with its headers is looked at.
    """
    end = data.find(b"\r\n\r\n")
    found = _UPGRADE.search(data, 0, end + 2 if end >= 0 else len(data))
    if found is None:
        return data
    return data[: found.start()] + b"\r\nX-Offer:" + data[found.end() :]
