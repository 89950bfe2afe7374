"""The usual `POST /classify` without ASGI: from the parser's callbacks to the queue and back.

Task, messages, middleware and routing cost a request more than everything else that the event loop
does for it, and under overload a refusal little less. So a request with nothing unusual about it is
served right here, with the same parts and the same answers; any other takes the framework's way.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import ClassVar, TypeVarTuple

from pydantic_core import to_json

from app.access import answer, report
from app.admission import BodyBudget
from app.clock import Clock
from app.entry import Entry
from app.errors import (
    CLIENT_GONE,
    GONE,
    PROBLEM_JSON,
    BodyTooLarge,
    DeadlineExceeded,
    Fault,
    NotReady,
    Problem,
)
from app.forms import Form, RawBody
from app.routes.classify import checked_top_k, classification
from app.service import Service
from app.trace import new_trace
from app.uploads import LATE_BODY, TIMEOUT_HEADER, deadline_after, image_reader, is_longer

logger = logging.getLogger(__name__)

Values = TypeVarTuple("Values")

PATH = "/classify"
_NO_BODY = RawBody()  # stands where none is being collected
_TIMEOUT = TIMEOUT_HEADER.encode("ascii")


class Express:
    """One request, in the place of uvicorn's RequestResponseCycle.

    The protocol feeds it: `begin`, then `feed` for each piece of the body, then `complete`; and
    `hang_up`, `fail` or `cancel` whenever it may be. Each of them may answer.
    """

    # What uvicorn sets for a task that waits for the body; none does here.
    message_event: ClassVar[asyncio.Event] = asyncio.Event()

    def __init__(
        self,
        service: Service,
        fields: dict[bytes, bytes],
        top_k: int | None,
        default_headers: list[tuple[bytes, bytes]],
        write: Callable[[bytes], None],
        clock: Clock,
        keep_alive: bool,
    ) -> None:
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False
        self._service = service
        self._fields = fields
        self._asked = top_k
        self._default_headers = default_headers
        self._write = write
        self._clock = clock
        self._on_response: Callable[[], None] = _nothing
        self._trace = new_trace(self._field(b"x-request-id"), self._field(b"traceparent"))
        self._trace.is_traced = self._trace.is_traced or service.spans is not None
        self._budget = BodyBudget(self._service.admission)
        self._is_in = False  # counted by the door
        self._entry: Entry | None = None
        self._reader: Form | RawBody = _NO_BODY

    def begin(self, on_response: Callable[[], None]) -> None:
        """Let the request in, or refuse it; `on_response` is called when it is answered."""
        self._on_response = on_response
        self._guard(self._begin)

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        if not self.response_complete:
            self._guard(self._feed, chunk)

    def complete(self) -> None:
        """Send the image on its way: the body is whole."""
        if not self.response_complete:
            self._guard(self._complete)

    def hang_up(self) -> None:
        """Give up: the client is gone."""
        if self.response_complete:
            return
        self.disconnected = True
        if self._entry is not None:
            self._entry.release()  # its future tells `_collect`
        else:
            self._leave(CLIENT_GONE)

    def fail(self, problem: Problem) -> None:
        """Answer with a problem, unless there is an answer already."""
        if self.response_complete:
            return
        self._trace.problem, self._trace.reason = problem.kind, problem.reason
        self._answer(problem.status, problem.json(), PROBLEM_JSON, problem.headers)

    def cancel(self, msg: object = None) -> None:
        """Stop, since the grace time is over; named and called as a task's by uvicorn."""
        del msg
        stopped = NotReady("This replica had to stop before the request was done.")
        # Not at once: uvicorn goes through a set from which the answer would remove us.
        asyncio.get_running_loop().call_soon(self.fail, stopped)

    def _begin(self) -> None:
        service = self._service
        service.admission.enter()
        self._is_in = True
        settings = service.settings
        self._top_k = checked_top_k(self._asked, service.classifier)
        self._reader = image_reader(self._field(b"content-type"))
        self._deadline = deadline_after(
            self._field(_TIMEOUT) if _TIMEOUT in self._fields else None, settings
        )
        if _TIMEOUT in self._fields:
            # Without one, the body has its own time, and the deadline only what follows.
            self._clock.start(self._deadline - time.monotonic(), self._be_late)
        if is_longer(self._field(b"content-length"), settings.max_upload_bytes):
            raise BodyTooLarge(settings.max_upload_bytes)

    def _feed(self, chunk: bytes) -> None:
        self._trace.received_bytes += len(chunk)  # of a length that `_begin` has looked at
        self._budget.cover(self._trace.received_bytes)
        self._reader.feed(chunk)

    def _complete(self) -> None:
        image, self._reader = self._reader.image(), _NO_BODY
        if _TIMEOUT not in self._fields:
            self._deadline = deadline_after(None, self._service.settings)
        self._predicted_s = self._service.admission.admit(1, self._deadline)
        entry = self._entry = self._service.classifier.submit(image, self._trace.request_id)
        self._clock.start(max(0.0, self._deadline - time.monotonic()), entry.release)
        entry.future.add_done_callback(lambda _: self._guard(self._collect))

    def _be_late(self) -> None:
        self.fail(DeadlineExceeded(LATE_BODY))

    def _collect(self) -> None:
        """Answer with what became of the image."""
        if self.response_complete or self._entry is None:
            return
        service = self._service
        if self.disconnected:
            service.metrics.finish_image(None, GONE)
            self._leave(CLIENT_GONE)
            return
        [result] = service.classifier.collect([self._entry], self._predicted_s, self._trace)
        if isinstance(result, Problem):
            self.fail(result)
        else:
            found = classification(result, service.classifier, self._top_k)
            self._answer(200, to_json(found), b"application/json", {})

    def _answer(self, status: int, body: bytes, media_type: bytes, more: dict[str, str]) -> None:
        """Write the whole answer at once, and leave."""
        if self._service.draining or "Connection" in more:  # which is "close" then
            self.keep_alive = False
        others = [
            (name.lower().encode("ascii"), value.encode("latin-1"))
            for name, value in more.items()
            if name != "Connection"
        ]
        headers = (*self._default_headers, (b"content-type", media_type), *others)
        self._write(answer(status, headers, body, self._trace, closing=not self.keep_alive))
        self._leave(status)

    def _leave(self, status: int) -> None:
        """Give back what the request held, report it, and let the connection go on."""
        self.response_complete = True
        self._reader = _NO_BODY  # what came stays no longer than it is counted
        self._clock.stop()
        entry, self._entry = self._entry, None  # a connection that stays open keeps us, no picture
        if entry is not None:
            entry.release()
            self._service.admission.dismiss(1)
        self._budget.close()
        if self._is_in:
            self._service.admission.leave()
        if status == CLIENT_GONE:
            self._trace.problem = GONE
        on_response, self._on_response = self._on_response, _nothing  # which knows us: a cycle
        try:
            report(self._service.metrics, self._trace, "POST", PATH, status)
            if self._service.spans is not None:
                self._service.spans.export(self._trace, "POST", PATH, status)
        finally:
            on_response()

    def _guard(self, step: Callable[[*Values], None], *values: *Values) -> None:
        """Take one step; what goes wrong is the answer."""
        try:
            step(*values)
        except Problem as problem:
            self.fail(problem)
        except Exception:
            extra = {"request_id": self._trace.request_id}  # no context has it here
            logger.exception("a bug, answered with 500", extra=extra)
            self.fail(Fault())

    def _field(self, name: bytes) -> str:
        return self._fields.get(name, b"").decode("latin-1")


def _nothing() -> None:
    """Stand for a call that has been made."""
