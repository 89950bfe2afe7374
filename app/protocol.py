"""HTTP/1.1 on one connection: uvicorn's, with the deadlines and limits that it lacks.

A client that trickles is cut off: the headers of a request must come within `header_timeout_s`, its
body within `body_timeout_s` (the application answers 408; a body nobody reads is cut off here). A
client that sends more than it may reads its answer before the connection goes.
"""

import asyncio
import time
from types import SimpleNamespace
from typing import Any, ClassVar

import httptools
from fastapi import FastAPI
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.access import answer, report
from app.answers import PIECE_BYTES
from app.clock import Clock
from app.door import OPEN_PATHS
from app.errors import PROBLEM_JSON, BodyTimeout, NotReady, kind_of, problem_json
from app.express import Express
from app.farewell import Farewell, has_hung_up
from app.flow import Flow
from app.head import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    TOO_MANY_HEADERS,
    Objection,
    objection_to,
    read_head,
)
from app.metrics import UNPARSED
from app.refusal import Answered
from app.service import Service
from app.settings import Settings
from app.trace import new_trace
from app.turns import TURN_S, Backlog
from app.uploads import is_longer
from app.usual import express

# A chunk of one byte comes with five bytes of framing, six with zeros ahead; longer extensions and
# trailers are not for us.
FRAMING_PER_BODY_BYTE = 16
# After the body's deadline, time for the application's own 408 before the connection is cut.
LAST_WORD_S = 1.0
# Read at once, until the clock is looked at: of chunks of one byte, a thousand.
SLICE_BYTES = 8 * 1024
# Requests sent ahead of their answers. Clients that pipeline at all send a handful; each one that
# waits holds a few kB, and one read from the socket could bring thousands.
MAX_PIPELINED = 32
# Their bodies mean nothing (RFC 9110, 9.3.1), and no route takes them.
_BODILESS = frozenset({"GET", "HEAD"})
# How often a client is looked at that has sent more than it has answers to.
WATCH_S = 0.1
# Over the limit, so many connections may still ask whether the service is well, and soon: neither
# an orchestrator nor Prometheus shall take a full replica for a dead one.
MAX_PROBES = 16
PROBE_TIMEOUT_S = 1.0
FULL = Objection(503, "Too many connections", "This replica has no connection to spare.")
# Beyond those, so many connections may read their last answer in peace; while half of the places
# are free, more may.
MAX_FAREWELLS = 64
# When the listener has closed, time for the first request of a connection opened just before.
LAST_CALL_S = 0.5


