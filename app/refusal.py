"""A refusal at the door in as few steps as there can be: under overload it is most of the work.

Beside inference hardly any of our code is in the core's cache, so that a step costs three times
what it does alone: what is the same for all refusals is put together once.
"""

import asyncio
import logging
import time
from functools import lru_cache
from typing import ClassVar, NamedTuple

from app.access import constant_head
from app.admission import Refusal
from app.errors import PROBLEM_JSON, QueueFull, kind_of
from app.logs import write_request
from app.service import Service
from app.trace import name_of, new_trace

logger = logging.getLogger(__name__)

_KIND = kind_of(QueueFull.title)
_STATUS = str(QueueFull.status)


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
    """Return the whole answer to a `POST` that the door refuses, and report it.

    It is what `access.answer` and `access.report` would make of it.
    """
    started = time.perf_counter()
    request_id = name_of(fields.get(b"x-request-id", b"").decode("latin-1"))
    start, end, members = _constant(refusal, path, *default_headers)
    total_ms = f"{(time.perf_counter() - started) * 1000:.2f}"
    timing, members = f"total;dur={total_ms}", members + total_ms
    if b"traceparent" in fields:
        trace = new_trace(request_id, fields[b"traceparent"].decode("latin-1"))
        if trace.parent is not None:
            timing += f"\r\ntraceparent: {trace.traceparent}"
            members += f',"trace_id":"{trace.trace_id}","span_id":"{trace.span_id}"'
    service.metrics.refuse(path, _STATUS, _KIND, refusal.reason)
    write_request(logger, logging.INFO, request_id, members)
    return f"{start}{request_id}\r\nserver-timing: {timing}{end}".encode("latin-1")


class _Constant(NamedTuple):
    """What all refusals of a kind share."""

    start: str  # of the answer, to where its ID comes
    end: str  # from behind its time
    members: str  # of the log's line, to where its time comes


@lru_cache(maxsize=64)
def _constant(refusal: Refusal, path: str, *default_headers: tuple[bytes, bytes]) -> _Constant:
    problem = QueueFull(*refusal)
    body = problem.json().decode()
    retry_after = problem.headers["Retry-After"].encode("ascii")
    headers = ((b"content-type", PROBLEM_JSON), (b"retry-after", retry_after))
    head = constant_head(QueueFull.status, (*default_headers, *headers)).decode("latin-1")
    members = (
        f'"method":"POST","route":"{path}","status":{_STATUS},"outcome":"{_KIND}",'
        '"received_bytes":0,"total_ms":'
    )
    start = f"{head}content-length: {len(body)}\r\nx-request-id: "
    return _Constant(start, f"\r\n\r\n{body}", members)
