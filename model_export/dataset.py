"""A data set of one's own, an ImageFolder or a tar of one: which picture is where, of what class.

Nothing here needs torch.
"""

import hashlib
import os
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from app.errors import first_line
from model_export import archive
from model_export.errors import ExportError

_TRAIN = "train"
_LARGEST_BYTES = 256 * 2**20  # of a picture's file
# In any case of letters; where there are several the first is taken.
_TRAINS = (_TRAIN, "training")
_TESTS = ("test", "testing", "val", "valid", "validation")


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
    train, test = _splits(files)
    classes = {name.parts[len(train)] for name in folders if _inside(name, train)}
    for name in sorted(classes):
        if any("\ud800" <= sign <= "\udfff" for sign in name):  # stand for bytes that are no UTF-8
            raise ExportError(f"{path}: the folder {name!a} has no name that can be written")
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
        ExportError: no such share, or a class has a single picture.
    """
    if not 0 < share < 1:
        raise ExportError(f"--val-split {share:g}: expected a share between 0 and 1")
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
    except ExportError:
        raise
    except Exception as error:  # each compression has a class of its own
        raise ExportError(f"{path}: not a readable folder or tar ({first_line(error)})") from error


def oversized(path: Path, names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield name and size of the files that no picture is as large as; a folder may hold videos."""
    if path.is_dir():  # in a tar they are refused
        sizes = ((name, (path / name).stat().st_size) for name in names)
        yield from ((name, size) for name, size in sizes if size > _LARGEST_BYTES)


def read(path: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files in `names`; a tar is read once, from front to end."""
    if path.is_dir():
        for name in names:
            yield name, (path / name).read_bytes()
        return
    files, _ = archive.members(path, path.stat().st_mtime_ns)
    wanted = [(str(name), member) for name, member in files.items() if str(name) in names]
    with tarfile.open(path) as tar:
        for name, member in sorted(wanted, key=lambda pair: pair[1].offset_data):
            if member.size > _LARGEST_BYTES:
                raise ExportError(f"{path}: {name} has {member.size} bytes, more than any picture")
            file = tar.extractfile(member)
            if file is not None:
                yield name, file.read()


def measured(path: Path) -> tuple[str, dict[PurePosixPath, str]]:
    """Return the folder to measure on, and its pictures by name, each with its class.

    That is the split for tests where there is one, else that to train on; "" if it is all there is.

    Raises:
        ExportError: `path` is missing or cannot be read.
    """
    files, _ = walk(path)
    train, test = _splits(files)
    folder = test or train
    return "/".join(folder), _pictures(files, folder)


def _walk_folder(path: Path) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    files, folders = [], []
    pending = [(path, frozenset({os.path.realpath(path)}))]
    while pending:
        folder, above = pending.pop()
        for item in folder.iterdir():
            name = PurePosixPath(item.relative_to(path).as_posix())
            if item.is_file():
                files.append(name)
            elif item.is_dir():
                folders.append(name)
                if (real := os.path.realpath(item)) not in above:  # else a link round in a circle
                    pending.append((item, above | {real}))
    return _visible(sorted(files)), _visible(sorted(folders))


def _walk_tar(path: Path) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    members, folders = archive.members(path, path.stat().st_mtime_ns)
    files = _visible(sorted(members, key=str))
    everywhere = folders.union(*(name.parents for name in files))
    return files, _visible(sorted(everywhere))


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


def _splits(files: list[PurePosixPath]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the folder of the classes to train on, and that to test on, if there is one.

    A split holds class folders: a `test/` of loose pictures without labels is none. Classes may be
    named as splits are, but not all of them, nor as one to train on and one to test on.
    """
    root = _root(files)
    depth = len(root)
    nested = {name.parts[depth] for name in files if len(name.parts) > depth + 2}
    tops = {name.parts[depth] for name in files if len(name.parts) > depth + 1}
    tests = _called(_TESTS, nested)
    test = (*root, tests[0]) if tests else None
    only_splits = len(_called((*_TRAINS, *_TESTS), tops)) == len(tops)
    trains = _called(_TRAINS, tops if only_splits else nested)
    if _TRAIN in nested or (trains and (tests or only_splits)):
        return (*root, trains[0]), test
    if nested and nested == tops and only_splits:  # something to measure on, no more
        return (*root, _TRAIN), test
    return root, None


def _called(known: tuple[str, ...], names: Collection[str]) -> list[str]:
    """Return those of `names` that are `known`, in that order; exactly so written come first."""
    found = [name for name in names if name.lower() in known]
    return sorted(found, key=lambda name: (known.index(name.lower()), name != name.lower(), name))


def _inside(name: PurePosixPath, folder: tuple[str, ...]) -> bool:
    return name.parts[: len(folder)] == folder and len(name.parts) > len(folder)


def _of(
    files: list[PurePosixPath], folder: tuple[str, ...], order: Mapping[str, int]
) -> tuple[tuple[str, int], ...]:
    found = _pictures(files, folder)
    for name, label in found.items():
        if label not in order:
            raise ExportError(f"{name}: class {label} has no pictures to train on")
    return tuple((str(name), order[label]) for name, label in found.items())


def _pictures(files: list[PurePosixPath], folder: tuple[str, ...]) -> dict[PurePosixPath, str]:
    """Return the files inside the class folders of `folder`, each with its class."""
    depth = len(folder)
    inside = (name for name in files if _inside(name, folder) and len(name.parts) > depth + 1)
    return {name: name.parts[depth] for name in inside}
