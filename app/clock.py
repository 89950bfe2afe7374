"""A deadline that moves with every request, without a timer of the event loop's for each."""

import asyncio
import math
from collections.abc import Callable

# The event loop counts whole milliseconds, and may ring so much early.
_TICK_S = 0.001


class Clock:
    """Calls once when what it was started for is due, unless it was stopped or started anew.

    Most deadlines are never met: each request moves them further away. So the loop's timer is left
    where it is, and looks when it rings whether anything is due yet.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._rings = math.inf  # loop.time() seconds, as the next one
        self._due = math.inf
        self._call: Callable[[], None] = _nothing

    @property
    def is_running(self) -> bool:
        """Return whether something will be due."""
        return self._due < math.inf

    def start(self, seconds: float, call: Callable[[], None]) -> None:
        """Have `call` called in so many seconds, and forget what was due before."""
        self._due, self._call = self._loop.time() + seconds, call
        if self._due < self._rings:
            self._set()

    def stop(self) -> None:
        """Forget what is due."""
        self._due, self._call = math.inf, _nothing  # which may know us: a cycle

    def end(self) -> None:
        """Stop for good: no timer is left in the event loop."""
        self.stop()
        if self._timer is not None:
            self._timer.cancel()

    def _set(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings = self._due
        self._timer = self._loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer, self._rings = None, math.inf
        if self._due > self._loop.time() + _TICK_S:
            if self.is_running:
                self._set()
            return
        call = self._call
        self.stop()
        call()


def _nothing() -> None:
    """Stand for a call that is not to be made."""
