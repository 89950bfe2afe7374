"""A tiny data set that a tiny Mixer learns in seconds: colored shapes in folders per class."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")
# A model and a recipe that take milliseconds a step.
QUICK = [
    *("--image-size", "16", "--patch", "4", "--hidden", "16", "--blocks", "2"),
    *("--token-mlp", "8", "--channel-mlp", "16", "--batch-size", "16", "--epochs", "3"),
    *("--lr", "0.01", "--warmup-epochs", "0", "--ema", "0.5", "--weight-decay", "0"),
    *("--no-compile", "--threads", "1"),
]
# Without this an epoch or two would not do.
MILD = ["--crop-area", "1", "--randaugment-layers", "0", "--mixup", "0", "--stochastic-depth", "0"]


def picture(channel: int, seed: int, side: int = 20) -> bytes:
    """Return a PNG of noise that is brightest in one color."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 100, (side, side, 3), dtype=np.uint8)
    pixels[..., channel] += 120
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(root: Path, count: int, splits: tuple[str, ...] = ("train", "test")) -> Path:
    """Write `count` pictures per split and class; an empty name is a data set without splits."""
    for number, split in enumerate(splits):
        for channel, name in enumerate(reversed(CLASSES)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                data = picture(channel, 1000 * number + 100 * channel + i)
                (folder / f"{i:03}.png").write_bytes(data)
    return root


def write_tar(folder: Path, archive: Path) -> Path:
    """Pack `folder` under its own name; the suffix of `archive` says how to compress."""
    suffix = archive.suffix[1:]
    with tarfile.open(archive, "w" if suffix == "tar" else f"w:{suffix}") as tar:  # type: ignore[call-overload] # the stubs list literals
        tar.add(folder, arcname=folder.name)
    return archive
