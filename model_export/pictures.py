"""Real pictures from a folder or a tar: to calibrate int8 and to measure accuracy."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.client.files import SUFFIXES
from app.errors import Problem
from app.images import decode
from app.model_card import Preprocessing
from app.settings import Settings
from model_export import dataset
from model_export.errors import ExportError

MAX_PIXELS: int = Settings.model_fields["max_pixels"].default  # what the server takes
_CALIBRATION_PICTURES = 256  # more of them hardly move the ranges


@dataclass(frozen=True)
class Entry:
    """One encoded picture of an ImageFolder."""

    folder: str  # the name of its class
    name: str
    data: bytes


class ImageFolder:
    """Pictures in one folder per class, on disk or in a tar (of any compression).

    Raises:
        ExportError: there is no such folder or tar, or it holds no pictures.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.split, found = dataset.measured(path)  # "" if it is the whole
        self._wanted = {
            str(name): folder for name, folder in found.items() if name.suffix.lower() in SUFFIXES
        }
        # A training decodes whatever there is; here stray lists and notes are no refused pictures.
        self.left_out = sorted(str(name) for name in found if str(name) not in self._wanted)
        if not self._wanted:
            raise ExportError(
                f"{path}: holds no pictures in a folder per class; names of pictures end in "
                f"{' '.join(sorted(SUFFIXES))}"
            )
        self.folders = sorted(set(self._wanted.values()))

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self._wanted)

    def __iter__(self) -> Iterator[Entry]:
        """Yield every picture, in the order of the names or of the tar."""
        for name, data in dataset.read(self.path, self._wanted):
            yield Entry(self._wanted[name], name, data)


def calibration(folder: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode up to 256 pictures, evenly chosen from anywhere below `folder`.

    Returns:
        Patches uint8 [pictures, tokens, P·P·3].

    Raises:
        ExportError: there is no such folder, or none in it that can be decoded.
    """
    if not folder.is_dir():
        raise ExportError(f"--calibration {folder}: no such folder")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    count = min(len(files), _CALIBRATION_PICTURES)
    decoded = []
    for file in (files[number * len(files) // count] for number in range(count)):
        try:
            decoded.append(decode(file.read_bytes(), preprocessing, MAX_PIXELS).patches)
        except Problem:  # one odd file in a folder of photos is no reason to stop
            continue
    if not decoded:
        raise ExportError(f"--calibration {folder}: holds no picture that can be decoded")
    return np.stack(decoded)
