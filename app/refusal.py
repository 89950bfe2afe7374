"""A refusal at the door in as few steps as there can be: under overload it is most of the work."""

import asyncio
from functools import lru_cache
from typing import ClassVar

from app.access import answer, report
from app.admission import Refusal
from app.errors import PROBLEM_JSON, QueueFull, kind_of
from app.service import Service
from app.trace import new_trace

_NO_BYTES = b""
_KIND = kind_of(QueueFull.title)


class Answered:
    """Stands, in the place of uvicorn's RequestResponseCycle, for a request that is done with."""

    message_event: ClassVar[asyncio.Event] = asyncio.Event()  # nobody waits for it
    response_complete = True
    keep_alive = True


ANSWERED = Answered()


def refuse(
    service: Service,
    refusal: Refusal,
    path: str,
    fields: dict[bytes, bytes],
    default_headers: list[tuple[bytes, bytes]],
) -> bytes:
    """Return the whole answer to a `POST` that the door refuses, and report it."""
    trace = new_trace(
        fields.get(b"x-request-id", _NO_BYTES).decode("latin-1"),
        fields.get(b"traceparent", _NO_BYTES).decode("latin-1"),
    )
    trace.problem, trace.reason = _KIND, refusal.reason
    headers, body = _constant(refusal)
    whole = answer(QueueFull.status, (*default_headers, *headers), body, trace, closing=False)
    report(service.metrics, trace, "POST", path, QueueFull.status)
    return whole


@lru_cache(maxsize=64)
def _constant(refusal: Refusal) -> tuple[tuple[tuple[bytes, bytes], ...], bytes]:
    """Return the headers and the body that say why."""
    problem = QueueFull(*refusal)
    retry_after = problem.headers["Retry-After"].encode("ascii")
    return ((b"content-type", PROBLEM_JSON), (b"retry-after", retry_after)), problem.json()
