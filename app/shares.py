"""A batch on several cores: cut into shares, each inferred by one thread from end to end.

Threads inside one inference wait for each other after every operator, and read what another core
has just written. Mixers of all sizes take 5 to 20 % less CPU when each core has images of its own.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.cpus import INFERENCE_NICE, give_way

if TYPE_CHECKING:
    import onnxruntime

# Of one inference, about: fewer fill no matrix product, more push out of the core's cache what the
# next operator reads. On an EPYC one image of B/16 at a time is 5 % faster than eight, four of S/32
# or of the embedded model are 2 to 4 %.
_TOKENS = 256


class Share(NamedTuple):
    """A part of a batch, for one inference."""

    images: int
    is_wide: bool = False  # inferred by all threads together


class Shares:
    """Runs a session of one thread from several threads at once."""

    def __init__(
        self,
        session: "onnxruntime.InferenceSession",
        wide: "onnxruntime.InferenceSession",
        threads: int,
        tokens: int,
    ) -> None:
        """Keep `threads` in mind; `tokens` are those of one image.

        `wide` infers what is left, fewer images than threads, with all of them together; where that
        is not worth it, it is `session` itself.
        """
        self.threads = threads
        self._session = session
        self._wide = wide
        self._images = max(1, _TOKENS // tokens)  # of one inference
        self._others = ThreadPoolExecutor(
            max(1, threads - 1), "mixer-share", initializer=give_way, initargs=(INFERENCE_NICE,)
        )

    def cut(self, images: int) -> list[Share]:
        """Return the shares of a batch: as many for each thread, what is left by all together."""
        rest = images % self.threads if self._wide is not self._session else 0
        images -= rest
        rounds = -(-images // (self.threads * self._images))
        count = min(rounds * self.threads, images)
        shares = [Share((images + count - 1 - number) // count) for number in range(count)]
        return [*shares, Share(rest, is_wide=True)] if rest else shares

    def stack(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return patches uint8 [share, tokens, P·P·3] of single pictures."""
        return np.stack(pictures)

    def infer(self, patches: NDArray[np.uint8], share: Share) -> NDArray[np.float32]:
        """Return logits float32 [share, classes] for patches uint8 [share, tokens, P·P·3]."""
        session = self._wide if share.is_wide else self._session
        logits: NDArray[np.float32] = session.run(["logits"], {"patches": patches})[0]
        return logits

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits float32 [batch, classes] for patches uint8 [batch, tokens, P·P·3].

        The calling thread is one of those that infer.
        """
        shares = self.cut(len(patches))
        pieces = np.split(patches, np.cumsum([share.images for share in shares])[:-1])
        logits: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(shares)
        left = iter(range(len(shares)))  # whoever is free takes the next; each number comes once

        def work() -> None:
            for number in left:
                logits[number] = self.infer(pieces[number], shares[number])

        threads = min(self.threads, len(shares))
        others = [self._others.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()
        return np.concatenate(logits)