class Stop(Exception):  # noqa: N818 - no error, but the end of a parsing
    """Ends the parsing, from one of the parser's callbacks."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection; `bounded(settings, app)` makes the class that uvicorn instantiates."""

    settings: ClassVar[Settings]
    application: ClassVar[FastAPI]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = Clock(self.loop)  # on what has begun to come, or on the next request
        self._patience = Clock(self.loop)  # on the request that is being served
        self._is_idle = False  # between requests
        self._writing = Clock(self.loop)  # on answers that the client does not read
        self._begun = False  # a message has begun to arrive and is not complete
        self._in_headers = True  # or between requests
        self._deaf = False  # what comes is no longer listened to
        self._body_bytes = 0  # of this message
        self._allowance = MAX_HEADER_BYTES  # bytes that may still come for this message
        self._fruitless = 0  # bytes since the last one of a body: extensions or trailers
        self._watch: asyncio.TimerHandle | None = None
        self._is_spare = False  # over the limit of connections: for probes only
        self._is_chunked = False  # the body that is arriving
        self._owed = 0  # bytes of this message's body that go past the parser
        self._express: Express | None = None  # the request that is served without ASGI
        self._before = self.cycle  # the request before the last
        self._answering = self.cycle  # the one whose answer is next; others may be sent ahead
        self._farewell: Farewell
        self._service: Service = self.application.state.service
        self._backlog = Backlog(self._service.turns, self._read_on)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Start the clock: a client that connects has a request to send."""
        self._farewell = Farewell(
            transport,
            self.loop,
            lambda: self._is_unread() and self._may_linger(),
        )
        transport.set_write_buffer_limits(PIECE_BYTES)
        super().connection_made(self._farewell)
        self.flow = Flow(self._farewell, self.pipeline, self._on_resume)
        # One that lingers is not seen to go until its time is up: it must not keep others out.
        taken = len(self.connections) - min(Farewell.lingering, MAX_FAREWELLS)
        excess = taken - self.settings.max_connections
        self._is_spare = excess > 0
        if excess > MAX_PROBES:
            self._begun = True  # the request will come, or is coming
            self._refuse(*FULL)
            return
        self._start_clock(PROBE_TIMEOUT_S if self._is_spare else self.settings.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks, and whatever is being done for the client."""
        self._farewell.end()
        if self._express is not None:
            self._express.hang_up()
        self._clock.end()
        self._patience.end()
        self._writing.end()
        self._backlog.take()
        super().connection_lost(exc)
        if self._answering is not None and not self._answering.response_complete:
            # uvicorn tells the last one that came only.
            self._answering.disconnected = True
            self._answering.message_event.set()

    def eof_received(self) -> None:
        """Close: half a connection is none. What is unsent has its time, as everywhere."""
        self._farewell.close()

    def data_received(self, data: bytes) -> None:
        """Parse what came, unless the message holds more besides its body than it may."""
        if self.transport.is_closing():
            self._farewell.discard(data)
            return
        if self._deaf:
            return
        if self._backlog or self._is_chunked:
            self._put_off(data)
            return
        if self._is_idle:
            if not data.strip(b"\r\n"):
                return  # empty lines are no request (RFC 9112, 2.2), nor do they keep us waiting
            self._wake()
        data = self._take_body(data) if self._owed else self._take_usual(data)
        if not data or self.transport.is_closing():
            return
        self._read(data)

    def on_message_begin(self) -> None:
        """Grant the new message its headers."""
        super().on_message_begin()
        if self._is_idle:  # what came before may have ended in the same read
            self._wake()
        self._begun = self._in_headers = True
        self._body_bytes = 0
        self._allowance = max(self._allowance, MAX_HEADER_BYTES)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, without the spaces around it (RFC 9110, 5.5), or pass over a trailer.

        Raises:
            Stop: there are too many.
        """
        if not self._in_headers:  # a trailer is none of them (RFC 9110, 6.5.1)
            return
        if len(self.headers) >= MAX_HEADERS:
            self._refuse(*TOO_MANY_HEADERS)
            raise Stop
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        """Give the body its own time.

        Raises:
            Stop: too many requests ahead of their answers, an objection to the head, or no probe
                where only those are taken.
        """
        if self._is_spare and self.url.partition(b"?")[0].decode("latin-1") not in OPEN_PATHS:
            self._refuse(*FULL)
            raise Stop
        if len(self.pipeline) >= MAX_PIPELINED:
            raise Stop  # which is a 400
        version = self.parser.get_http_version()
        is_current = version == "1.1"
        objection = objection_to(self.url, self.headers, version)
        if objection is not None:
            self._refuse(*objection)
            raise Stop
        if not is_current:
            self.expect_100_continue = False  # RFC 9110, 10.1.1: the client would not wait for it
        self._in_headers = False
        self._is_chunked = any(name == b"transfer-encoding" for name, _ in self.headers)
        self._clock.stop()  # `data_received` starts the body's, if the body is still to come
        length = next((value for name, value in self.headers if name == b"content-length"), b"")
        # Whatever the answer is, such a body is not read.
        is_too_long = is_longer(length.decode("latin-1"), self.settings.max_upload_bytes)
        if (
            self.parser.get_method() == b"POST"
            and is_current
            # The first header of a name counts, as in Starlette.
            and self._by_express(
                self.url,
                dict(reversed(self.headers)),
                self.parser.should_keep_alive() and not is_too_long,
            )
        ):
            return
        self._before = self.cycle
        try:
            super().on_headers_complete()
        except Exception:
            self._in_headers = True  # no request has come of them
            raise
        if (
            self.expect_100_continue
            or self.parser.should_upgrade()
            or self._is_spare
            or is_too_long
        ):
            # After an early answer nobody could tell whether the body still comes (RFC 9110,
            # 10.1.1), nor after an upgrade that we pass over, which protocol. And a place for a
            # probe is for the next probe.
            self.cycle.keep_alive = False
        if self.pipeline and self._watch is None:
            self._watch = self.loop.call_later(WATCH_S, self._watch_client)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Pass the body on; its size is the application's to bound.

        What an early answer has left unread is thrown away here, up to the size of an upload.
        """
        # A body of one-byte chunks comes here a million times: as few calls as may be.
        self._body_bytes += len(body)
        cycle = self.cycle
        if isinstance(cycle, Express) and not cycle.response_complete:
            cycle.feed(body)
        elif not cycle.response_complete and cycle.scope["method"] not in _BODILESS:
            # One byte too many is enough to refuse it.
            excess = self._body_bytes - self.settings.max_upload_bytes - 1
            cycle.body += body if excess <= 0 else body[: max(0, len(body) - excess)]
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()
        elif self._body_bytes > self.settings.max_upload_bytes:
            self.transport.close()

    def on_message_complete(self) -> None:
        """Stop the clock until the next request begins."""
        if not self.parser.should_upgrade():  # else the parser leaves the body to us
            self._end_message()

    def _put_off(self, data: bytes) -> None:
        """Leave data for this connection's turn; until then nothing more is taken."""
        if self._backlog.add(data):
            self.transport.pause_reading()
            if not self.pipeline:  # else `_on_resume` does
                self._backlog.ask()
        else:
            self._refuse(503, "Too many connections", "Too many bytes wait to be read here.")

    def _on_resume(self) -> None:
        if self._backlog:
            self.transport.pause_reading()  # what has come before goes first
            self._backlog.ask()

    def _read_on(self, data: bytes) -> None:
        # First of all: what closes the connection, or goes deaf, must not leave it paused.
        if not self.flow.read_paused:
            self.transport.resume_reading()
        if not (self._deaf or self.transport.is_closing()):
            self._read(data)

    def _read(self, data: bytes) -> None:
        """Parse what came, or as much of it as a turn allows."""
        began = time.monotonic()
        for start in range(0, len(data), SLICE_BYTES):
            end = start + SLICE_BYTES
            self._read_slice(data[start:end])
            if self._deaf or self.transport.is_closing():
                return
            if end < len(data) and (self.pipeline or time.monotonic() - began > TURN_S):
                self._put_off(data[end:])
                return

    def _read_slice(self, data: bytes) -> None:
        self._allowance -= len(data)
        body_bytes = self._body_bytes
        self._parse(data)
        is_body = self._in_headers or self._body_bytes != body_bytes
        self._fruitless = 0 if is_body else self._fruitless + len(data)
        is_more_due = self._begun and not self._deaf
        if is_more_due and not self._clock.is_running and not self.transport.is_closing():
            self._start_clock(self._patience_s())
        allowed = self._allowance + self._body_bytes * FRAMING_PER_BODY_BYTE
        is_over = allowed < 0 or self._fruitless > MAX_HEADER_BYTES
        if is_over and not self.transport.is_closing():
            if self._in_headers:
                self._refuse(*TOO_MANY_HEADERS)
            else:
                self.transport.close()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._pass_over(data[offer.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _pass_over(self, rest: bytes) -> None:
        """Read on in HTTP/1.1 behind headers that offer another protocol.

        Java's HTTP client offers HTTP/2 with its first request, and a server may go on without
        (RFC 9110, section 7.8). The parser would take the body for that protocol's: another one
        reads it, by the same framing. It is the connection's last.
        """
        framing = [
            b"%b: %b\r\n" % (name, value)
            for name, value in self.headers
            if name in (b"content-length", b"transfer-encoding")
        ]

        def take(body: bytes) -> None:
            if not self._deaf:  # what follows in the same read is the next request's
                self.on_body(body)

        def end() -> None:
            if not self._deaf:
                self._end_message()
                self._deaf = True

        reader = SimpleNamespace(on_body=take, on_message_complete=end)
        self.parser = httptools.HttpRequestParser(reader)
        self._parse(b"".join((b"POST / HTTP/1.1\r\n", *framing, b"\r\n", rest)))

    def _take_usual(self, data: bytes) -> bytes:
        """Serve the usual request that `data` begins with; return what is for the parser."""
        if (
            self._begun
            or self._is_spare
            or not (self.cycle is None or self.cycle.response_complete)
            or (head := read_head(data)) is None
            or head.body_size > self.settings.max_upload_bytes
        ):
            return data
        # Before anything is answered: an answer that closes looks whether a body still comes.
        self._begun, self._in_headers = head.body_size > len(data) - head.size, False
        if not self._by_express(head.target, head.fields, keep_alive=True):
            self._begun, self._in_headers = False, True
            return data
        self._clock.stop()
        self._begun, self._owed = True, head.body_size
        data = self._take_body(data, head.size)
        if data and not self.transport.is_closing():
            self._put_off(data)  # one read may hold thousands of requests, each answered at once
        return b""

    def _take_body(self, data: bytes, start: int = 0) -> bytes:
        """Hand on what `data` holds of a usual request's body; return what comes after it."""
        end = min(len(data), start + self._owed)
        self._owed -= end - start
        if end > start and isinstance(self.cycle, Express):
            self.cycle.feed(data[start:end])
        if self._owed == 0:
            self._end_message()
        elif not self._clock.is_running and not self.transport.is_closing():
            self._start_clock(self._patience_s())
        return data[end:]

    def _end_message(self) -> None:
        self._clock.stop()
        self._begun = self._is_chunked = False
        self._in_headers = True
        self._allowance, self._body_bytes = MAX_HEADER_BYTES, 0
        cycle = self.cycle
        if isinstance(cycle, Express):
            cycle.complete()
        elif not cycle.response_complete:
            super().on_message_complete()
        if cycle.response_complete:  # early
            self._rest()

    def pause_writing(self) -> None:
        """Start the clock on a client that does not read its answer."""
        super().pause_writing()
        if not self._writing.is_running:
            self._writing.start(self.settings.body_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop that clock, unless there is more: a long answer comes in pieces."""
        super().resume_writing()
        self._stop_writing()

    def _stop_writing(self) -> None:
        answering = self._answering is not None and not self._answering.response_complete
        if not (self.flow.write_paused or (answering and self._answering.response_started)):
            self._writing.stop()

    def on_response_complete(self) -> None:
        """Serve the request that waits, or rest; uvicorn's own clock for that is not started."""
        self._stop_writing()
        if self.pipeline:
            super().on_response_complete()
            self._restart_clock()
        else:
            self.server_state.total_requests += 1
            if not self.transport.is_closing():
                self.flow.resume_reading()
                self._restart_clock()
                self._rest()

    def shutdown(self) -> None:
        """Close after the request at hand, or the one that may already be on its way."""
        if self.cycle is not None and not self.cycle.response_complete:
            super().shutdown()
        else:
            self.loop.call_later(LAST_CALL_S, self._close_if_idle)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP at all."""
        self._refuse(400, "Bad request", msg)

    def _by_express(self, target: bytes, fields: dict[bytes, bytes], keep_alive: bool) -> bool:
        """Serve the `POST` that has begun without ASGI, if it can be."""
        if self.flow.write_paused or not (self.cycle is None or self.cycle.response_complete):
            return False  # it has to wait its turn
        found = express(
            self._service,
            target,
            fields,
            self.server_state.default_headers,
            self.transport.write,
            self._patience,
            keep_alive=keep_alive,
        )
        if found is None:
            return False
        # It stands where uvicorn looks for a request and its task.
        self.cycle = found  # type: ignore[assignment] # all that uvicorn looks at is there
        if isinstance(found, Answered):
            self.server_state.total_requests += 1
            return True
        self._express = found
        self.tasks.add(found)  # type: ignore[arg-type] # for its `cancel`
        found.begin(lambda: self._on_answered(found))
        return True

    def _on_answered(self, found: Express) -> None:
        self._express = None
        self.tasks.discard(found)
        if not found.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _watch_client(self) -> None:
        """Notice that a client is gone while nothing is read from it, its next request waiting."""
        self._watch = None
        if not self.pipeline or self.transport.is_closing():
            return
        if has_hung_up(self.transport):
            self.transport.abort()
        else:
            self._watch = self.loop.call_later(WATCH_S, self._watch_client)

    def _is_unread(self) -> bool:
        return self._begun or bool(self._backlog) or self.flow.read_paused

    def _may_linger(self) -> bool:
        is_quiet = 2 * len(self.connections) <= self.settings.max_connections
        return is_quiet or Farewell.lingering < MAX_FAREWELLS

    def _close_if_idle(self) -> None:
        is_begun = self._begun or self._backlog
        if not is_begun and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def _patience_s(self) -> float:
        """Return how long what has begun to come may take to be complete."""
        if self._in_headers:
            return self.settings.header_timeout_s
        if isinstance(self.cycle, Express):
            return self.settings.body_timeout_s
        return self.settings.body_timeout_s + LAST_WORD_S

    def _start_clock(self, seconds: float) -> None:
        self._is_idle = False
        self._clock.start(seconds, self._on_deadline)

    def _restart_clock(self) -> None:
        if self._begun and self._clock.is_running:  # we made it wait until now
            self._start_clock(self._patience_s())

    def _rest(self) -> None:
        """Start the clock on an idle connection: nothing comes, nor has the next request begun."""
        if not (self._begun or self._clock.is_running or self.transport.is_closing()):
            self._is_idle = True
            self._clock.start(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _wake(self) -> None:
        self._is_idle = False
        self._clock.stop()

    def _on_deadline(self) -> None:
        is_answered = self.cycle is None or self.cycle.response_complete
        if self.flow.read_paused or (self._in_headers and not is_answered):
            # We made the client wait, not it us: a pipelined request behind a slow one.
            self._start_clock(self.settings.body_timeout_s)
        elif self._in_headers:
            self._refuse(408, "Request timeout", "The headers did not arrive in time.")
        elif isinstance(self.cycle, Express) and not is_answered:
            self.cycle.fail(BodyTimeout(self.settings.body_timeout_s))
        else:
            self.transport.close()

    def _refuse(self, status: int, title: str, detail: str) -> None:
        """Answer below the application and close."""
        if self.transport.is_closing():
            return
        if self._is_spare:  # whatever came: there was no place for it
            status, title, detail = FULL
        if self.cycle is not None and self.cycle.response_complete and not self._in_headers:
            self.transport.close()  # what has gone wrong is the rest of a request with an answer
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # What came in order is answered: a second answer would be read as a part of the first.
            if self._in_headers or self.pipeline:
                if not self._in_headers:  # the last one's own body has gone wrong
                    self.cycle = self._before
                self.cycle.keep_alive = False
                self._deaf = True
                self._clock.stop()
                return
            if isinstance(self.cycle, Express):
                # It could be parsed, so it is we who lack the room.
                self.cycle.fail(NotReady(detail, {"Connection": "close"}))
                return
            if self.cycle.response_started:
                self.transport.close()
                return
        trace = new_trace()
        trace.problem = kind_of(title)
        report(self._service.metrics, trace, "-", UNPARSED, status)
        headers = (*self.server_state.default_headers, (b"content-type", PROBLEM_JSON))
        body = problem_json(status, title, detail)
        self.transport.write(answer(status, headers, body, trace, closing=True))
        self.transport.close()


def bounded(settings: Settings, app: FastAPI) -> type[BoundedProtocol]:
    """Return the protocol class for these settings; uvicorn instantiates it by itself."""
    members = {"settings": settings, "application": app}
    return type("ServedProtocol", (BoundedProtocol,), members)
