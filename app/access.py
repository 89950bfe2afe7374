"""Every answer's way out: its headers, its log line and its place in the metrics.

The outermost layer, so that refusals and bugs are seen like everything else. Nothing of a user's
image, file name or key is written anywhere: routes are logged as their templates, never as paths,
and queries not at all.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from functools import lru_cache
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import CLIENT_GONE, GONE, Fault, NotReady
from app.logs import write_request
from app.metrics import Metrics
from app.routes.problems import answer_to
from app.spans import Spans
from app.trace import Trace, begin

# Unless its route says otherwise an answer is data, no page: nothing in it may run, be framed or
# be sniffed.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
REQUEST_ID_HEADER = "X-Request-ID"
UNMATCHED = "unmatched"  # the route of a request for something that is not there
PAGE = "page"  # GET /, where POST / classifies
PREFLIGHT = "preflight"  # a browser's question before a page's request
_SECURITY = [
    (name.lower().encode("ascii"), value.encode("ascii"))
    for name, value in SECURITY_HEADERS.items()
]
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii")
    for status in HTTPStatus
}

logger = logging.getLogger(__name__)


class Access:
    """ASGI middleware around all the others."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: Iterable[BaseRoute],
        spans: Spans | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._spans = spans
        known = [route for route in routes if isinstance(route, Route)]
        for route in known:
            if "POST" in (route.methods or ()):  # all of them classify
                metrics.expect(route.path)
        self._paths = frozenset(route.path for route in known if "{" not in route.path)
        self._templates = [route for route in known if "{" in route.path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and report it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        trace = begin(headers.get("x-request-id", ""), headers.get("traceparent", ""))
        trace.is_traced = trace.is_traced or self._spans is not None
        status = 0

        async def receive_counted() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                trace.received_bytes += len(message.get("body", b""))
            return message

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = list(message["headers"])
                dress(message["headers"], trace, closing=scope["app"].state.service.draining)
            await send(message)

        try:
            await self._app(scope, receive_counted, send_marked)
        except asyncio.CancelledError:
            if not scope["app"].state.service.draining:
                raise
            # By the server, since the grace time is over; an answer that has begun just ends.
            if not status:
                stopped = NotReady("This replica had to stop before the request was done.")
                await answer_to(scope, stopped)(scope, receive, send_marked)
        except Exception:
            logger.exception("a bug, answered with 500")
            if status:
                raise  # the answer is under way: the server cuts the connection
            await answer_to(scope, Fault())(scope, receive, send_marked)
        finally:
            if not status:
                trace.problem = GONE
            method, route, status = scope["method"], self._route(scope), status or CLIENT_GONE
            report(self._metrics, trace, method, route, status)
            if self._spans is not None:
                self._spans.export(trace, method, route, status)

    def _route(self, scope: Scope) -> str:
        """Return the template that the request met, or would have met but for the door.

        PAGE and PREFLIGHT are apart: they would mix with what the route is for.
        """
        if scope["method"] == "OPTIONS" and _asks_for_a_method(scope):
            return PREFLIGHT
        if scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):
            return PAGE
        route = scope.get("route")
        if isinstance(route, Route):
            return route.path
        if scope["path"] in self._paths:
            return str(scope["path"])
        for template in self._templates:
            if template.matches(scope)[0] is not Match.NONE:
                return template.path
        return UNMATCHED


def _asks_for_a_method(scope: Scope) -> bool:
    return any(name == b"access-control-request-method" for name, _ in scope["headers"])


def report(metrics: Metrics, trace: Trace, method: str, route: str, status: int) -> None:
    """Count one answered request and write its line."""
    seconds = time.perf_counter() - trace.started
    metrics.finish_request(trace, route, status, seconds)
    level = logging.ERROR if status == 500 else logging.INFO  # the others are no fault of ours
    # Names and numbers of ours, and hex digits of traces: JSON has nothing to escape in them.
    members = (
        f'"method":"{method}","route":"{route}","status":{status},'
        f'"outcome":"{trace.problem or "ok"}","received_bytes":{trace.received_bytes},'
        f'"total_ms":{seconds * 1000:.2f}'
    )
    if trace.stages is not None:
        decode_s, queue_s, infer_s = (
            trace.stages.decode_s,
            trace.stages.queue_s,
            trace.stages.infer_s,
        )
        members += (
            f',"images":{trace.images},"decode_ms":{decode_s * 1000:.2f},'
            f'"queue_ms":{queue_s * 1000:.2f},"infer_ms":{infer_s * 1000:.2f}'
        )
    if trace.is_traced:
        members += f',"trace_id":"{trace.trace_id}","span_id":"{trace.span_id}"'
    write_request(logger, level, trace.request_id, members)


def dress(headers: list[tuple[bytes, bytes]], trace: Trace, *, closing: bool) -> None:
    """Add to an answer's headers those that every answer has; names are in lower case."""
    names = {name for name, _ in headers}
    headers += [(name, value) for name, value in _SECURITY if name not in names]
    headers.append((b"x-request-id", trace.request_id.encode("ascii")))
    headers.append((b"server-timing", trace.server_timing(time.perf_counter()).encode("ascii")))
    if trace.parent is not None:
        headers.append((b"traceparent", trace.traceparent.encode("ascii")))
    if closing and b"connection" not in names:
        headers.append((b"connection", b"close"))  # the client's next request goes elsewhere


def answer(
    status: int,
    headers: tuple[tuple[bytes, bytes], ...],
    body: bytes,
    trace: Trace,
    *,
    closing: bool,
) -> bytes:
    """Return a whole answer as it goes over the wire, dressed as `dress` does."""
    timing = trace.server_timing(time.perf_counter())
    lines = (
        f"content-length: {len(body)}\r\n"
        f"x-request-id: {trace.request_id}\r\nserver-timing: {timing}\r\n"
    )
    if trace.parent is not None:
        lines += f"traceparent: {trace.traceparent}\r\n"
    if closing:
        lines += "connection: close\r\n"
    return b"".join((constant_head(status, headers), lines.encode("ascii"), b"\r\n", body))


@lru_cache(maxsize=64)
def constant_head(status: int, headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """Return an answer's status line, these headers and those of `SECURITY_HEADERS`."""
    names = {name for name, _ in headers}
    lines = [*headers, *(line for line in _SECURITY if line[0] not in names)]
    return _STATUS_LINES[status] + b"".join([b"%b: %b\r\n" % line for line in lines])
