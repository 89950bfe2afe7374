"""An engine without a model, and images made on the spot."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.model_card import ModelCard, Preprocessing
from app.shares import Share

Color = tuple[int, int, int]


def make_card(labels: tuple[str, ...] = ("red", "green", "blue"), image_size: int = 8) -> ModelCard:
    """Return the card of a model whose patches are 4 × 4 pixels."""
    return ModelCard(
        name="fake",
        version="0" * 12,
        variant="test",
        parameters=1,
        preprocessing=Preprocessing(
            image_size=image_size, patch_size=4, crop_fraction=1.0, interpolation="bilinear"
        ),
        labels=labels,
        source="tests",
        checksum="0" * 64,
    )


@dataclass
class FakeEngine:
    """Answers each image with its mean color as logits, after a fixed time per batch."""

    card: ModelCard = field(default_factory=make_card)
    provider: str = "FakeExecutionProvider"
    threads: int = 1
    seconds: float = 0.0
    batches: list[int] = field(default_factory=list)
    fault: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None

    def cut(self, images: int) -> list[Share]:
        """Return shares of an equal size, one for each thread."""
        count = min(self.threads, images)
        return [Share((images + count - 1 - number) // count) for number in range(count)]

    def stack(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return patches uint8 [share, tokens, P·P·3] of single pictures."""
        return np.stack(pictures)

    def infer(self, patches: NDArray[np.uint8], share: Share) -> NDArray[np.float32]:
        """Return what `run` does."""
        del share  # all there is
        return self.run(patches)

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the mean color over 10 as logits float32 [batch, 3], over and over for more."""
        self.batches.append(len(patches))
        time.sleep(self.seconds)  # releases the GIL, as a GPU would
        logits = patches.reshape(len(patches), -1, 3).mean(axis=1).astype(np.float32) / 10
        logits = np.tile(logits, (1, len(self.card.labels) // 3))
        return logits if self.fault is None else self.fault(logits)


def make_image(color: Color = (255, 0, 0), file_format: str = "PNG", side: int = 16) -> bytes:
    """Return an image file of one color."""
    return encode(Image.new("RGB", (side, side), color), file_format)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """Return `image` as a file of `file_format`."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
