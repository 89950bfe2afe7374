"""A data set in a tar of any compression: which file is where in it, links followed."""

import os
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath

from model_export.errors import ExportError

_PIECE_BYTES = 2**20
_MAX_LINKS = 40  # from one to the next, as Linux follows them


@lru_cache(maxsize=1)
def members(
    path: Path, changed_ns: int
) -> tuple[dict[PurePosixPath, tarfile.TarInfo], set[PurePosixPath]]:
    """Return a tar's files and folders, listed once for each change of it.

    Of a name that is there twice the last one counts, as in unpacking; a link stands for its file
    or folder, wherever that comes.
    """
    del changed_ns
    files: dict[PurePosixPath, tarfile.TarInfo] = {}
    folders: set[PurePosixPath] = set()
    links: dict[PurePosixPath, PurePosixPath] = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            name = PurePosixPath(member.name)  # without a leading ./
            links.pop(name, None)
            if member.isfile():
                files[name] = member
            elif member.isdir():
                folders.add(name)
            elif member.islnk() or member.issym():
                beside = PurePosixPath() if member.islnk() else name.parent
                target = PurePosixPath(os.path.normpath(beside / member.linkname))
                if member.islnk() and target in files:  # to what it is at this moment
                    files[name] = files[target]
                else:
                    files.pop(name, None)
                    links[name] = target
        # Where a tar is cut off, or a member is damaged, tarfile takes what it has read for all.
        content = tar.fileobj
        if content is not None:
            content.seek(tar.offset)
            if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ExportError(f"{path}: is cut off or damaged, it has no end mark")
            while content.read(_PIECE_BYTES):
                pass  # a checksum comes last
    _follow(links, files)
    return files, folders


def _follow(
    links: Mapping[PurePosixPath, PurePosixPath],
    files: dict[PurePosixPath, tarfile.TarInfo],
) -> None:
    """Add what links stand for: files, or all that is in a folder."""
    linked: dict[PurePosixPath, list[PurePosixPath]] = {}  # by folder
    for name, first in links.items():
        target = first
        for _ in range(_MAX_LINKS):
            target = links.get(target, target)
        if target in files:
            files[name] = files[target]
        elif target not in name.parents:  # else round in a circle
            linked.setdefault(target, []).append(name)
    if not linked:
        return
    inside = [
        (name / file.relative_to(folder), member)
        for file, member in files.items()
        for folder in file.parents
        for name in linked.get(folder, ())
    ]
    files.update(inside)
