"""A data set of one's own, an ImageFolder or a tar of one: which picture is where, of what class.

Nothing here needs torch.
"""

import hashlib
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from model_export.errors import ExportError

_TRAIN = "train"
_TEST = ("test", "val", "validation")


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


def find(path: Path) -> Listing:
    """List an ImageFolder, `train/<class>/…` with `test/` or `val/`, or `<class>/…` alone.

    Raises:
        ExportError: it cannot be read, or has fewer than two classes, or an empty one.
    """
    files, folders = walk(path)
    if not files:
        raise ExportError(f"{path}: is empty")
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


def walk(path: Path) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """List all files and all folders in a folder or a tar, hidden ones left out, sorted.

    Raises:
        ExportError: it is missing or cannot be read.
    """
    try:
        return _walk_folder(path) if path.is_dir() else _walk_tar(path)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: no such folder or tar") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ExportError(f"{path}: not a readable folder or tar ({reason})") from error


def read(path: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
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
