"""Slow reading in turns: one connection's in each round of the event loop.

Some bodies cost far more to read than their bytes: chunks of one byte, forms of a thousand parts.
However many clients send such, the event loop reads one slice and then sees to everything else.
"""

import asyncio
from collections import deque
from collections.abc import Callable

# What is read in one turn, and a slice. Honest bodies are read within it.
TURN_S = 0.001
# Held by all who wait: 256 connections, each with as much as one read brings. The last quarter is
# for who holds nothing yet, and has brought no more than this.
MAX_HELD_BYTES = 64 * 2**20
MODEST_BYTES = 64 * 1024


class Turns:
    """Those who wait to read on."""

    def __init__(self) -> None:
        self.held_bytes = 0  # in all backlogs
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


class Backlog:
    """What one connection has brought, and is not read yet."""

    def __init__(self, turns: Turns, read: Callable[[bytes], None]) -> None:
        """Have `read` called with it in its turn."""
        self._turns = turns
        self._read = read
        self._data = b""
        self._has_asked = False

    def __bool__(self) -> bool:
        """Return whether there is anything."""
        return bool(self._data)

    def add(self, data: bytes) -> bool:
        """Hold more; return whether there was room for it."""
        is_modest = not self._data and len(data) <= MODEST_BYTES
        most = MAX_HELD_BYTES if is_modest else MAX_HELD_BYTES * 3 // 4
        if self._turns.held_bytes + len(data) > most:
            return False
        self._data += data
        self._turns.held_bytes += len(data)
        return True

    def ask(self) -> None:
        """Have what is held read in its turn."""
        if not self._has_asked:
            self._has_asked = True
            self._turns.ask(self._go_on)

    def _go_on(self) -> None:
        self._has_asked = False
        self._read(self.take())

    def take(self) -> bytes:
        """Return all of it, and hold it no more."""
        data, self._data = self._data, b""
        self._turns.held_bytes -= len(data)
        return data
