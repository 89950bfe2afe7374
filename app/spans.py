"""Spans for an OpenTelemetry collector, where the extra `otel` and a collector's address are there.

Everything is set by OpenTelemetry's own variables (`OTEL_EXPORTER_OTLP_ENDPOINT` and the others).
Spans are made when a request is over, from the times its trace has noted: until then they cost
nothing, and the IDs are those of the log and of `traceparent`.
"""

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from app.errors import StartupError
from app.trace import SAMPLED, Trace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import SpanContext

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Spans:
    """Turns finished requests into spans; `exporter` makes one, or None."""

    def __init__(self, processor: "SpanProcessor", sampler: "Sampler", resource: Any) -> None:
        self._processor = processor
        self._sampler = sampler
        self._resource = resource

    def export(self, trace: Trace, method: str, route: str, status: int) -> None:
        """Hand over a request's span, with one below it for each stage of its slowest image."""
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        if not self._is_sampled(trace, route):
            return
        now = time.perf_counter()
        # Stages are noted on a clock without a date; spans want one.
        epoch_ns = time.time_ns() - int(now * 1e9)
        identity = int(trace.trace_id, 16)
        flags = TraceFlags(SAMPLED)
        context = SpanContext(identity, int(trace.span_id, 16), is_remote=False, trace_flags=flags)
        parent = None
        if trace.parent is not None:
            parent = SpanContext(identity, int(trace.parent.span_id, 16), is_remote=True)

        def hand_over(
            name: str,
            own: "SpanContext",
            above: "SpanContext | None",
            start: float,
            end: float,
            **details: Any,
        ) -> None:
            span = self._span(
                name,
                context=own,
                parent=above,
                start_time=epoch_ns + int(start * 1e9),
                end_time=epoch_ns + int(end * 1e9),
                **details,
            )
            self._processor.on_end(span)

        hand_over(
            f"{method} {route}",
            context,
            parent,
            trace.started,
            now,
            kind=SpanKind.SERVER,
            # OpenTelemetry's conventions for HTTP: a 4xx is the client's error, no server's.
            status=Status(StatusCode.ERROR if status >= 500 else StatusCode.UNSET),
            attributes={
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "mixer.request_id": trace.request_id,
                "mixer.images": trace.images,
            },
        )
        if trace.stages is None:
            return
        stages = trace.stages
        for name, start, end in (
            ("queue for a decoder", stages.received, stages.decoding),
            ("decode", stages.decoding, stages.decoded),
            ("queue for the engine", stages.decoded, stages.inferring),
            ("infer", stages.inferring, stages.inferred),
        ):
            own_id = int.from_bytes(os.urandom(8), "big")
            own = SpanContext(identity, own_id, is_remote=False, trace_flags=flags)
            hand_over(name, own, context, start, end)

    def close(self, seconds: float) -> None:
        """Send what is left; what the collector has not taken after `seconds` is lost.

        OpenTelemetry's own limits allow it half a minute, which no orchestrator waits.
        """
        # It may still be at it when the process ends.
        sending = threading.Thread(target=self._processor.shutdown, daemon=True)
        sending.start()
        sending.join(seconds)
        if sending.is_alive():
            logger.warning("the last spans are lost: the collector has not taken them")

    def _is_sampled(self, trace: Trace, route: str) -> bool:
        from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
        from opentelemetry.trace.propagation import set_span_in_context

        identity, context = int(trace.trace_id, 16), None
        if trace.parent is not None:
            flags = TraceFlags(trace.parent.flags)
            above = SpanContext(identity, int(trace.parent.span_id, 16), True, flags)
            context = set_span_in_context(NonRecordingSpan(above))
        decision = self._sampler.should_sample(context, identity, route).decision
        return bool(decision.is_sampled())  # type: ignore[no-untyped-call] # of the SDK

    def _span(self, name: str, **details: Any) -> "ReadableSpan":
        from opentelemetry.sdk.trace import ReadableSpan

        return ReadableSpan(name, resource=self._resource, **details)


def exporter() -> Spans | None:
    """Return what exports spans, or None if no collector is named or the extra is missing.

    Raises:
        StartupError: OpenTelemetry does not take its own variables as they are.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if os.environ.get("OTEL_TRACES_EXPORTER", "") == "none":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create()
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "mixer-serve"}))
        sampler = TracerProvider(resource=resource, shutdown_on_exit=False).sampler
        processor = BatchSpanProcessor(OTLPSpanExporter())
    except ImportError:
        logger.warning("no spans: a collector is named, but pip install '.[otel]' is missing")
        return None
    except ValueError as error:  # some are read as soon as the SDK is imported
        raise StartupError(f"OTEL_… variables: {error}") from error
    name = next(name for name in reversed(_ENDPOINTS) if os.environ.get(name))  # it goes first
    address = os.environ[name]
    if not address.lower().startswith(("http://", "https://")):
        raise StartupError(
            f"{name}={address}: it must be a URL that begins with http:// or https://"
        )
    return Spans(processor, sampler, resource)
