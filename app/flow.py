"""Nothing is read from a connection while a request that came on it waits for its turn."""

import asyncio
from collections.abc import Callable, Sized

from uvicorn.protocols.http.flow_control import FlowControl


class Flow(FlowControl):
    """uvicorn's, which reads on after each answer: into the last body, which nobody takes yet."""

    def __init__(
        self, transport: asyncio.Transport, waiting: Sized, on_resume: Callable[[], None]
    ) -> None:
        """Have `on_resume` called when reading goes on; while anything is `waiting` it does not."""
        super().__init__(transport)
        self._waiting = waiting
        self._on_resume = on_resume

    def resume_reading(self) -> None:
        """Read on, unless requests wait."""
        if self.read_paused and not self._waiting:
            super().resume_reading()
            self._on_resume()
