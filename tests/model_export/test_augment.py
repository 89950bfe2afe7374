"""Augmentations: the operations are Pillow's, and mixing keeps its books."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from app.images import patchify
from app.model_card import Preprocessing
from model_export import augment, randaugment
from model_export.recipe import Recipe

S = 0.4  # strength of an operation, from -1 to 1


def pictures(count: int = 3, side: int = 24) -> np.ndarray:
    """Return smooth random pictures uint8 [count, side, side, 3] that use a part of the scale."""
    rng = np.random.default_rng(3)
    small = rng.integers(20, 230, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(p).resize((side, side))) for p in small])


def as_images(pixels: np.ndarray) -> Tensor:
    """Return float [n, 3, H, H] from uint8 [n, H, H, 3]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize(
    ("ours", "pillows"),
    [
        (randaugment.brightness, lambda i: ImageEnhance.Brightness(i).enhance(1 + 0.9 * S)),
        (randaugment.contrast, lambda i: ImageEnhance.Contrast(i).enhance(1 + 0.9 * S)),
        (randaugment.color, lambda i: ImageEnhance.Color(i).enhance(1 + 0.9 * S)),
        (randaugment.sharpness, lambda i: ImageEnhance.Sharpness(i).enhance(1 + 0.9 * S)),
        (randaugment.posterize, lambda i: ImageOps.posterize(i, 6)),
        (randaugment.solarize, lambda i: ImageOps.solarize(i, 154)),
        (randaugment.autocontrast, ImageOps.autocontrast),
        (randaugment.equalize, ImageOps.equalize),
    ],
)
def test_operation_is_pillows(
    ours: Callable[[Tensor, Tensor], Tensor], pillows: Callable[[Image.Image], Image.Image]
) -> None:
    """Each color operation on a batch gives what Pillow gives image by image, within rounding."""
    pixels = pictures()
    got = ours(as_images(pixels), torch.full((len(pixels), 1, 1, 1), S))
    for mine, source in zip(got, pixels, strict=True):
        expected = np.asarray(pillows(Image.fromarray(source))).astype(float)
        assert np.abs(mine.permute(1, 2, 0).numpy() - expected).max() <= 1.5


def test_quarter_turns_and_moves_are_exact() -> None:
    """An affine map of a quarter turn, or of two pixels, moves pixels where they belong."""
    images = as_images(pictures())
    turned = augment.sample(images, np.tile([[0, -1, 0], [1, 0, 0]], (3, 1, 1)), 24, "zeros")
    assert torch.allclose(turned, images.rot90(1, (2, 3)), atol=1e-2)
    moved = augment.sample(images, np.tile([[1, 0, 2 * 2 / 24], [0, 1, 0]], (3, 1, 1)), 24, "zeros")
    assert torch.allclose(moved[..., :-2], images[..., 2:], atol=1e-2)


def test_same_generator_same_batch() -> None:
    """The same seed changes a batch in the same way, another seed in another."""
    images = as_images(pictures(16))
    first, again, other = (
        randaugment.randaugment(images, Recipe(), np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= -0.01
    assert first.max() <= 255.01


def test_no_layers_change_nothing() -> None:
    """Without layers RandAugment leaves every pixel."""
    images = as_images(pictures())
    recipe = Recipe(randaugment_layers=0)
    assert torch.equal(randaugment.randaugment(images, recipe, np.random.default_rng(0)), images)


def test_shift_reflects_at_the_edge() -> None:
    """A shifted image is a window into the picture mirrored at its edges, or the mirror of one."""
    pixels = pictures(8)
    recipe = Recipe(crop_area=1, crop_shift=4)
    moved = augment.crop(torch.from_numpy(pixels), 24, recipe, np.random.default_rng(0))
    seen = set()
    for source, got in zip(pixels, moved.permute(0, 2, 3, 1).numpy(), strict=True):
        wide = np.pad(source, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        windows = {
            (y, x, step): wide[y : y + 24, x : x + 24][:, ::step]
            for y in range(9)
            for x in range(9)
            for step in (1, -1)
        }
        fits = [place for place, window in windows.items() if np.array_equal(window, got)]
        assert fits
        seen.add(fits[0])
    assert len(seen) > 4
    assert {step for _, _, step in seen} == {1, -1}


def test_whole_crop_is_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A square crop of all the area is the picture itself, or its mirror image."""
    monkeypatch.setattr(augment, "_RATIO", 1)
    pixels = pictures(8)
    recipe = Recipe(crop_area=0.999999)
    got = augment.crop(torch.from_numpy(pixels), 24, recipe, np.random.default_rng(0))
    images = as_images(pixels)
    for mine, source in zip(got, images, strict=True):
        assert min(float((mine - one).abs().max()) for one in (source, source.flip(2))) < 0.01


@pytest.mark.parametrize("recipe", [Recipe(mixup=0, cutmix=1), Recipe(mixup=0.5, cutmix=0.5)])
def test_targets_follow_the_pixels(recipe: Recipe) -> None:
    """After CutMix or mixup an image's target is the share that each source has of its pixels."""
    classes = 6
    targets = torch.eye(classes)
    # Image i is 1 in nothing but its class's share: a one-color image per class.
    levels = torch.arange(classes).float()
    images = levels[:, None, None, None].expand(-1, 3, 32, 32)
    mixed, shares = augment.mix(images, targets, recipe, np.random.default_rng(5))
    assert torch.allclose(shares.sum(dim=1), torch.ones(classes))
    assert torch.allclose(mixed.mean(dim=(1, 2, 3)), shares @ levels, atol=1e-4)
    assert (shares.max(dim=1).values < 1).any()


def test_without_mixing_nothing_is_mixed() -> None:
    """Mixup 0 and CutMix 0 leave images and targets as they are."""
    images, targets = as_images(pictures()), torch.eye(3)
    recipe = Recipe(mixup=0, cutmix=0)
    mixed, shares = augment.mix(images, targets, recipe, np.random.default_rng(0))
    assert torch.equal(mixed, images)
    assert torch.equal(shares, targets)


def test_smoothing_spreads_over_all_classes() -> None:
    """Label smoothing of 0.1 over 4 classes leaves 0.925 on the true one and 0.025 elsewhere."""
    got = augment.soft_targets(torch.tensor([2]), 4, 0.1)
    assert torch.allclose(got, torch.tensor([[0.025, 0.025, 0.925, 0.025]]))


def test_patches_are_the_servers() -> None:
    """Training cuts a picture into the patches that the server cuts, normalised."""
    pixels = pictures()
    fed = Preprocessing(image_size=24, patch_size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    ours = augment.to_patches(as_images(pixels), fed)
    for got, source in zip(ours, pixels, strict=True):
        raw = patchify(Image.fromarray(source), 4).reshape(36, 16, 3) / 255  # [S, P·P, 3]
        expected = ((raw - fed.mean) / fed.std).reshape(36, 48)
        assert np.abs(got.numpy() - expected).max() < 1e-5
