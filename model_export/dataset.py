"""A data set of one's own: an ImageFolder or a tar of one, decoded once into uint8 arrays.

Nothing here needs torch.
"""

import hashlib
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from app.errors import Problem
from app.images import decode
from app.model_card import Preprocessing
from model_export.errors import ExportError
from model_export.pictures import MAX_PIXELS

# Above this, decoded pictures lie in a file that the system pages in and out: 2 GiB leave room on
# an 8 GiB machine and hold 14,000 pictures of 224 px, or all of CIFAR-10 eleven times.
MEMORY_BYTES = 2 << 30
_TRAIN = "train"
_TEST = ("test", "val", "validation")
_READ_AHEAD = 256  # encoded pictures in memory at once


@dataclass(frozen=True)
class Listing:
    """What is where in a data set; nothing is decoded yet."""

    path: Path
    classes: tuple[str, ...]  # sorted
    train: tuple[tuple[str, int], ...]  # name and class of every picture
    test: tuple[tuple[str, int], ...]  # empty where the data set has no such split

    def digest(self) -> str:
        """Return a SHA-256 in hex over the names of all pictures and their classes."""
        names = repr((self.classes, self.train, self.test))
        return hashlib.sha256(names.encode()).hexdigest()


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


def find(path: Path) -> Listing:
    """List an ImageFolder, `train/<class>/…` with `test/` or `val/`, or `<class>/…` alone.

    Raises:
        ExportError: it cannot be read, or has fewer than two classes, or an empty one.
    """
    try:
        files, folders = _walk_folder(path) if path.is_dir() else _walk_tar(path)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: no such folder or tar") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ExportError(f"{path}: not a readable folder or tar ({reason})") from error
    root = _root(files)
    splits = {name.parts[len(root)] for name in files if len(name.parts) > len(root) + 1}
    if _TRAIN in splits:
        train = (*root, _TRAIN)
        test = next(((*root, part) for part in _TEST if part in splits), None)
    else:
        train, test = root, None
    classes = {name.parts[len(train)] for name in folders if _inside(name, train)}
    if len(classes) < 2:
        raise ExportError(
            f"{path}: expected a folder for each of two or more classes, found "
            f"{', '.join(sorted(classes)) or 'none'}"
        )
    order = {name: index for index, name in enumerate(sorted(classes))}
    listing = Listing(
        path, tuple(order), _of(files, train, order), _of(files, test, order) if test else ()
    )
    filled = {label for _, label in listing.train}
    for name, index in order.items():
        if index not in filled:
            raise ExportError(f"{path}: class {name} has no pictures")
    return listing


def split(listing: Listing, share: float, seed: int) -> Listing:
    """Move `share` of each class, at least one picture, from train to test.

    Raises:
        ExportError: a class has a single picture.
    """
    rng = np.random.default_rng(seed)
    test: set[int] = set()
    labels = np.array([label for _, label in listing.train])
    for index, name in enumerate(listing.classes):
        mine = rng.permutation(np.flatnonzero(labels == index))
        count = max(1, round(share * len(mine)))
        if count >= len(mine):
            raise ExportError(f"class {name} has {len(mine)} pictures, too few for --val-split")
        test.update(mine[:count].tolist())
    entries = list(enumerate(listing.train))
    return Listing(
        listing.path,
        listing.classes,
        tuple(entry for i, entry in entries if i not in test),
        tuple(entry for i, entry in entries if i in test),
    )


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
    skipped = []

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
        while chunk := list(islice(contents, _READ_AHEAD)):
            skipped += [bad for bad in pool.map(place, *zip(*chunk, strict=True)) if bad]
            bar.update(len(chunk))
    bad = {one.name for one in skipped}
    pictures = [_keep(array, part, bad) for array, part in zip(arrays, names, strict=True)]
    filled = set(pictures[0].labels.tolist())
    for index, name in enumerate(listing.classes):
        if index not in filled:
            raise ExportError(
                f"{listing.path}: class {name} has no readable picture to train on "
                f"({skipped[0].name}: {skipped[0].reason})"
            )
    return pictures[0], pictures[1], skipped


def read(path: Path, names: Mapping[str, object]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files in `names`; a tar is read once, from front to end."""
    if path.is_dir():
        for name in names:
            yield name, (path / name).read_bytes()
        return
    with tarfile.open(path) as archive:
        for member in archive:
            name = str(PurePosixPath(member.name))  # without a leading ./
            file = archive.extractfile(member) if name in names else None
            if file is not None:
                yield name, file.read()


def _walk_folder(path: Path) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    found = sorted(path.rglob("*"))
    if not found:
        raise ExportError(f"{path}: is empty")
    named = [(item, PurePosixPath(item.relative_to(path).as_posix())) for item in found]
    return (
        _visible(name for item, name in named if item.is_file()),
        _visible(name for item, name in named if item.is_dir()),
    )


def _walk_tar(path: Path) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    with tarfile.open(path) as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
    files = _visible(PurePosixPath(m.name) for m in members if m.isfile())
    folders = {PurePosixPath(m.name) for m in members if m.isdir()}
    folders |= {parent for name in files for parent in name.parents}
    return files, _visible(sorted(folders))


def _visible(names: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    return [name for name in names if not any(part.startswith(".") for part in name.parts)]


def _root(files: list[PurePosixPath]) -> tuple[str, ...]:
    """Return the folders that hold everything, as a tar of one folder has them."""
    if not files:
        raise ExportError("the data set holds no files")
    root: tuple[str, ...] = ()
    while True:
        tops = {name.parts[len(root)] for name in files if len(name.parts) > len(root) + 1}
        deep = any(len(name.parts) >= len(root) + 3 for name in files)
        if len(tops) > 1 or tops == {_TRAIN} or not deep:
            return root
        root = (*root, *tops)


def _inside(name: PurePosixPath, folder: tuple[str, ...]) -> bool:
    return name.parts[: len(folder)] == folder and len(name.parts) > len(folder)


def _of(
    files: list[PurePosixPath], folder: tuple[str, ...], order: Mapping[str, int]
) -> tuple[tuple[str, int], ...]:
    depth = len(folder)
    inside = [name for name in files if _inside(name, folder) and len(name.parts) > depth + 1]
    for name in inside:
        if name.parts[depth] not in order:
            raise ExportError(f"{name}: class {name.parts[depth]} has no pictures to train on")
    return tuple((str(name), order[name.parts[depth]]) for name in inside)


def _allocate(count: int, side: int, scratch: Path) -> NDArray[np.uint8]:
    """Return room for pictures uint8 [count, side, side, 3], in memory or in an unlinked file."""
    shape, size = (count, side, side, 3), count * side * side * 3
    if size <= MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    if size > shutil.disk_usage(scratch).free:
        raise ExportError(
            f"the decoded pictures take {size / 1e9:.1f} GB, more than memory may hold "
            f"({MEMORY_BYTES / 1e9:.1f} GB) and more than the disk of {scratch} has free"
        )
    with tempfile.TemporaryFile(dir=scratch) as file:  # gone with the process, even a killed one
        file.truncate(size)
        return np.memmap(file, np.uint8, "r+", shape=shape)


def _keep(array: NDArray[np.uint8], names: tuple[tuple[str, int], ...], bad: set[str]) -> Pictures:
    """Close the gaps that unreadable pictures left."""
    rows = [row for row, (name, _) in enumerate(names) if name not in bad]
    for new, old in enumerate(rows):
        if new != old:
            array[new] = array[old]
    labels = np.array([names[row][1] for row in rows], np.int64)
    return Pictures(array[: len(rows)], labels)
