"""The head of a request: the usual one read in one go, and what no head may be.

The parser calls back for the beginning, the target, each header and the end of a head. For a head
as nearly all clients send it, complete in the first read, one regular expression is enough. It
takes a part of what RFC 9112 allows and nothing that could be read in two ways, so that the parser,
which never sees such a request, would have found the same.
"""

import re
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

# What a request may hold besides its body: nginx's and most balancers' own limit for headers.
MAX_HEADER_BYTES = 64 * 1024
# Each costs a hundred times its bytes in memory; clients and balancers together send some thirty.
MAX_HEADERS = 100
# The longest that anyone needs is that of a model with a long name. Of a query of nothing but
# parameters each takes the framework microseconds and a hundred times its bytes.
MAX_TARGET_BYTES = 1024
# Sections 3 and 5: one target without anything to decode, fields of visible ASCII on a line each.
_HEAD = re.compile(
    rb"POST ([!-~]{1,%d}) HTTP/1\.1\r\n"
    rb"((?:[A-Za-z0-9_-]++:[\t -~]*+\r\n){1,64})\r\n" % MAX_TARGET_BYTES
)
_FIELD = re.compile(rb"([A-Za-z0-9_-]++):[\t ]*+([\t -~]*)\r\n")
_LENGTH = re.compile(rb"[0-9]{1,10}")
# RFC 3986, 3.2.2 and 3.2.3, an address in brackets by its signs alone; it may be empty.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]*+|\[[A-Za-z0-9.:_~%-]++\])(?::[0-9]*+)?")
# A longer one is none of the usual kind.
_MAX_BYTES = 16 * 1024
# What changes how the message or the connection is read (RFC 9110, 7.8 and 10.1.1; RFC 9112, 6.1).
_FRAMING = frozenset(
    {b"transfer-encoding", b"expect", b"upgrade", b"http2-settings", b"proxy-connection"}
)


class Head(NamedTuple):
    """The head of a `POST` over a connection that stays open, its body of known length."""

    target: bytes
    fields: dict[bytes, bytes]  # names in lower case, each came once
    size: int  # bytes of the head itself
    body_size: int  # bytes of the body after it


def read_head(data: bytes) -> Head | None:
    """Return the head that `data` begins with, or None if it is not whole or not of that kind."""
    found = _HEAD.match(data, 0, _MAX_BYTES)
    if found is None:
        return None
    lines = _FIELD.findall(data, *found.span(2))
    fields = {name.lower(): value.rstrip(b" \t") for name, value in lines}
    if len(fields) != len(lines) or not _FRAMING.isdisjoint(fields):
        return None
    if not _HOST.fullmatch(fields.get(b"host", b" ")):
        return None
    if fields.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    length = fields.get(b"content-length", b"")
    if not _LENGTH.fullmatch(length):
        return None
    return Head(found[1], fields, found.end(), int(length))


class Objection(NamedTuple):
    """Why a request is refused below the application."""

    status: int
    title: str
    detail: str


TOO_MANY_HEADERS = Objection(
    431, "Headers too large", f"At most {MAX_HEADERS}, of {MAX_HEADER_BYTES} bytes."
)
_LONG_TARGET = Objection(414, "URI Too Long", f"At most {MAX_TARGET_BYTES} bytes.")
_CODING = Objection(400, "Bad request", "The only Transfer-Encoding taken is chunked.")
_VERSION = Objection(400, "Bad request", "HTTP/1.1 is taken, and HTTP/1.0.")
_NO_HOST = Objection(400, "Bad request", "There is no Host.")
_TWO_HOSTS = Objection(400, "Bad request", "There are two Hosts.")
_NO_NAME = Objection(400, "Bad request", "The Host is no name of a host.")


def objection_to(
    target: bytes, headers: Sequence[tuple[bytes, bytes]], version: str
) -> Objection | None:
    """Return what speaks against a head that could be parsed, of HTTP `version`.

    Names of `headers` are in lower case.
    """
    if version not in ("1.1", "1.0"):
        return _VERSION
    if len(target) > MAX_TARGET_BYTES:
        return _LONG_TARGET
    size = len(target) + sum(map(len, chain.from_iterable(headers)))
    if size + 4 * len(headers) > MAX_HEADER_BYTES:  # all of it in one read
        return TOO_MANY_HEADERS
    if any(n == b"transfer-encoding" and v.lower() != b"chunked" for n, v in headers):
        return _CODING  # one that is none of ours
    hosts = [value for name, value in headers if name == b"host"]  # RFC 9112, 3.2
    if len(hosts) > 1:
        return _TWO_HOSTS
    if version == "1.1" and not hosts:
        return _NO_HOST
    return None if all(map(_HOST.fullmatch, hosts)) else _NO_NAME
