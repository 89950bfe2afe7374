"""Open a trained model, wherever it comes from, as a `Checkpoint` that knows how to be fed."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from app.model_card import Preprocessing
from model_export import google, hub, tensors, timm
from model_export.errors import ExportError
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
    labels: tuple[str, ...] | None = None
    is_assumed: bool = False  # the preprocessing: nothing in or beside the weights tells of it
    left_aside: tuple[str, ...] = ()  # tensors in the file that are no part of the model
    state: str = ""  # which of several states in the file, and which not


def load(
    source: str,
    *,
    sha256: str | None = None,
    allow_zero_head: bool = False,
    is_mean_given: bool = False,
) -> Checkpoint:
    """Load a Google .npz, a timm folder or weights file, or an hf-hub: address.

    Raises:
        ExportError: it is missing, a web address, damaged, hostile, no Mixer (the message names the
            tensor), not the file that `sha256` pins, has no head or one of zeros that was not
            allowed, or normalises by layers of its own, unless `is_mean_given`: the user says how.
    """
    if "://" in source:
        raise ExportError(f"{source}: download the file, or give hf-hub:owner/name")
    if source.startswith(hub.PREFIXES):
        snapshot = hub.fetch(source)
        checkpoint = _timm(snapshot.weights, snapshot.config, snapshot.address, sha256)
    elif Path(source).is_dir():
        checkpoint = _folder(Path(source), sha256)
    elif Path(source).suffix.lower() == ".npz":
        checkpoint = _google(Path(source), sha256)
    else:
        weights = Path(source)
        # Weights that still lie in their folder are fed as the folder says.
        config = weights.parent / "config.json"
        known = weights.name in hub.WEIGHTS and config.is_file()
        checkpoint = _timm(weights, config if known else None, weights.name, sha256)
    if not allow_zero_head and not checkpoint.model.head.weight.any():
        if checkpoint.model.config.classes == 1:  # as it was read where there is none
            raise ExportError(
                f"{source}: has no head (num_classes 0), so it has no answer to give; mixer-train "
                "--init trains one, mixer-train adapt solves for one"
            )
        raise ExportError(
            f"{source}: the head is all zeros, so this is a pre-training checkpoint that gives "
            "every image the same answer; --allow-zero-head exports it all the same"
        )
    beside = [name for name in checkpoint.left_aside if name.split(".")[-1] in ("mean", "std")]
    if beside and not is_mean_given:
        raise ExportError(
            f"{source}: holds {' and '.join(beside[:2])} beside the model, no part of it; give "
            "what they hold as --mean and --std of mixer-export convert, or save the model's "
            "state_dict() alone with a config.json that says it"
        )
    return checkpoint


def check_pixels(preprocessing: Preprocessing) -> None:
    """See whether mean and std are those of pixels in [0, 1].

    Raises:
        ExportError: they are meant for 0 to 255; such a model would see every picture as black.
    """
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if max(values) > 1:
            raise ExportError(
                f"{name} {' '.join(f'{value:g}' for value in values)}: expected those of pixels "
                "in [0, 1]; divide what is meant for 0 to 255 by 255"
            )


def _google(path: Path, sha256: str | None) -> Checkpoint:
    checksum = _checksum(path, sha256)
    model, left_aside = google.mixer(tensors.read(path))
    return Checkpoint(
        model=model,
        # big_vision's: [-1, 1], short side to 256/224 of the input, bilinear, centre crop.
        preprocessing=Preprocessing(
            image_size=model.config.image_size,
            patch_size=model.config.patch_size,
            crop_fraction=0.875,
            interpolation="bilinear",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        family="mixer",
        source=path.name,
        checksum=checksum,
        left_aside=left_aside,
    )


def _folder(folder: Path, sha256: str | None) -> Checkpoint:
    config = folder / "config.json"
    if not config.is_file():
        raise ExportError(f"{folder}: expected a timm model folder, but it has no config.json")
    for name in hub.WEIGHTS:
        if (folder / name).is_file():
            return _timm(folder / name, config, folder.resolve().name, sha256)
    raise ExportError(f"{folder}: holds neither {hub.WEIGHTS[0]} nor {hub.WEIGHTS[1]}")


def _timm(weights: Path, config: Path | None, source: str, sha256: str | None) -> Checkpoint:
    checksum = _checksum(weights, sha256)
    saved = tensors.weights(weights)
    model = timm.model(saved.tensors)
    if config is None:
        trained = timm.as_trained(saved.arguments, model)
        published = timm.Published(trained or timm.default_preprocessing(model), None)
    else:
        trained, published = None, timm.published(config, model)
    return Checkpoint(
        model=model,
        preprocessing=published.preprocessing,
        family=timm.FAMILIES[type(model)],
        source=source,
        checksum=checksum,
        labels=published.labels,
        is_assumed=config is None and trained is None,
        left_aside=saved.left_aside,
        state=saved.state,
    )


def _checksum(path: Path, pinned: str | None) -> str:
    """Return the SHA-256 of a file in hex, before anything in it is read."""
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if pinned is not None and digest.hexdigest() != pinned.lower():
        raise ExportError(f"{path.name}: SHA-256 is {digest.hexdigest()}, expected {pinned}")
    return digest.hexdigest()
