"""The uploads: real JPEGs where they are at hand, photo-like ones where not."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

# The generated ones are like the real ones: 500 × 375 pixels and about 110 kB.
SIZE = (500, 375)
QUALITY = 92
COUNT = 32


def load_photos(source: Path) -> list[bytes]:
    """Return the JPEG files of a folder or tar archive; generated ones if it is absent."""
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix.lower() in _SUFFIXES)
        return [path.read_bytes() for path in files]
    if source.is_file():
        with tarfile.open(source) as archive:
            members = [m for m in archive if m.isfile() and m.name.lower().endswith(_SUFFIXES)]
            members.sort(key=lambda member: member.name)
            return [archive.extractfile(m).read() for m in members]  # type: ignore[union-attr] # files
    return [_generate(np.random.default_rng(seed)) for seed in range(COUNT)]


_SUFFIXES = (".jpg", ".jpeg")


def _generate(rng: np.random.Generator) -> bytes:
    """Draw smooth fields with ever finer detail, as photos have, and sensor noise."""
    pixels = np.full((SIZE[1], SIZE[0], 3), 128.0)
    for octave, cells in enumerate((2, 5, 12, 32, 90)):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(grid.resize(SIZE, Image.Resampling.BICUBIC)) - 127.5) / 1.7**octave
    pixels += rng.normal(0, 18, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
