"""The head of the usual request, read in one go; whatever else there is goes through the parser.

The parser calls back for the beginning, the target, each header and the end of a head. For a head
as nearly all clients send it, complete in the first read, one regular expression is enough. It
takes a part of what RFC 9112 allows and nothing that could be read in two ways, so that the parser,
which never sees such a request, would have found the same.
"""

import re
from typing import NamedTuple

# Sections 3 and 5: one target without anything to decode, fields of visible ASCII on a line each.
_HEAD = re.compile(
    rb"POST ([!-~]{1,1024}) HTTP/1\.1\r\n"
    rb"((?:[A-Za-z0-9_-]++:[\t -~]*+\r\n){1,64})\r\n"
)
_FIELD = re.compile(rb"([A-Za-z0-9_-]++):[\t ]*+([\t -~]*)\r\n")
_LENGTH = re.compile(rb"[0-9]{1,10}")
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
    if len(fields) != len(lines) or b"host" not in fields or not _FRAMING.isdisjoint(fields):
        return None
    if fields.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    length = fields.get(b"content-length", b"")
    if not _LENGTH.fullmatch(length):
        return None
    return Head(found[1], fields, found.end(), int(length))
