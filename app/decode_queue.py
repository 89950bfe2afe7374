"""The decode queue: what waits for a decoder, and the threads of which each waits for one of them.

None of these threads does any work to speak of. An executor would make a future with a lock for
each image, on the event loop.
"""

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from app.batcher import PROBE_PERIOD_S
from app.cpus import DECODING_NICE, give_way
from app.decoders import Decoders
from app.pulse import FAILURES_UNTIL_NOT_READY

logger = logging.getLogger(__name__)

Work = Callable[[], object]


class DecodeQueue:
    """A thread for each decoder; `put` from any thread."""

    def __init__(self, decoders: Decoders, threads: int) -> None:
        self._decoders = decoders
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name="mixer-decode", daemon=True)
            for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, work: Work) -> None:
        """Have `work` done by the first thread that is free, in the order of the calls."""
        self._queue.put(work)

    def waiting(self) -> int:
        """Return how much work waits for a decoder, all of them being busy."""
        return self._queue.qsize()

    def close(self) -> None:
        """Do what is queued, then end the threads."""
        self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        """Do what comes until the mark of the end does."""
        give_way(DECODING_NICE)
        while (work := self._next()) is not None:
            try:
                work()
            except Exception:  # else the thread would end, and its decoder never be used again
                logger.exception("a bug beside a decoder")
            del work  # it may hold an upload until the next one comes
        self._queue.put(None)  # for the next thread

    def _next(self) -> Work | None:
        """Wait for work; meanwhile look for decoders, if there were none too often to get any."""
        while self._decoders.failures >= FAILURES_UNTIL_NOT_READY:
            try:
                return self._queue.get(timeout=PROBE_PERIOD_S)
            except Empty:
                self._decoders.probe()
        return self._queue.get()
