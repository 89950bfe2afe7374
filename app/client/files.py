"""Which image files the command line means: files, folders, globs."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

# In a folder the names decide; a file that is named itself is always sent.
SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp"})


class NothingFoundError(Exception):
    """A path or pattern leads to no image."""


def find_images(paths: Iterable[str]) -> list[Path]:
    """Return the images that `paths` mean, each once, folders in the order of their names.

    Raises:
        NothingFoundError: a path does not exist, or holds no image.
    """
    found: dict[Path, None] = {}
    for path in paths:
        images = list(_images(path))
        if not images:
            raise NothingFoundError(f"{path}: no image there")
        found.update(dict.fromkeys(images))
    return list(found)


def _images(path: str) -> Iterator[Path]:
    place = Path(path)
    if place.is_dir():
        files = (file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES)
        yield from sorted(file for file in files if file.is_file())
    elif place.exists():
        yield place
    else:
        # Of a whole tree the names decide, as of a folder.
        is_tree = place.name == "**"
        for match in sorted(glob.glob(path, recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute pattern
            if is_tree and Path(match).is_file() and Path(match).suffix.lower() not in SUFFIXES:
                continue
            # A link to nowhere is found by its name: that one image fails, not the run.
            yield from _images(match) if Path(match).exists() else [Path(match)]
