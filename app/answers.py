"""Long answers: put together one at a time, and counted until their clients have read them.

Nearly all are a few kB, made and written at once. But one may hold 100,000 predictions, 8 MB, and
the request for it 34 kB.
"""

import asyncio
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from app.errors import DeadlineExceeded
from app.latency import Took
from app.service import Service
from app.uploads import unless_gone

# What the transport is given at once; the next piece waits until it is nearly sent.
PIECE_BYTES = 32 * 1024
# What it takes to put one together on a usual machine, and how much is done on the event loop.
_PREDICTION_S, _VALUE_S, _CLASS_S = 2.5e-6, 0.5e-6, 25e-9
_SHORT_S = 0.00125
# A batch waits for its images until the deadline, and answers for those that are late with 504.
_LATE_S, _LAST_S = 0.05, 1.0
_WRITER = ThreadPoolExecutor(1, "mixer-answer")  # so that only one answer takes that memory
Made = TypeVar("Made")
Steps = Generator[None, None, Made]  # yields wherever it may be given up, returns what it has made


class Extent(NamedTuple):
    """How much an answer is to put together."""

    images: int
    classes: int  # that are looked through for each of them
    predictions: int = 0  # for each of them
    values: int = 0  # of tensors, for each of them

    @property
    def seconds(self) -> float:
        """Return how long that takes on a usual machine, about; 0 if it is short."""
        seconds = self.images * (
            self.predictions * _PREDICTION_S + self.values * _VALUE_S + self.classes * _CLASS_S
        )
        return seconds if seconds > _SHORT_S else 0.0


async def put_together(
    request: Request,
    deadline: float,
    extent: Extent,
    took: Took,
    steps: Steps[Made],
) -> Made:
    """Return what `steps` make; where it takes long in a thread, one answer after the other.

    `deadline` is in seconds of `time.monotonic()`; an answer that is complete only then has a last
    second. `took` is told the seconds that a long one took, its wait left out.

    Raises:
        DeadlineExceeded: its time ran out, maybe behind the answers to others.
        ClientDisconnect: the client has gone.
    """
    if not extent.seconds:
        return _finish([steps], took)
    wanted = [steps]  # the executor keeps what was cancelled until its turn would have come
    left_s = deadline - time.monotonic()
    patience_s = left_s if left_s > _LATE_S else _LAST_S
    try:
        made = asyncio.get_running_loop().run_in_executor(_WRITER, _finish, wanted, took)
        async with asyncio.timeout(patience_s):
            return await unless_gone(request, made)
    except TimeoutError:
        raise DeadlineExceeded("The request's time ran out before its answer was ready.") from None
    finally:
        wanted.clear()


def _finish(wanted: list[Steps[Made]], took: Took) -> Made:
    """Return what the one that is wanted makes.

    Raises:
        CancelledError: it is no longer wanted; nobody waits to see this.
    """
    start = time.perf_counter()
    for steps in wanted:  # looked at before each step
        try:
            while wanted:
                next(steps)
        except StopIteration as done:
            made: Made = done.value
            took(time.perf_counter() - start)
            return made
        took(time.perf_counter() - start, at_least=True)
    raise asyncio.CancelledError


class InPieces(Response):
    """An answer that, if it is long, keeps its request's place until the client has read it.

    One that is shared is the same bytes for everybody, and counts for nobody.
    """

    def __init__(
        self,
        body: bytes,
        media_type: str,
        headers: dict[str, str] | None = None,
        *,
        is_shared: bool = False,
    ) -> None:
        super().__init__(body, headers=headers, media_type=media_type)
        self._counted_bytes = 0 if is_shared else len(body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it.

        Raises:
            QueueFull: too many long ones are unread.
        """
        if len(self.body) <= PIECE_BYTES:
            await super().__call__(scope, receive, send)
            return
        service: Service = scope["app"].state.service
        with service.admission.answer(self._counted_bytes):
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            for start in range(0, len(self.body), PIECE_BYTES):
                end = start + PIECE_BYTES
                piece = {"body": self.body[start:end], "more_body": end < len(self.body)}
                await send({"type": "http.response.body", **piece})
                await asyncio.sleep(0)  # a client that reads at once must not hold up the others
