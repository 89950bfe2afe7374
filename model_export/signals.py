"""Signals that let the work at hand be finished."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals_collected() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the step is finished; a second one ends at once."""
    caught: list[int] = []
    wanted = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in wanted}

    def note(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in wanted:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
