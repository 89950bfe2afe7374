"""A refusal at the door in as few steps as there can be: under overload it is most of the work."""

import asyncio
from typing import ClassVar

from app.access import answer, report
from app.errors import PROBLEM_JSON, QueueFull
from app.service import Service
from app.trace import new_trace

_NO_BYTES = b""


class Answered:
    """Stands, in the place of uvicorn's RequestResponseCycle, for a request that is done with."""

    message_event: ClassVar[asyncio.Event] = asyncio.Event()  # nobody waits for it
    response_complete = True
    keep_alive = True


ANSWERED = Answered()


def refuse(
    service: Service,
    full: QueueFull,
    path: str,
    fields: dict[bytes, bytes],
    default_headers: list[tuple[bytes, bytes]],
) -> bytes:
    """Return the whole answer to a `POST` that the door refuses, and report it."""
    trace = new_trace(
        fields.get(b"x-request-id", _NO_BYTES).decode("latin-1"),
        fields.get(b"traceparent", _NO_BYTES).decode("latin-1"),
    )
    trace.problem, trace.reason = full.kind, full.reason
    headers = (
        *default_headers,
        (b"content-type", PROBLEM_JSON),
        (b"retry-after", full.headers["Retry-After"].encode("ascii")),
    )
    whole = answer(full.status, headers, full.json(), trace, closing=False)
    report(service.metrics, trace, "POST", path, full.status)
    return whole
