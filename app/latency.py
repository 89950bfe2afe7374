"""How long the work takes here, measured while it runs, and what an arrival may expect.

A Mixer's cost is a function of the batch size alone, so a table of seconds per batch size, kept
current, predicts the wait of every arrival.
"""

import io
import itertools
import time
from copy import copy
from typing import Protocol

import numpy as np
from PIL import Image

from app.engine import Engine, too_large
from app.images import decode

# Weight of the newest measurement: about ten batches after a change the table has followed it.
FRESHNESS = 0.2
# A measurement counts as at most this many times what was expected: one hostile image that takes
# seconds to decode must not have everyone after it refused.
SURPRISE = 4.0
# Without a batch for so long, or one of that size, what was measured last may no longer hold.
RESTED_S = 1.0
LONG_S = 2.0  # a warm-up does not go on to twice as many images: an orchestrator waits for it
RELAX_S = 0.1  # between two looks at which sizes those are


class Took(Protocol):
    """Takes in how long something took, or `at_least`."""

    def __call__(self, seconds: float, *, at_least: bool = False) -> None: ...  # noqa: D102 - above


class LatencyTable:
    """Seconds per batch size, decoded image and long answer; threads write, the loop reads.

    `observe_batch` is for one thread at a time, which the batcher's lock sees to. What the loop
    reads is replaced whole, and a decode's measurement lost between two threads does not matter.
    """

    def __init__(self, max_batch: int, decode_threads: int, batches_at_once: int = 1) -> None:
        self._max_batch = max_batch
        self._batches_at_once = batches_at_once
        self._decode_threads = decode_threads
        self._measured = {0: 0.0}
        self._seconds = [0.0] * (max_batch + 1)  # by batch size, between measured ones interpolated
        self._decode_s = 0.0
        self._answers = (0.1, 0.1)  # seconds taken and expected, of the last long ones
        self._observed = 0.0  # time.monotonic() seconds
        self._seen: dict[int, float] = {}  # likewise, by batch size
        self._relaxed = 0.0  # likewise
        self._calm: LatencyTable | None = None  # as it was once warm

    def observe_batch(self, images: int, seconds: float) -> None:
        """Take in the duration of one inference."""
        now = self._observed = self._seen[images] = time.monotonic()
        self._measured[images] = _follow(self._measured.get(images, seconds), seconds)
        sizes = sorted(self._measured)
        at = sizes.index(images)
        changed = sizes[at - 1 : at + 2]  # only what lies between a size and its neighbours
        if self._calm is not None and now - self._relaxed > RELAX_S:
            self._relaxed, changed = now, sizes
            self._relax(self._measured[images] / max(self._calm.inference_s(images), 1e-9))
        table = self._seconds.copy()
        for low, high in itertools.pairwise(changed):
            low_s, high_s = self._measured[low], self._measured[high]
            step = (high_s - low_s) / (high - low)
            table[low:high] = [low_s + step * more for more in range(high - low)]
        last = changed[-1]
        count = len(table) - last if last == sizes[-1] else 1
        table[last : last + count] = [self._measured[last]] * count
        self._seconds = table

    def _relax(self, pace: float) -> None:
        """Let sizes come down that nobody has measured for a while, as slow now as `pace` says.

        A size that a slow spell has made dear is refused, and what is refused measures nothing.
        """
        assert self._calm is not None
        for size, seen in self._seen.items():
            if self._observed - seen > RESTED_S:
                above_s = self._measured[size] - pace * self._calm.inference_s(size)
                self._measured[size] -= FRESHNESS * max(0.0, above_s)

    def observe_decode(self, seconds: float) -> None:
        """Take in the duration of one decode."""
        self._decode_s = _follow(self._decode_s or seconds, seconds)

    def observe_answer(self, expected_s: float, seconds: float, *, at_least: bool = False) -> None:
        """Take in how long a long answer was put together; for one thread at a time.

        One that was given up tells something only if it has taken longer than was expected.
        """
        if at_least and seconds <= self.answer_s(expected_s):
            return
        seconds = min(seconds, SURPRISE * self.answer_s(expected_s))
        taken_s, before_s = self._answers
        self._answers = (
            taken_s + FRESHNESS * (seconds - taken_s),
            before_s + FRESHNESS * (expected_s - before_s),
        )

    def answer_s(self, expected_s: float) -> float:
        """Return the seconds that a long answer takes here now, `expected_s` on a usual machine."""
        taken_s, before_s = self._answers
        return expected_s * taken_s / before_s

    def service_s(self, images: int) -> float:
        """Return the seconds that `images` take on an idle service."""
        return self._alone_s(images) + self.inference_s(images)

    def stay_calm(self) -> None:
        """Keep what is known now as what an idle service can do."""
        self._calm = copy(self)

    def could_do(self, images: int, seconds: float) -> bool:
        """Return whether an idle service may manage what by its last measurements it could not.

        What the last pictures took to decode says little about the next one. And requests that are
        refused measure nothing: after a slow spell of the engine, those in a hurry would else be
        refused for ever.
        """
        if self._calm is None:
            return False
        has_rested = time.monotonic() - self._observed > RESTED_S
        engine = self._calm if has_rested else self
        return self._calm._alone_s(images) + engine.inference_s(images) <= seconds

    def wait_s(self, pending: int) -> float:
        """Return the seconds until `pending` images, all admitted before, are answered.

        Decoding and inference go on side by side, so the slower of the two sets the pace.
        """
        return max(self.decoding_s(pending), self.inference_s(pending))

    def decoding_s(self, pending: int) -> float:
        """Return the seconds until `pending` images, all admitted before, are decoded."""
        return self._decode_s * pending / self._decode_threads

    def spare_s(self, images: int, piece_s: float) -> float:
        """Return the seconds that `images` take in inferences of at most `piece_s` each."""
        size = self.images_within(piece_s)
        return -(-images // size) * self._seconds[size]

    def images_within(self, seconds: float) -> int:
        """Return how many images one inference of at most `seconds` holds; at least one."""
        sizes = range(self._max_batch, 1, -1)
        return next((size for size in sizes if self._seconds[size] <= seconds), 1)

    def inference_s(self, images: int) -> float:
        """Return the seconds that `images` take in the engine alone, in full batches."""
        full, rest = divmod(images, self._max_batch)
        rounds, more = divmod(full, self._batches_at_once)
        last_s = self._seconds[self._max_batch if more else rest]
        return rounds * self._seconds[self._max_batch] + last_s

    def _alone_s(self, images: int) -> float:
        """Return the seconds that `images` take to decode on an idle service."""
        return self._decode_s + self.decoding_s(images - 1)


def _follow(known: float, seconds: float) -> float:
    return known + FRESHNESS * (min(seconds, SURPRISE * known) - known)


def batches_at_once(engine: Engine, max_batch: int) -> int:
    """Return how many full batches the engine's threads infer side by side."""
    shares = engine.cut(max_batch)
    return 1 if any(share.is_wide for share in shares) else max(1, engine.threads // len(shares))


def warm_up(engine: Engine, max_batch: int, latency: LatencyTable) -> None:
    """Decode an image and run every doubling of the batch size: no request pays for a first time.

    The first decode loads Pillow, the first run of a size allocates; the second is measured.

    Raises:
        StartupError: the device has no room for a batch of `max_batch`, or of fewer.
    """
    preprocessing = engine.card.preprocessing
    sample = io.BytesIO()
    Image.new("RGB", (512, 512)).save(sample, "JPEG")
    for _ in range(2):
        start = time.perf_counter()
        decode(sample.getvalue(), preprocessing, 512 * 512)
    latency.observe_decode(time.perf_counter() - start)
    size = 1
    while size < 2 * max_batch:
        images = min(size, max_batch)
        patches = np.zeros((images, preprocessing.tokens, preprocessing.patch_bytes), np.uint8)
        try:
            engine.run(patches)
            start = time.perf_counter()
            engine.run(patches)
        except Exception as error:  # onnxruntime raises a class of its own for each status
            raise too_large(images, engine.provider, error) from error
        took_s = time.perf_counter() - start
        latency.observe_batch(images, took_s)
        if took_s > LONG_S and images < max_batch:  # a CPU's time, which grows with the images
            latency.observe_batch(max_batch, took_s * max_batch / images)
            break
        size *= 2
    latency.stay_calm()
