"""The pictures of a data set, decoded once into uint8 arrays, by the server's own pipeline.

Nothing here needs torch.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from app.errors import Problem
from app.images import decode
from app.model_card import Preprocessing
from model_export.dataset import Listing, oversized, read
from model_export.errors import ExportError
from model_export.pictures import MAX_PIXELS

# Above this, decoded pictures lie in a file that the system pages in and out: 2 GiB leave room on
# an 8 GiB machine and hold 14,000 pictures of 224 px, or all of CIFAR-10 eleven times.
MEMORY_BYTES = 2 << 30
_READ_AHEAD = 32  # encoded pictures in memory at once, or two for each thread


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures of one split."""

    pixels: NDArray[np.uint8]  # [n, H, H, 3]
    labels: NDArray[np.int64]  # [n]

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self.labels)


@dataclass(frozen=True)
class Skipped:
    """A file that is no picture we can read."""

    name: str
    reason: str


def load(
    listing: Listing, train: Preprocessing, test: Preprocessing, scratch: Path, threads: int
) -> tuple[Pictures, Pictures, list[Skipped]]:
    """Decode both splits through the server's image pipeline, with a progress bar.

    Args:
        listing: what to decode.
        train: how; one patch is the whole picture.
        test: likewise for the pictures to measure on.
        scratch: folder for what is larger than MEMORY_BYTES.
        threads: pictures decoded at once.

    Raises:
        ExportError: a class has no readable picture, or the disk is too small.
    """
    names = (listing.train, listing.test)
    arrays = [
        _allocate(len(part), how.image_size, scratch)
        for part, how in zip(names, (train, test), strict=True)
    ]
    plan = {
        name: (array, row, how)
        for part, array, how in zip(names, arrays, (train, test), strict=True)
        for row, (name, _) in enumerate(part)
    }
    skipped = [
        Skipped(name, f"has {size} bytes, more than any picture")
        for name, size in oversized(listing.path, plan)
    ]
    for large in skipped:
        del plan[large.name]

    def place(name: str, data: bytes) -> Skipped | None:
        array, row, how = plan[name]
        try:
            array[row] = decode(data, how, MAX_PIXELS).patches.reshape(array.shape[1:])
        except Problem as problem:
            return Skipped(name, problem.detail)
        return None

    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(plan), desc="decoding", unit="img", leave=False, disable=None) as bar,
    ):
        contents = read(listing.path, plan)
        while chunk := list(islice(contents, max(_READ_AHEAD, 2 * threads))):
            skipped += [bad for bad in pool.map(place, *zip(*chunk, strict=True)) if bad]
            bar.update(len(chunk))
            del chunk  # before the next one is read
    bad = {one.name for one in skipped}
    pictures = [_keep(array, part, bad) for array, part in zip(arrays, names, strict=True)]
    filled = set(pictures[0].labels.tolist())
    labels = dict(listing.train)
    for index, name in enumerate(listing.classes):
        if index not in filled:
            first = next(one for one in skipped if labels.get(one.name) == index)
            raise ExportError(
                f"{listing.path}: class {name} has no readable picture to train on "
                f"({first.name}: {first.reason})"
            )
    return pictures[0], pictures[1], skipped


def check_skipped(before: Collection[str], now: Collection[Skipped]) -> None:
    """See whether the files that are no readable pictures are those of `before`.

    Raises:
        ExportError: one can be read by now, or no longer; the run would go on with other pictures.
    """
    names = {one.name for one in now}
    for name in sorted(names.symmetric_difference(before)):
        change = (
            "began with a picture that cannot be read any longer"
            if name in names
            else "skipped a file that can be read by now"
        )
        raise ExportError(
            f"--resume: the run {change}, {name}; put the old one back, or start another run with "
            "another -o"
        )


def _allocate(count: int, side: int, scratch: Path) -> NDArray[np.uint8]:
    """Return room for pictures uint8 [count, side, side, 3], in memory or in an unlinked file."""
    shape, size = (count, side, side, 3), count * side * side * 3
    if size <= MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    too_large = (
        f"the decoded pictures take {size / 1e9:.1f} GB, more than memory may hold "
        f"({MEMORY_BYTES / 1e9:.1f} GB) and more than the disk of {scratch} has free"
    )
    if size > shutil.disk_usage(scratch).free:
        raise ExportError(too_large)
    with tempfile.TemporaryFile(dir=scratch) as file:  # gone with the process, even a killed one
        file.truncate(size)
        # A hole that finds no room when it is written to ends the process by a signal.
        try:
            if hasattr(os, "posix_fallocate"):  # macOS has no such call
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:  # or a file system cannot
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ExportError(too_large) from error
        return np.memmap(file, np.uint8, "r+", shape=shape)


def _keep(array: NDArray[np.uint8], names: tuple[tuple[str, int], ...], bad: set[str]) -> Pictures:
    """Close the gaps that unreadable pictures left."""
    rows = [row for row, (name, _) in enumerate(names) if name not in bad]
    for new, old in enumerate(rows):
        if new != old:
            array[new] = array[old]
    labels = np.array([names[row][1] for row in rows], np.int64)
    return Pictures(array[: len(rows)], labels)
