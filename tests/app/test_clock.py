"""The clock that stands for many timers: it rings when theirs would have."""

import asyncio
import heapq
from collections.abc import Callable
from functools import partial
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from app.clock import Clock


class Handle:
    """A timer of the loop's."""

    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when, self.call, self.is_cancelled = when, call, False

    def __lt__(self, other: "Handle") -> bool:
        return self.when < other.when

    def cancel(self) -> None:
        """Do not ring."""
        self.is_cancelled = True


class Loop:
    """As much of an event loop as a clock needs; its time moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Handle] = []
        self.set = 0

    def time(self) -> float:
        """Return the time in seconds."""
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> Handle:
        """Ring then."""
        self.set += 1
        handle = Handle(when, call)
        heapq.heappush(self.timers, handle)
        return handle

    def advance(self, seconds: float) -> None:
        """Let so much time pass, ringing on the way."""
        until = self.now + seconds
        while self.timers and self.timers[0].when <= until:
            handle = heapq.heappop(self.timers)
            self.now = max(self.now, handle.when)
            if not handle.is_cancelled:
                handle.call()
        self.now = until

    def waiting(self) -> int:
        """Return how many timers are set."""
        return sum(not handle.is_cancelled for handle in self.timers)


def clock_on(loop: Loop) -> Clock:
    """Return a clock on this loop."""
    return Clock(cast("asyncio.AbstractEventLoop", loop))


steps = st.one_of(
    st.tuples(st.just("start"), st.integers(0, 90)),
    st.tuples(st.just("stop"), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 50)),
)


@given(st.lists(steps, max_size=30))
def test_rings_as_a_timer_for_each_start_would(taken: list[tuple[str, int]]) -> None:
    """What it was started for last rings in time, and nothing that was stopped or replaced."""
    loop, plain = Loop(), Loop()
    found: list[tuple[int, float]] = []
    expected: list[tuple[int, float]] = []
    clock, timer = clock_on(loop), Handle(0, lambda: None)
    for number, (step, seconds) in enumerate(taken):
        if step == "wait":
            loop.advance(seconds)
            plain.advance(seconds)
            continue
        timer.cancel()
        clock.stop()
        if step == "start":
            clock.start(seconds, partial(note, found, number, loop))
            timer = plain.call_at(plain.now + seconds, partial(note, expected, number, plain))
        assert loop.waiting() <= 1
    loop.advance(1000)
    plain.advance(1000)
    assert found == expected


def note(rung: list[tuple[int, float]], number: int, loop: Loop) -> None:
    """Remember what rang, and when."""
    rung.append((number, loop.now))


def test_deadlines_that_move_away_set_no_timer() -> None:
    """A thousand requests in a second, each with half a minute, set the loop's timer once."""
    loop = Loop()
    clock = clock_on(loop)
    for _ in range(1000):
        clock.start(30, lambda: None)
        clock.stop()
        loop.advance(0.001)
    assert loop.set == 1


def test_end() -> None:
    """A clock that has ended leaves no timer behind, and does not ring."""
    loop = Loop()
    found: list[tuple[int, float]] = []
    clock = clock_on(loop)
    clock.start(1, partial(note, found, 0, loop))
    assert clock.is_running
    clock.end()
    assert loop.waiting() == 0
    assert not clock.is_running
    loop.advance(10)
    assert not found
