"""RandAugment (arXiv:1909.13719) on a whole batch: each image gets its own random operations.

Operations are those of the paper, with Pillow's arithmetic, on float [n, 3, H, H] from 0 to 255.
Each strength is drawn from 0 to the recipe's magnitude instead of being that magnitude always, so
that images between unchanged and strongly changed are seen.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model_export.augment import put, sample
from model_export.recipe import Recipe

_GREY = 128.0  # what comes in from beyond the edge
_TURN = np.pi / 6  # strongest of each kind: 30 degrees,
_SHEAR = 0.3  # of the image's side
_MOVE = 0.45  # of the image's side: TensorFlow's 100 of 224 pixels
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow converts to grey
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]])  # Pillow's ImageFilter.SMOOTH


def randaugment(images: Tensor, recipe: Recipe, rng: np.random.Generator) -> Tensor:
    """Change float [batch, 3, H, H], 0 to 255, by `recipe.randaugment_layers` operations each."""
    images = images.clone()  # what follows writes into it
    strongest = recipe.randaugment_magnitude / 10
    for _ in range(recipe.randaugment_layers):
        kinds = rng.integers(0, 1 + len(GEOMETRIC) + len(COLORS), len(images))  # 0 changes nothing
        strengths = rng.uniform(-strongest, strongest, len(images))
        images = _geometric(images, kinds, strengths)
        for kind, change in enumerate(COLORS, 1 + len(GEOMETRIC)):
            chosen = np.flatnonzero(kinds == kind)
            if len(chosen):
                where = put(chosen, images.device)
                levels = put(strengths[chosen], images.device, images.dtype)
                images[where] = change(images[where], levels[:, None, None, None])
    return images


def _geometric(images: Tensor, kinds: np.ndarray, strengths: np.ndarray) -> Tensor:
    """Rotate, shear or move the images whose kind says so, all in one sampling."""
    chosen = np.flatnonzero((kinds >= 1) & (kinds <= len(GEOMETRIC)))
    if not len(chosen):
        return images
    theta = np.stack(
        [GEOMETRIC[kinds[i] - 1](strengths[i]) for i in chosen]  # [n, 2, 3]
    )
    where = put(chosen, images.device)
    moved = sample(images[where] - _GREY, theta, images.shape[-1], "zeros") + _GREY
    return images.index_copy(0, where, moved)


def _rotate(s: float) -> np.ndarray:
    cos, sin = np.cos(s * _TURN), np.sin(s * _TURN)
    return np.array([[cos, -sin, 0], [sin, cos, 0]])


def _shear_x(s: float) -> np.ndarray:
    return np.array([[1, s * _SHEAR, 0], [0, 1, 0]])


def _shear_y(s: float) -> np.ndarray:
    return np.array([[1, 0, 0], [s * _SHEAR, 1, 0]])


def _move_x(s: float) -> np.ndarray:
    return np.array([[1, 0, 2 * s * _MOVE], [0, 1, 0]])  # the grid runs from -1 to 1


def _move_y(s: float) -> np.ndarray:
    return np.array([[1, 0, 0], [0, 1, 2 * s * _MOVE]])


def brightness(images: Tensor, s: Tensor) -> Tensor:
    """Darken to black or brighten: Pillow's factor is 1 + 0.9·s, s [n, 1, 1, 1] from -1 to 1."""
    return (images * (1 + 0.9 * s)).clamp(0, 255)


def contrast(images: Tensor, s: Tensor) -> Tensor:
    """Blend with the mean grey of each image by 1 + 0.9·s."""
    mean = (_grey(images).mean(dim=(2, 3), keepdim=True) + 0.5).floor()
    return _blend(mean, images, s)


def color(images: Tensor, s: Tensor) -> Tensor:
    """Blend with the grey image by 1 + 0.9·s."""
    return _blend(_grey(images), images, s)


def sharpness(images: Tensor, s: Tensor) -> Tensor:
    """Blend with the smoothed image (3 by 3, centre 5 of 13) by 1 + 0.9·s; edges stay."""
    weights = put(_SMOOTH / _SMOOTH.sum(), images.device, images.dtype)
    kernel = weights.expand(3, 1, 3, 3)
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = functional.conv2d(images, kernel, groups=3)
    return _blend(smooth, images, s)


def posterize(images: Tensor, s: Tensor) -> Tensor:
    """Keep 8 to 4 bits of each color."""
    step = 2 ** (4 * s.abs()).round()
    return (images / step).floor() * step


def solarize(images: Tensor, s: Tensor) -> Tensor:
    """Invert all values from the threshold 256·(1 - |s|) up."""
    return torch.where(images >= 256 * (1 - s.abs()), 255 - images, images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each color of each image to 0 to 255; a flat color stays."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    flat = high <= low
    return torch.where(flat, images, (images - low) * 255 / (high - low).clamp(min=1e-3))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Flatten the histogram of each color of each image, by Pillow's look-up table."""
    n, height, width = len(images), *images.shape[2:]
    levels = images.round().long().reshape(n * 3, height * width)
    counts = torch.zeros(n * 3, 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))  # [n·3, 256]
    last = counts.gather(1, levels.amax(dim=1, keepdim=True))  # count of the highest level
    step = (height * width - last) // 255  # [n·3, 1]
    below = counts.cumsum(dim=1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    flat = torch.where(step > 0, table.gather(1, levels), levels)
    return flat.reshape(images.shape).to(images.dtype)


def _grey(images: Tensor) -> Tensor:
    luma = put(_LUMA, images.device, images.dtype)[:, None, None]
    return (images * luma).sum(dim=1, keepdim=True).round()  # [n, 1, H, H]


def _blend(base: Tensor, images: Tensor, s: Tensor) -> Tensor:
    return (base + (images - base) * (1 + 0.9 * s)).clamp(0, 255)


GEOMETRIC: tuple[Callable[[float], np.ndarray], ...] = (
    _rotate,
    _shear_x,
    _shear_y,
    _move_x,
    _move_y,
)
COLORS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    brightness,
    contrast,
    color,
    sharpness,
    posterize,
    solarize,
    autocontrast,
    equalize,
)
