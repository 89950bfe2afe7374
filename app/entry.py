"""One image on its way through the queue, from its admission to its logits."""

import asyncio
import time
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from app.errors import DeadlineExceeded, Problem
from app.images import Picture
from app.trace import Stages


@dataclass(slots=True, eq=False)
class Entry:
    """One image on its way through the queue.

    An error is a result, too: one that nobody came to read would else be reported as a fault.
    """

    # Released with the request: what waits for a thread must not outlive its count. Not for logs.
    upload: bytes = field(repr=False)
    future: asyncio.Future[NDArray[np.float32] | Exception]  # logits [classes]
    picture: Picture = field(init=False)  # set when it is decoded
    request_id: str = ""
    is_spare: bool = False  # runs only while nothing else waits
    # Seconds of time.perf_counter(), each set where it happens.
    received: float = field(default_factory=time.perf_counter)
    decoding: float = 0.0
    decoded: float = 0.0
    inferring: float = 0.0
    inferred: float = 0.0

    def is_alive(self) -> bool:
        """Return whether anybody still waits: the client is there and its time not run out."""
        return not self.future.cancelled()

    def outcome(self) -> str:
        """Return what became of it, once it is settled: `ok`, the kind of its problem, or `bug`."""
        if self.future.cancelled():
            return DeadlineExceeded("").kind
        result = self.future.result()
        if isinstance(result, Exception):
            return result.kind if isinstance(result, Problem) else "bug"
        return "ok"

    def stages(self) -> Stages | None:
        """Return the times of an entry that has been through the engine."""
        if not self.inferred:
            return None
        return Stages(self.received, self.decoding, self.decoded, self.inferring, self.inferred)

    def fail(self, error: Exception) -> None:
        """Answer with `error`; on the event loop only."""
        if not self.future.done():
            self.future.set_result(error)

    def release(self) -> None:
        """Stop waiting: whoever still has the entry in hand drops it.

        It may stay in the queue for long, if the engine hangs; its bytes do not.
        """
        self.upload = b""
        if self.future.cancel() and hasattr(self, "picture"):
            # An engine's thread may be about to stack it with others: it must keep its shape.
            nothing = np.broadcast_to(np.uint8(0), self.picture.patches.shape)
            self.picture = replace(self.picture, patches=nothing)
