"""One request's identity and times: what its log line, its headers and its spans are made of.

The trace travels in a context variable, so that every log line written on behalf of a request
carries the same ID without anybody passing it on.
"""

import random
import re
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

# What a client may name its request: what every log and header takes as it is.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}", re.ASCII)
# W3C Trace Context, section 3.2: version, trace-id, parent-id, flags; later versions may add more.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
SAMPLED = 0x01


class Parent(NamedTuple):
    """The caller's span, from its `traceparent` header."""

    trace_id: str  # 32 hex digits
    span_id: str  # 16 hex digits
    flags: int


class Stages(NamedTuple):
    """When one image reached each stage, in seconds of `time.perf_counter()`."""

    received: float
    decoding: float
    decoded: float
    inferring: float
    inferred: float

    @property
    def decode_s(self) -> float:
        """Seconds from bytes to patches."""
        return self.decoded - self.decoding

    @property
    def queue_s(self) -> float:
        """Seconds of waiting: for a decoder, then for the engine."""
        return self.decoding - self.received + self.inferring - self.decoded

    @property
    def infer_s(self) -> float:
        """Seconds of its batch's inference."""
        return self.inferred - self.inferring


@dataclass(slots=True)
class Trace:
    """What is known of a request while it runs."""

    request_id: str
    number: int  # 192 bits at random; IDs are made of them when asked for, which is seldom
    parent: Parent | None = None
    is_traced: bool = False  # a collector may know it: the log names its IDs
    started: float = field(default_factory=time.perf_counter)
    received_bytes: int = 0
    images: int = 0
    stages: Stages | None = None  # of the image that took longest
    problem: str | None = None  # the kind of problem that was answered
    reason: str | None = None  # why the request was refused, finer than the problem

    @property
    def trace_id(self) -> str:
        """32 hex digits: the caller's, if it has a trace."""
        return self.parent.trace_id if self.parent else f"{self.number >> 64:032x}"

    @property
    def span_id(self) -> str:
        """16 hex digits."""
        return f"{self.number & (1 << 64) - 1:016x}"

    @property
    def traceparent(self) -> str:
        """The header that hands this request's span on."""
        flags = self.parent.flags if self.parent else 0
        return f"00-{self.trace_id}-{self.span_id}-{flags:02x}"

    def server_timing(self, now: float) -> str:
        """Return the `Server-Timing` header (W3C Server Timing), durations in milliseconds."""
        total = f"total;dur={(now - self.started) * 1000:.2f}"
        if self.stages is None:
            return total
        decode_s, queue_s, infer_s = self.stages.decode_s, self.stages.queue_s, self.stages.infer_s
        return (
            f"decode;dur={decode_s * 1000:.2f}, queue;dur={queue_s * 1000:.2f}, "
            f"infer;dur={infer_s * 1000:.2f}, {total}"
        )


_numbers = random.Random()  # noqa: S311 - names, no secrets; seeded by the system
_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def begin(request_id: str, traceparent: str) -> Trace:
    """Start the current trace with what a request's headers say; malformed ones count as absent."""
    trace = new_trace(request_id, traceparent)
    _current.set(trace)
    return trace


def new_trace(request_id: str = "", traceparent: str = "") -> Trace:
    """Return a trace as `begin` does, without making it the current one."""
    parent = parse_traceparent(traceparent) if traceparent else None
    return Trace(
        name_of(request_id),
        _numbers.getrandbits(192),
        parent=parent,
        is_traced=parent is not None,
    )


def name_of(request_id: str) -> str:
    """Return what a request is called: as its client says, or else 32 hex digits at random."""
    if request_id and _REQUEST_ID.fullmatch(request_id):
        return request_id
    # Not from the system, whose call would let go of the GIL: these are names, no secrets.
    return f"{_numbers.getrandbits(128):032x}"


def current() -> Trace | None:
    """Return the trace of the request on whose behalf this code runs."""
    return _current.get()


def parse_traceparent(header: str) -> Parent | None:
    """Return the caller's span, or None if the header is malformed (W3C Trace Context, 3.2)."""
    found = _TRACEPARENT.fullmatch(header.strip())
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest):
        return None
    if trace_id == "0" * 32 or span_id == "0" * 16:
        return None
    return Parent(trace_id, span_id, int(flags, 16) & SAMPLED)
