"""HTTP/1.1 on one connection: uvicorn's, with the deadlines and limits that it lacks.

A client that trickles is cut off: the headers of a request must come within `header_timeout_s`, its
body within `body_timeout_s` (the application answers 408; a body nobody reads is cut off here).
"""

import asyncio
import json
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.access import REQUEST_ID_HEADER, SECURITY_HEADERS, report
from app.errors import kind_of, problem_body
from app.metrics import Metrics
from app.settings import Settings
from app.trace import new_trace

# What a request may hold besides its body: nginx's and most balancers' own limit for headers.
MAX_HEADER_BYTES = 64 * 1024
# A chunk of one byte comes with five bytes of framing; extensions and trailers are not for us.
FRAMING_PER_BODY_BYTE = 16
# After the body's deadline, time for the application's own 408 before the connection is cut.
LAST_WORD_S = 1.0


class BoundedProtocol(HttpToolsProtocol):
    """One connection; `bounded(settings)` makes the class that uvicorn instantiates."""

    settings: ClassVar[Settings]
    metrics: ClassVar[Metrics]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._in_headers = True  # or between requests
        self._allowance = MAX_HEADER_BYTES  # bytes that may still come for this message

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Start the clock: a client that connects has a request to send."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(503, "Too many connections", "This replica has no connection to spare.")
            return
        self._start_clock(self.settings.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, unless the message holds more besides its body than it may."""
        if self._deadline is None and self._in_headers:
            self._start_clock(self.settings.header_timeout_s)  # the next request on this connection
        self._allowance -= len(data)
        super().data_received(data)
        if self._allowance < 0 and not self.transport.is_closing():
            if self._in_headers:
                self._refuse(431, "Headers too large", f"At most {MAX_HEADER_BYTES} bytes.")
            else:
                self.transport.close()

    def on_message_begin(self) -> None:
        """Grant the new message its headers."""
        super().on_message_begin()
        self._in_headers = True
        self._allowance = max(self._allowance, MAX_HEADER_BYTES)

    def on_headers_complete(self) -> None:
        """Give the body its own time."""
        self._in_headers = False
        self._start_clock(self.settings.body_timeout_s + LAST_WORD_S)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Grant the body its framing; its own size is the application's to bound."""
        self._allowance += len(body) * FRAMING_PER_BODY_BYTE
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the clock until the next request begins."""
        self._stop_clock()
        self._in_headers = True
        self._allowance = MAX_HEADER_BYTES
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP at all."""
        self._refuse(400, "Bad request", msg)

    def _start_clock(self, seconds: float) -> None:
        self._stop_clock()
        self._deadline = self.loop.call_later(seconds, self._on_deadline)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if self.flow.read_paused:
            # We made the client wait, not it us: a pipelined request behind a slow one.
            self._start_clock(self.settings.body_timeout_s)
        elif self._in_headers and (self.cycle is None or self.cycle.response_complete):
            self._refuse(408, "Request timeout", "The headers did not arrive in time.")
        else:
            self.transport.close()

    def _refuse(self, status: int, title: str, detail: str) -> None:
        """Answer below the application and close."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # An answer is under way: a second one inside it would be read as a part of it.
            self.cycle.keep_alive = False
            self.transport.close()
            return
        trace = new_trace()
        trace.problem = kind_of(title)
        body = json.dumps(problem_body(status, title, detail)).encode()
        fields = {
            "Content-Type": "application/problem+json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **SECURITY_HEADERS,
            REQUEST_ID_HEADER: trace.request_id,
            "Server-Timing": trace.server_timing(trace.started),
        }
        report(self.metrics, trace, "-", "unparsed", status)
        lines = [f"HTTP/1.1 {status} {title}", *(f"{k}: {v}" for k, v in fields.items()), "", ""]
        self.transport.write("\r\n".join(lines).encode("ascii") + body)
        self.transport.close()


def bounded(settings: Settings, metrics: Metrics) -> type[BoundedProtocol]:
    """Return the protocol class for these settings; uvicorn instantiates it by itself."""
    members = {"settings": settings, "metrics": metrics}
    return type("ServedProtocol", (BoundedProtocol,), members)
