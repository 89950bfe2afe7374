"""Why this label: hide a part of the image, and see how much less sure the model is.

Occlusion (Zeiler and Fergus 2014, section 4.2) with whole patches: a Mixer sees an image as
patches, so they are its natural unit. The work runs through the same engine, in its spare time.
"""

import asyncio
import io
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.batcher import SPARE_BATCH_S
from app.classifier import Classifier
from app.decoder import Task
from app.decoder_link import DecoderLink
from app.errors import DeadlineExceeded, Problem, QueueFull
from app.images import Picture
from app.latency import LatencyTable
from app.model_card import Preprocessing
from app.predictions import softmax
from app.settings import Settings

# What one explanation may take of an idle engine; larger cells are hidden where patches cost more.
BUDGET_S = 2.0
# And at most so many inferences: a ViT-sized grid of 16 × 16 patches.
MAX_OCCLUSIONS = 256
# Predicted wait of a request from which on the service has no time to explain.
BUSY_S = 0.1
# The overlay's smallest side in pixels, for models that see stamps.
OVERLAY_SIDE = 448
NOISE = 0.01  # nats of log-probability that no cell need matter
CHUNK = 16  # occluded copies held at once: 150 kB each at 224 px


@dataclass(frozen=True, slots=True)
class Explanation:
    """How much each cell of the model's view speaks for one label."""

    picture: Picture
    index: int  # of the label that is explained
    score: float  # its probability, nothing hidden
    importance: NDArray[np.float64]  # [rows, columns], nats of log-probability lost when hidden
    cell_pixels: int  # side of a cell, in pixels of the model's view


