"""Open a trained model, wherever it comes from, as a `Checkpoint` that knows how to be fed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from app.model_card import Preprocessing
from model_export import google, tensors
from model_export.mixer import Mixer

_CHUNK_BYTES = 1 << 20  # what hashing holds in memory at a time


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with all that its publisher says of it."""

    model: Mixer
    preprocessing: Preprocessing
    family: str  # mixer, gmixer, resmlp or gmlp
    source: str  # file name or hub address, never a path of this machine
    checksum: str  # SHA-256 of the weights' file
    left_aside: int = 0  # tensors of training state in the file, no part of the model


def load(source: str) -> Checkpoint:
    """Load the checkpoint at `source`, the path of a Google .npz file.

    Raises:
        ExportError: it is missing, damaged, hostile, or no Mixer; the message names the tensor.
    """
    path = Path(source)
    model, left_aside = google.mixer(tensors.read(path))
    return Checkpoint(
        model=model,
        preprocessing=google_preprocessing(model),
        family="mixer",
        source=path.name,
        checksum=checksum(path),
        left_aside=left_aside,
    )


def google_preprocessing(model: Mixer) -> Preprocessing:
    """Return big_vision's: [-1, 1], short side to 256/224 of the input, bilinear, centre crop."""
    return Preprocessing(
        image_size=model.config.image_size,
        patch_size=model.config.patch_size,
        crop_fraction=0.875,
        interpolation="bilinear",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
