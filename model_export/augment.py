"""Random changes to a batch of images, vectorised: crop, flip, mixup, CutMix, and patches.

All randomness comes from one numpy generator per step, so that a step can be repeated exactly.
RandAugment is in randaugment.py.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from app.model_card import Preprocessing
from model_export.recipe import Recipe

# Random resized crops are cut from a picture this much larger than the input: timm's 256 to 224.
_MARGIN = 8 / 7
_RATIO = 4 / 3  # widest to highest of a random resized crop, as in Inception and timm


def stored_side(image_size: int, recipe: Recipe) -> int:
    """Return the side in pixels at which training pictures are kept."""
    return image_size if recipe.crop_area == 1 else math.ceil(image_size * _MARGIN)


def crop(pixels: Tensor, side: int, recipe: Recipe, rng: np.random.Generator) -> Tensor:
    """Crop and mirror uint8 [batch, H, H, 3] at random: float [batch, 3, side, side], 0 to 255."""
    batch = len(pixels)
    mirrored = rng.random(batch) < 0.5 if recipe.flip else np.zeros(batch, bool)
    if recipe.crop_area < 1:
        return _resized_crop(pixels, side, recipe.crop_area, mirrored, rng)
    return _shift(pixels, recipe.crop_shift, mirrored, rng)


def _shift(pixels: Tensor, reach: int, mirrored: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Move each image by up to `reach` pixels; what comes in is reflected at the edge."""
    batch, side = pixels.shape[:2]
    period = max(1, 2 * (side - 1))  # of the reflection: 0 1 2 3 2 1 0 …
    steps = np.arange(side) + rng.integers(-reach, reach + 1, (2, batch, 1))  # [2, batch, side]
    rows, columns = np.abs((steps + side - 1) % period - (side - 1))  # [batch, side] each
    columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
    index = put(np.stack([rows, columns]), pixels.device)
    which = torch.arange(batch, device=pixels.device)[:, None, None]
    moved = pixels[which, index[0][:, :, None], index[1][:, None, :]]  # [batch, side, side, 3]
    return moved.permute(0, 3, 1, 2).float()


def _resized_crop(
    pixels: Tensor, side: int, least: float, mirrored: np.ndarray, rng: np.random.Generator
) -> Tensor:
    """Sample a random part, from `least` to all of the area and of ratio 3:4 to 4:3."""
    batch = len(pixels)
    area = rng.uniform(least, 1, batch)
    ratio = np.exp(rng.uniform(-math.log(_RATIO), math.log(_RATIO), batch))
    width = np.minimum(np.sqrt(area * ratio), 1)  # as a share of the picture's
    height = np.minimum(np.sqrt(area / ratio), 1)
    x, y = rng.uniform(-1, 1, (2, batch)) * (1 - np.stack([width, height]))  # centre, -1 to 1
    theta = np.zeros((batch, 2, 3))
    theta[:, 0, 0], theta[:, 0, 2] = np.where(mirrored, -width, width), x
    theta[:, 1, 1], theta[:, 1, 2] = height, y
    return sample(pixels.permute(0, 3, 1, 2).float(), theta, side, "reflection")


def sample(images: Tensor, theta: np.ndarray, side: int, padding: str) -> Tensor:
    """Sample float [batch, 3, H, W] bilinearly through affine maps [batch, 2, 3]."""
    maps = put(theta, images.device, images.dtype)
    grid = functional.affine_grid(maps, [len(images), 3, side, side], align_corners=False)
    return functional.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def mix(
    images: Tensor, targets: Tensor, recipe: Recipe, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Blend each image with another: CutMix on a share of them, mixup on the rest.

    CutMix (arXiv:1905.04899) pastes a rectangle whose area is uniform; mixup (arXiv:1710.09412)
    blends whole images by a Beta(alpha, alpha).

    Args:
        images: float [batch, 3, H, H].
        targets: float [batch, classes], shares that sum to 1.
        recipe: the shares of both.
        rng: this step's generator.
    """
    batch, side = len(images), images.shape[-1]
    other = put(rng.permutation(batch), images.device)
    keep = rng.beta(recipe.mixup, recipe.mixup, batch) if recipe.mixup else np.ones(batch)
    weight = put(keep, images.device, images.dtype)[:, None, None].expand(-1, side, side)
    cut = rng.random(batch) < recipe.cutmix
    edge = np.sqrt(rng.random(batch))  # of the rectangle, as a share of the image's
    box = np.stack([rng.random((2, batch)) - edge / 2, np.zeros((2, batch))])
    box[1] = box[0] + edge
    corners = np.clip(box * side, 0, side).round()  # [first and last, row and column, batch]
    place = torch.arange(side, device=images.device)
    first, last = put(corners, images.device, images.dtype)[..., None]  # [2, batch, 1] each
    inside = (place >= first) & (place < last)  # [row and column, batch, H]
    pasted = inside[0][:, :, None] & inside[1][:, None, :]  # [batch, H, H]
    is_cut = put(cut, images.device)[:, None, None]
    weight = torch.where(is_cut, 1 - pasted.to(images.dtype), weight)  # share of the own image
    share = weight.mean(dim=(1, 2))[:, None]  # [batch, 1]
    weight = weight[:, None]  # [batch, 1, H, H]
    mixed = weight * images + (1 - weight) * images[other]
    return mixed, share * targets + (1 - share) * targets[other]


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Turn labels int64 [batch] into shares float [batch, classes], smoothed over all classes."""
    return functional.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def to_patches(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalise and cut float [batch, 3, H, H], 0 to 255, into patches float [batch, S, P·P·3]."""
    batch, side = len(images), images.shape[-1]
    patch = preprocessing.patch_size
    mean = put(np.array(preprocessing.mean), images.device, images.dtype)[:, None, None]
    std = put(np.array(preprocessing.std), images.device, images.dtype)[:, None, None]
    grid = side // patch
    cut = ((images / 255 - mean) / std).reshape(batch, 3, grid, patch, grid, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid * grid, -1)  # [batch, S, P·P·3]


def put(values: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy an array to `device` without waiting for what a GPU still has to do.

    CUDA takes a copy of pageable memory before it returns, so that `values` may go at once.
    """
    return torch.from_numpy(values).to(device=device, dtype=dtype, non_blocking=True)
