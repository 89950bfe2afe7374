"""Synthetic pictures that behave like photos; one is the golden, and how far it may be off."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.images import patchify
from app.model_card import Golden, ModelCard, Preprocessing
from model_export.errors import ExportError

# Photos have most of their contrast in large shapes and less of it in every finer detail:
# random color grids of so many cells a side, each weighing half of the one before.
_CELLS = (2, 5, 12, 32)

# Largest |Δlogit| / largest |logit| of the golden that is still the same model. Measured on the
# embedded model and a B/16: float32 against float64 6e-7, so another CPU or GPU passes; TF32 4e-4,
# a wrong GELU form 1.6e-4 and more, so a wrong runtime does not. Half has TF32's mantissa, but
# rounds each result to it as well.
GOLDEN_SHARE = {"fp32": 1e-4, "fp16": 1e-2}


def photo_like(count: int, preprocessing: Preprocessing, seed: int) -> NDArray[np.uint8]:
    """Draw `count` pictures as patches uint8 [count, tokens, P·P·3]; `seed` fixes them."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            patchify(_picture(rng, preprocessing.image_size), preprocessing.patch_size)
            for _ in range(count)
        ]
    )


def tolerated_share(card: ModelCard, golden: Golden, source: str) -> float:
    """Return what part of the largest of its golden sample's logits a model may be off by.

    Raises:
        ExportError: they are all zero, and nothing else tells.
    """
    largest = float(np.abs(golden.logits()).max())
    if largest > golden.tolerance:
        return golden.tolerance / largest
    if card.precision not in GOLDEN_SHARE:
        raise ExportError(
            f"{source}: its head is all zeros, so nothing tells what {card.precision} costs; "
            "adapt a file in float32 or fp16"
        )
    return GOLDEN_SHARE[card.precision]


def _picture(rng: np.random.Generator, side: int) -> Image.Image:
    """Draw one RGB picture: smooth color fields, an object with a sharp edge, sensor noise."""
    pixels = np.full((side, side, 3), 128.0)
    for octave, cells in enumerate(_CELLS):
        grid = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        field = Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)
        pixels += (np.asarray(field, np.float64) - 127.5) / 2**octave
    y, x = np.mgrid[:side, :side] / side
    center, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.3)
    inside = (y - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2
    pixels[inside] += rng.uniform(-100, 100, 3)
    pixels += rng.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
