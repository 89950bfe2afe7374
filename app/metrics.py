"""What Prometheus scrapes: names begin with `mixer_`, and every label has a bounded set of values.

Counters and histograms are fed as requests pass; what is a state (depths, readiness) is read at
the scrape and costs the requests nothing.
"""

import asyncio
import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from app.model_card import ModelCard
from app.tallies import Spread, Tally
from app.trace import Stages, Trace

# From a tenth of a millisecond (a small model on a GPU) to ten seconds (the longest request).
_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
# Answers by which the service protects itself or its operator, rather than finding a fault.
_REFUSALS = frozenset({401, 408, 413, 429, 431, 503, 504})
# Of these, the ones that took what a request takes.
_WAITED = frozenset({408, 504})
# Prometheus sees no rise in a series whose first value is 500, so these are born at 0: the usual
# answers where images are classified, the reasons why not, and what becomes of images.
_ANSWERS = (
    ("200", "ok"),
    ("429", "queue-full"),
    ("500", "inference-failed"),
    ("503", "not-ready"),
    ("504", "deadline-exceeded"),
)
_REASONS = (
    *("queue-budget", "queue-size", "requests", "bytes", "deadline", "answers"),
    *("not-ready", "deadline-exceeded"),
)
_OUTCOMES = (
    *("ok", "corrupt-image", "client-gone", "deadline-exceeded"),
    *("inference-failed", "decoding-failed", "not-ready", "bug"),
)
# Between two scrapes, each of which takes the event loop some milliseconds.
_REST_S = 0.1
# The route of what never became a request: when it began nobody has noted.
UNPARSED = "unparsed"


class Metrics:
    """One application's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._scrape: asyncio.Task[bytes] | None = None  # the next one
        self._rests_until = 0.0  # time.monotonic() seconds
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._requests = self._counter(
            "requests", "Answers, by route, status and outcome", "route", "status", "outcome"
        )
        self._refusals = self._counter("refusals", "Requests refused, by reason", "reason")
        for reason in _REASONS:
            self._refusals.add(0, reason)
        self._images = self._counter("images", "Images, by outcome", "outcome")
        for outcome in _OUTCOMES:
            self._images.add(0, outcome)
        self._received = self._counter("received_bytes", "Bytes of bodies received")
        self._request_s = self._histogram(
            "request_seconds",
            "From headers to the end of the answer, those of 401, 413, 429, 431 and 503 left out",
            _SECONDS,
            "route",
        )
        self._decode_s = self._histogram("decode_seconds", "From bytes to patches", _SECONDS)
        self._queue_s = self._histogram(
            "queue_seconds",
            "Waiting of an image: for a decoder, then for the engine",
            _SECONDS,
        )
        self._batch_s = self._histogram(
            "batch_seconds", "Forming the first share of a batch", _SECONDS
        )
        self._infer_s = self._histogram(
            "inference_seconds", "One batch in the engine, explanations left out", _SECONDS
        )
        self._batch_images = self._histogram(
            "batch_images", "Images in a batch, explanations left out", _IMAGES
        )
        self._predicted_s = self._histogram(
            "predicted_seconds", "Predicted at the door, from admission to logits", _SECONDS
        )
        self._actual_s = self._histogram(
            "actual_seconds", "What the predicted time turned out to be", _SECONDS
        )
        self._ratio = self._histogram(
            "actual_to_predicted_ratio", "Actual over predicted time; 1 is a perfect one", _RATIOS
        )

    def expect(self, route: str) -> None:
        """Show the usual answers of a route where images are classified, before there is any."""
        for status, outcome in _ANSWERS:
            self._requests.add(0, route, status, outcome)

    def finish_request(self, trace: Trace, route: str, status: int, seconds: float) -> None:
        """Count one answered request; `route` is a template of ours, never a client's path."""
        self._requests.add(1, route, str(status), trace.problem or "ok")
        has_waited = status not in _REFUSALS or status in _WAITED
        if has_waited and route != UNPARSED:  # else overload would look fast
            self._request_s.observe(seconds, route)
        self._received.add(trace.received_bytes)
        if status in _REFUSALS:
            self._refusals.add(1, trace.reason or trace.problem or "other")

    def refuse(self, route: str, status: str, outcome: str, reason: str) -> None:
        """Count one request as `finish_request` does that the door refused, its body unread."""
        self._requests.add(1, route, status, outcome)
        self._refusals.add(1, reason)

    def finish_image(self, stages: Stages | None, outcome: str) -> None:
        """Count one image, with its times if it reached the engine."""
        self._images.add(1, outcome)
        if stages is not None:
            self._decode_s.observe(stages.decode_s)
            self._queue_s.observe(stages.queue_s)

    def finish_batch(self, images: int, forming_s: float, infer_s: float) -> None:
        """Take in one inference; from the engine's threads, one at a time."""
        self._batch_images.observe(images)
        self._batch_s.observe(forming_s)
        self._infer_s.observe(infer_s)

    def compare(self, predicted_s: float, actual_s: float) -> None:
        """Take in how long a request's images took, beside what its admission had predicted."""
        self._predicted_s.observe(predicted_s)
        self._actual_s.observe(actual_s)
        if predicted_s > 0:
            self._ratio.observe(actual_s / predicted_s)

    def show_state(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Show `mixer_{name}`, read anew at each scrape."""
        Gauge(f"mixer_{name}", text, registry=self._registry).set_function(read)

    def show_model(self, card: ModelCard, provider: str, service: str) -> None:
        """Show which model is served, where it runs, and the version of the service."""
        info = Gauge(
            "mixer_model_info",
            "The model that is served, always 1",
            ("name", "version", "variant", "precision", "provider", "service"),
            registry=self._registry,
        )
        labels = (card.name, card.version, card.variant, card.precision, provider, service)
        info.labels(*labels).set(1)

    async def scrape(self) -> bytes:
        """Return everything in Prometheus' text format 0.0.4, as it is after the call.

        Whoever asks while others wait gets the same text: a thousand who ask take no more than one.
        """
        if self._scrape is None:
            self._scrape = asyncio.create_task(self._render())
        return await asyncio.shield(self._scrape)

    async def _render(self) -> bytes:
        await asyncio.sleep(self._rests_until - time.monotonic())
        self._scrape = None
        text = generate_latest(self._registry)
        self._rests_until = time.monotonic() + _REST_S
        return text

    def _counter(self, name: str, text: str, *labels: str) -> Tally:
        return Tally(self._registry, f"mixer_{name}", text, *labels)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Spread:
        return Spread(self._registry, f"mixer_{name}", text, bounds, *labels)