class Explainer:
    """Explains one image at a time; refuses while requests wait."""

    def __init__(self, classifier: Classifier, settings: Settings, latency: LatencyTable) -> None:
        self._classifier = classifier
        self._settings = settings
        self._latency = latency
        self._running = False

    async def explain(self, upload: bytes, deadline: float, index: int | None) -> Explanation:
        """Return why the upload gets its best label, or the label at `index`; inside `only_one`.

        `deadline` is in seconds of `time.monotonic()`.

        Raises:
            Problem: as for classifying the upload.
        """
        grid = _grid_side(self._classifier.card.preprocessing)
        cell = self._cell(grid, deadline - time.monotonic())
        [result] = await self._classifier.classify([upload], deadline)
        if isinstance(result, Problem):
            raise result
        chosen = int(result.logits.argmax()) if index is None else index
        before = _log_probability(result.logits, chosen)
        side = -(-grid // cell)
        lost: list[float] = []
        for start in range(0, side * side, CHUNK):
            cells = range(start, min(start + CHUNK, side * side))
            hidden = [_hide(result.picture, grid, cell, *divmod(number, side)) for number in cells]
            logits = await self._classifier.infer_spare(hidden, deadline)
            lost += [before - _log_probability(row, chosen) for row in logits]
        return Explanation(
            result.picture,
            chosen,
            float(np.exp(before)),
            np.array(lost).reshape(side, side),
            cell * self._classifier.card.preprocessing.patch_size,
        )

    async def overlay(self, upload: bytes, explanation: Explanation, deadline: float) -> bytes:
        """Return a PNG of what the model sees, bright where it looks.

        Raises:
            DeadlineExceeded: it was not done before `deadline`.
            QueueFull, Problem: as for classifying the upload.
        """
        preprocessing = self._classifier.card.preprocessing
        max_pixels = self._settings.max_pixels
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._classifier.in_decoder(
                    lambda: _overlay(upload, explanation, preprocessing, max_pixels), deadline
                )
        except TimeoutError:
            raise DeadlineExceeded("The picture was not drawn in time.") from None

    @contextmanager
    def only_one(self, waiting: int) -> Iterator[None]:
        """Keep other explanations out, picture and all; `waiting` are the images in the queue.

        Raises:
            QueueFull: another explanation runs, or requests would wait for this one.
        """
        if self._running or self._classifier.work_in_decoders:
            raise QueueFull("Another explanation is under way.", math.ceil(BUDGET_S), "explaining")
        wait_s = self._latency.wait_s(waiting)
        if wait_s > BUSY_S:
            raise QueueFull(
                "The service is busy classifying.", max(1, math.ceil(wait_s)), "explaining"
            )
        self._running = True
        try:
            yield
        finally:
            self._running = False

    def _cell(self, grid: int, left_s: float) -> int:
        """Return the side, in patches, of the smallest cells that keep to budget and deadline.

        Raises:
            DeadlineExceeded: `left_s` seconds are too few even for the largest.
        """
        left_s -= self._latency.service_s(1)
        for cell in range(1, grid + 1):
            count = (-(-grid // cell)) ** 2
            takes_s = self._latency.spare_s(count, SPARE_BATCH_S)
            if count <= MAX_OCCLUSIONS and takes_s <= min(BUDGET_S, left_s):
                return cell
        if takes_s > left_s:
            raise DeadlineExceeded(
                f"An explanation takes another {takes_s * 1000:.0f} ms after the classification, "
                f"and the request has {max(0.0, left_s) * 1000:.0f} ms."
            )
        return grid


def _grid_side(preprocessing: Preprocessing) -> int:
    return preprocessing.image_size // preprocessing.patch_size


def _log_probability(logits: NDArray[np.float32], index: int) -> float:
    return float(np.log(max(softmax(logits)[index], 1e-30)))


def _hide(picture: Picture, grid: int, cell: int, row: int, column: int) -> Picture:
    """Return the picture with one cell painted in the picture's mean color."""
    patches = picture.patches.reshape(grid, grid, -1, 3)  # [row, column, pixel, RGB]
    hidden = patches.copy()
    rows, columns = (slice(n * cell, (n + 1) * cell) for n in (row, column))
    hidden[rows, columns] = patches.reshape(-1, 3).mean(axis=0).round()
    return Picture(
        picture.format, picture.width, picture.height, hidden.reshape(picture.patches.shape)
    )


def _overlay(
    upload: bytes, explanation: Explanation, preprocessing: Preprocessing, max_pixels: int
) -> bytes:
    """Decode the model's view once more at a size for eyes, and darken what did not matter."""
    scale = -(-OVERLAY_SIDE // preprocessing.image_size)
    large = preprocessing.model_copy(update={"image_size": preprocessing.image_size * scale})
    task = Task(preprocessing=large, max_pixels=max_pixels, max_bytes=len(upload))
    with closing(DecoderLink(task)) as decoder:
        view = _unpatchify(decoder.decode(upload).patches, large)
    heat = _heat(explanation, preprocessing.image_size)
    cell = explanation.cell_pixels * scale
    covered = (heat.shape[1] * cell, heat.shape[0] * cell)
    mask = (
        Image.fromarray(heat.astype(np.uint8))
        .resize(covered, Image.Resampling.BICUBIC)
        .crop((0, 0, *view.size))
    )
    night = Image.new("RGB", view.size, "#101418")
    veil = Image.blend(view.convert("L").convert("RGB"), night, 0.65)
    buffer = io.BytesIO()
    Image.composite(view, veil, mask).save(buffer, "PNG")
    return buffer.getvalue()


def _heat(explanation: Explanation, image_size: int) -> NDArray[np.float64]:
    """Return how bright each cell is, 0 to 255: [rows, columns] as `importance` has them."""
    importance = explanation.importance.copy()
    # A last cell that is cut hides less than the others: what it would matter at their size counts.
    cut = explanation.cell_pixels / (image_size - (len(importance) - 1) * explanation.cell_pixels)
    importance[-1] *= cut
    importance[:, -1] *= cut
    # Nothing is bright where all that any cell moves is noise, or speaks against the label.
    largest = max(float(np.abs(importance).max()), NOISE)
    # The square root brings out what matters second most, as the eye expects of a picture.
    return np.sqrt(np.clip(importance, 0, None) / largest) * 255


def _unpatchify(patches: NDArray[np.uint8], preprocessing: Preprocessing) -> Image.Image:
    """Return the image of patches uint8 [tokens, P·P·3]; the inverse of images.patchify."""
    grid, size = _grid_side(preprocessing), preprocessing.patch_size
    cut = patches.reshape(grid, grid, size, size, 3)  # [row, column, y, x, 3]
    pixels = cut.transpose(0, 2, 1, 3, 4).reshape(grid * size, grid * size, 3)
    return Image.fromarray(np.ascontiguousarray(pixels))
