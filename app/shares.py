"""A batch on several cores: shared out in pieces, each inferred by one thread from end to end.

Threads inside one inference wait for each other after every operator, and read what another core
has just written. Mixers of all sizes take 5 to 20 % less CPU when each core has images of its own.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.cpus import give_way

if TYPE_CHECKING:
    import onnxruntime

# Of one inference, about: fewer fill no matrix product, more push out of the core's cache what the
# next operator reads. On an EPYC one image of B/16 at a time is 5 % faster than eight, four of S/32
# or of the embedded model are 2 to 4 %.
_TOKENS = 256


class Shares:
    """Runs a session of one thread from several threads at once."""

    def __init__(
        self,
        session: "onnxruntime.InferenceSession",
        wide: "onnxruntime.InferenceSession",
        threads: int,
        tokens: int,
    ) -> None:
        """Keep the other threads ready; the caller's is one of them.

        `wide` infers what is left, fewer images than threads, with all of them together; where that
        is not worth it, it is `session` itself. `tokens` are those of one image.
        """
        self._session = session
        self._wide = wide
        self._threads = threads
        self._images = max(1, _TOKENS // tokens)  # of one inference
        self._others = ThreadPoolExecutor(max(1, threads - 1), "mixer-share", initializer=give_way)

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes] for patches uint8 [batch, tokens, P·P·3]."""
        rest = len(patches) % self._threads if self._wide is not self._session else 0
        if not rest:
            return self._share(patches)
        logits: NDArray[np.float32] = self._wide.run(["logits"], {"patches": patches[-rest:]})[0]
        if rest == len(patches):
            return logits
        return np.concatenate([self._share(patches[:-rest]), logits])

    def _share(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        rounds = -(-len(patches) // (self._threads * self._images))
        count = min(rounds * self._threads, len(patches))  # as many pieces for each thread
        pieces = np.array_split(patches, count)
        logits: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * count
        left = iter(range(count))  # whoever is free takes the next; each number goes out once
        others = [
            self._others.submit(self._infer, pieces, logits, left)
            for _ in range(min(self._threads, count) - 1)
        ]
        self._infer(pieces, logits, left)
        for other in others:
            other.result()
        return np.concatenate(logits)

    def _infer(
        self,
        pieces: list[NDArray[np.uint8]],
        logits: list[NDArray[np.float32]],
        left: Iterator[int],
    ) -> None:
        for number in left:
            logits[number] = self._session.run(["logits"], {"patches": pieces[number]})[0]
