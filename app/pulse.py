"""Whether an engine still works: its failures in a row, and inferences that do not end."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# A batch that fails may have been unlucky; three in a row mean a broken engine (a poisoned CUDA
# context fails every call), and three probes later it has not recovered by itself.
FAILURES_UNTIL_NOT_READY = 3
FAILURES_UNTIL_NOT_LIVE = 6
# An inference of that length is as good as so many failures: a GPU that hangs raises nothing. The
# slowest CPU needs seconds for a share, and whoever asked has had 504 long ago.
NOT_READY_AFTER_S = 30.0
NOT_LIVE_AFTER_S = 60.0


class Pulse:
    """Of one engine; called by the threads that infer, asked by any."""

    def __init__(self) -> None:
        self._failed = 0
        # By thread, since when it waits for the engine, in seconds of time.monotonic(); or never.
        self._since: dict[int, float] = {}

    @property
    def failures(self) -> int:
        """Return the failures in a row, or what an inference without end amounts to."""
        took_s = time.monotonic() - min(self._since.values(), default=math.inf)
        if took_s > NOT_LIVE_AFTER_S:
            return FAILURES_UNTIL_NOT_LIVE
        if took_s > NOT_READY_AFTER_S:
            return max(self._failed, FAILURES_UNTIL_NOT_READY)
        return self._failed

    @contextmanager
    def inferring(self) -> Iterator[None]:
        """Watch how long the calling thread waits for the engine."""
        thread = threading.get_ident()
        self._since[thread] = time.monotonic()
        try:
            yield
        finally:
            self._since[thread] = math.inf

    def fail(self) -> None:
        """Count a failure; by one thread at a time."""
        self._failed += 1

    def recover(self) -> None:
        """Forget the failures: something came out as it should."""
        self._failed = 0
