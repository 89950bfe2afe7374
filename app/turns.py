"""Slow reading in turns: one connection's in each round of the event loop.

Some bodies cost far more to read than their bytes: chunks of one byte, forms of a thousand parts.
However many clients send such, the event loop reads one slice and then sees to everything else.
"""

import asyncio
from collections import deque
from collections.abc import Callable

# What is read in one turn, and a slice. Honest bodies are read within it.
TURN_S = 0.001


class Turns:
    """Those who wait to read on."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_due = False

    def ask(self, step: Callable[[], None]) -> None:
        """Have `step` called in its turn; on the event loop only."""
        self._waiting.append(step)
        self._go_on()

    async def mine(self) -> None:
        """Wait for a turn."""
        turn = asyncio.get_running_loop().create_future()
        self.ask(lambda: None if turn.done() else turn.set_result(None))
        await turn

    def _go_on(self) -> None:
        if self._waiting and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self._is_due = False
        step = self._waiting.popleft()
        try:
            step()
        finally:
            self._go_on()
