"""Which `POST /classify` is of the usual kind, to be served without ASGI, or refused at once."""

import re
from collections.abc import Callable

from starlette.datastructures import Headers

from app.clock import Clock
from app.express import PATH, Express
from app.refusal import ANSWERED, Answered, refuse
from app.service import Service
from app.uploads import FORM, JSON, is_longer

# A number that needs no checking but against the model's classes, and no long answer.
_TARGET = re.compile(rb"/classify(?:\?top_k=([1-9][0-9]?))?")
_JSON = JSON.encode("ascii")
_FORM = FORM.encode("ascii")
# Each changes how a request is read or answered, by rules that the framework's way knows. In
# chunks a body may come as a million pieces: that way makes the client wait for them.
_UNUSUAL = frozenset({b"content-encoding", b"expect", b"origin", b"transfer-encoding", b"upgrade"})
# And so it does with a longer form, which would here be parsed 32 reads in a row.
_LONGEST_FORM_BYTES = 1 << 20


def express(
    service: Service,
    target: bytes,
    fields: dict[bytes, bytes],
    default_headers: list[tuple[bytes, bytes]],
    write: Callable[[bytes], None],
    clock: Clock,
    *,
    keep_alive: bool = True,
) -> Express | Answered | None:
    """Return what serves a `POST` to `target`, or None if there is anything unusual about it.

    `fields` are its headers, names in lower case; `default_headers` go with the answer, whose bytes
    are given to `write`. A request that the door refuses has its answer at once. `clock` keeps the
    deadline; `keep_alive` says whether the connection stays open afterwards.
    """
    found = _TARGET.fullmatch(target)
    if found is None or not _UNUSUAL.isdisjoint(fields):
        return None
    if service.keys is not None and not service.keys.allow(Headers(raw=list(fields.items()))):
        return None
    if not service.classifier.is_ready:
        return None
    if keep_alive and service.spans is None and not service.draining:
        refusal = service.admission.refusal()
        if refusal is not None:
            write(refuse(service, refusal, PATH, fields, default_headers))
            return ANSWERED
    media_type = fields.get(b"content-type", b"").lower()
    if media_type.startswith(_JSON):
        return None
    if media_type.startswith(_FORM):
        declared = fields.get(b"content-length", b"").decode("latin-1")
        if is_longer(declared, _LONGEST_FORM_BYTES):
            return None
    top_k = None if found[1] is None else int(found[1])
    return Express(service, fields, top_k, default_headers, write, clock, keep_alive)
