"""The door: what comes in is counted and bounded, what cannot be served in time is refused.

Requests, body bytes and images in flight each have a limit; a place is taken by try-acquire and
given back whatever happens, so that no error leaks one. All of it runs on the event loop: no locks.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from app.errors import DeadlineExceeded, QueueFull, TooManyImages
from app.latency import LatencyTable, Took
from app.settings import Settings

# What is predicted is a middle; on a busy machine one in a hundred waits a third longer, and shall
# still be within the budget.
_HEADROOM = 0.7
# So many batches are always taken, one of them in the engine. A large model on a CPU may need
# longer for two than the budget is long: it would never see a full batch, and refused clients that
# come again at once would take the very cores that it runs on. Decoding has no batches to fill: it
# has to keep within the budget.
_BATCHES_TAKEN = 4
# Long answers that their clients have not read yet, for 30 s at most. The last quarter is for those
# of batches of ordinary models: six of the longest, 8 MB each, leave no room for another of those.
_MAX_ANSWER_BYTES = 64 * 2**20
_LARGE_ANSWER_BYTES = 2**20


class Refusal(NamedTuple):
    """Why no more is taken; a QueueFull yet to be raised, and under overload one of very few."""

    detail: str
    retry_after_s: int
    reason: str


class Admission:
    """Counts of what is in flight, and the rules by which more is taken."""

    def __init__(self, settings: Settings, latency: LatencyTable) -> None:
        self._settings = settings
        self._latency = latency
        self.requests = 0
        self.body_bytes = 0
        self.answer_images = 0  # of long ones, until they are put together
        self.answer_s = 0.0  # which takes them so long on a usual machine
        self.answer_bytes = 0  # of long ones, until they are read
        self.images = 0  # admitted and not yet answered

    @contextmanager
    def request(self) -> Iterator[None]:
        """Hold a place for one request, its upload included.

        Raises:
            QueueFull: see `enter`.
        """
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Take a place for one request, which `leave` gives back.

        Raises:
            QueueFull: too many requests, or their images would wait longer than the budget.
        """
        refusal = self.refusal()
        if refusal is not None:
            raise QueueFull(*refusal)
        self.requests += 1

    def refusal(self) -> Refusal | None:
        """Return why one more request would be refused now, or None if it would not be."""
        if self.requests >= self._settings.max_requests:
            return self._refusal("Too many requests are in flight.", "requests")
        return self._over_budget()

    def leave(self) -> None:
        """Give a request's place back."""
        self.requests -= 1

    @contextmanager
    def body(self) -> "Iterator[BodyBudget]":
        """Count the bytes of one body for as long as it is held."""
        budget = BodyBudget(self)
        try:
            yield budget
        finally:
            budget.close()

    @contextmanager
    def answering(self, images: int, expected_s: float, deadline: float) -> Iterator[Took]:
        """Count a long answer until it is put together; yield what takes in how long that took.

        It takes `expected_s` on a usual machine, a short one 0; here as long as the last ones did.
        `deadline` is in seconds of `time.monotonic()`. One alone is always taken.

        Raises:
            QueueFull: all together would hold more images than the queue may, or take longer than
                its budget or than the request has.
        """
        if not expected_s:
            yield _unheard
            return
        takes_s = self._latency.answer_s(self.answer_s + expected_s)
        most_s = _HEADROOM * min(self._settings.queue_budget_ms / 1000, deadline - time.monotonic())
        is_full = self.answer_images + images > self._settings.queue_size
        if self.answer_images and (is_full or takes_s > most_s):
            detail = "Too many long answers wait to be put together."
            wait_s = max(self._latency.answer_s(self.answer_s), self._latency.wait_s(self.images))
            raise QueueFull(detail, max(1, math.ceil(wait_s)), "answers")
        self.answer_images += images
        self.answer_s += expected_s
        try:
            yield partial(self._latency.observe_answer, expected_s)
        finally:
            self.answer_images -= images
            self.answer_s -= expected_s

    @contextmanager
    def answer(self, size: int) -> Iterator[None]:
        """Count a long answer's bytes until it is sent; one alone is always taken, as are none.

        Raises:
            QueueFull: all of them together would be over the limit.
        """
        most = _MAX_ANSWER_BYTES * (3 if size > _LARGE_ANSWER_BYTES else 4) // 4
        if size and self.answer_bytes and self.answer_bytes + size > most:
            raise self._full("Too many long answers wait to be read.", "answers")
        self.answer_bytes += size
        try:
            yield
        finally:
            self.answer_bytes -= size

    @contextmanager
    def queue(self, images: int, deadline: float) -> Iterator[float]:
        """Hold places in the queue until `images` are answered; yield the seconds predicted.

        Raises:
            TooManyImages, QueueFull, DeadlineExceeded: see `admit`.
        """
        predicted_s = self.admit(images, deadline)
        try:
            yield predicted_s
        finally:
            self.dismiss(images)

    def admit(self, images: int, deadline: float) -> float:
        """Take places in the queue, which `dismiss` gives back; return the seconds predicted.

        `deadline` is in seconds of `time.monotonic()`.

        Raises:
            TooManyImages: more than the queue can ever hold.
            QueueFull: no room, or the wait would outlast the budget or the deadline.
            DeadlineExceeded: not even an idle service could make the deadline.
        """
        limit = self._settings.queue_size
        if images > limit:
            raise TooManyImages(f"The request holds {images} images; at most {limit} are taken.")
        if self.images + images > limit:
            raise self._full("The queue is full.", "queue-size")
        over_budget = self._over_budget()
        if over_budget is not None:
            raise QueueFull(*over_budget)
        left_s = deadline - time.monotonic()
        service_s = self._latency.service_s(images)
        is_idle = self.images == 0
        if service_s > left_s and not (is_idle and self._latency.could_do(images, left_s)):
            raise DeadlineExceeded(
                f"The request takes about {service_s * 1000:.0f} ms and has {left_s * 1000:.0f} ms."
            )
        predicted_s = self._latency.wait_s(self.images) + service_s
        if predicted_s > left_s and not is_idle:
            raise self._full("The queue is too long for the request's deadline.", "deadline")
        self.images += images
        return predicted_s

    def dismiss(self, images: int) -> None:
        """Give the places of answered images back."""
        self.images -= images

    def take_bytes(self, count: int) -> None:
        """Count `count` more body bytes, or refuse them.

        Raises:
            QueueFull: all bodies together would be over the limit.
        """
        if self.body_bytes + count > self._settings.max_bytes_in_flight:
            raise self._full("Too many bytes are in flight.", "bytes")
        self.body_bytes += count

    def _over_budget(self) -> Refusal | None:
        """Return a refusal if one more image, which counts itself, would outlast the budget."""
        pending = self.images + 1
        wait_s = 0.0
        # With a decoder free nothing waits. And refusals measure nothing: a slow spell would stay.
        if self.images >= self._settings.decode_threads:
            wait_s = self._latency.decoding_s(pending)
        if self.images >= _BATCHES_TAKEN * self._settings.max_batch:
            wait_s = max(wait_s, self._latency.inference_s(pending))
        if wait_s * 1000 <= self._settings.queue_budget_ms * _HEADROOM:
            return None
        return Refusal("The queue is too long.", math.ceil(wait_s), "queue-budget")

    def _refusal(self, detail: str, reason: str) -> Refusal:
        """Refuse, saying when the present queue will have been worked off."""
        return Refusal(detail, max(1, math.ceil(self._latency.wait_s(self.images))), reason)

    def _full(self, detail: str, reason: str) -> QueueFull:
        return QueueFull(*self._refusal(detail, reason))


def _unheard(seconds: float, *, at_least: bool = False) -> None:
    """Take in nothing, of what is made at once."""


class BodyBudget:
    """The bytes that one request's body has taken of the limit so far."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._taken = 0

    def cover(self, size: int) -> None:
        """Take as many more bytes as a body of `size` needs.

        Raises:
            QueueFull: all bodies together would be over the limit.
        """
        if size > self._taken:
            self._admission.take_bytes(size - self._taken)
            self._taken = size

    def close(self) -> None:
        """Give them all back."""
        self._admission.body_bytes -= self._taken
