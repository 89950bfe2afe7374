"""The folder of a training run: what it holds, and how it survives a kill at any moment.

    state.pt            everything to go on with, bit for bit; tensors and plain values alone
    model.safetensors   the weights to serve, in timm's names: with config.json it is a timm
    config.json         model folder, which mixer-export convert reads
    recipe.toml         every number of the recipe; mixer-train --config repeats the run
    metrics.csv         one line per epoch
    skipped.txt         files that were no readable pictures
    curves.png, confusion.png, model_card.md
    .lock               locked while a run is at work; it stays behind, and locks nothing by itself

Each file is written beside its place and moved there, so that a reader sees the old or the new one.
"""

import csv
import io
import json
import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save

from app.errors import first_line
from app.model_card import Preprocessing
from model_export import hub, timm
from model_export.errors import ExportError
from model_export.mixer import Mixer

try:
    import fcntl
except ImportError:  # a system that has no such locks
    fcntl = None  # type: ignore[assignment]

STATE = "state.pt"
RECIPE = "recipe.toml"
_FORMAT = 2


class RunFolder:
    """One run's folder.

    Args:
        path: where it is or will be.
        resume: whether a run must be there already, or must not.

    Raises:
        ExportError: there is a run and `resume` is false, or the other way round; another model; or
            another run is at work there.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        if resume and not (path / STATE).is_file():
            raise ExportError(
                f"--resume: {path} holds no run that has begun ({STATE} is missing); "
                "start it without --resume"
            )
        if not resume and (path / STATE).exists():
            raise ExportError(f"{path} holds a run: --resume goes on with it, or choose another -o")
        if not resume and (name := _of_another(path)) is not None:
            raise ExportError(
                f"{path} holds {name}, which is of no run that was cut short: the run would "
                "overwrite it; choose another -o"
            )
        path.mkdir(parents=True, exist_ok=True)
        weakref.finalize(self, os.close, _locked(path))  # by its end, or that of the process

    def save_state(self, state: dict[str, Any]) -> None:
        """Write tensors and plain values; on return they are on the disk."""
        self._replace(STATE, lambda file: torch.save({"format": _FORMAT, **state}, file))

    def load_state(self) -> dict[str, Any]:
        """Read what `save_state` wrote; nothing in the file is executed.

        Raises:
            ExportError: the file is damaged or from another version.
        """
        path = self.path / STATE
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise ExportError(
                f"{path}: not a readable training state ({first_line(error)})"
            ) from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ExportError(f"{path}: not a training state of this version")
        return state

    def write_model(
        self, model: Mixer, preprocessing: Preprocessing, labels: tuple[str, ...]
    ) -> None:
        """Write the weights and what one must know to use them, as a timm model folder."""
        self.write("model.safetensors", save(timm.to_tensors(model), {"format": "pt"}))
        squash = preprocessing.resize == "squash"
        config = {
            "architecture": timm.FAMILIES[type(model)],
            "num_classes": len(labels),
            "label_names": list(labels),
            "pretrained_cfg": {
                "input_size": [3, preprocessing.image_size, preprocessing.image_size],
                "interpolation": preprocessing.interpolation,
                "crop_mode": "squash" if squash else "center",
                "crop_pct": 1.0 if squash else preprocessing.crop_fraction,
                "mean": list(preprocessing.mean),
                "std": list(preprocessing.std),
            },
        }
        self.write("config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n"))

    def write_metrics(self, history: list[dict[str, float]]) -> None:
        """Write one line per epoch."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(history[0]) if history else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in epoch.items()} for epoch in history)
        self.write("metrics.csv", text.getvalue())

    def write(self, name: str, content: str | bytes) -> None:
        """Write a whole file."""
        # A file's name may be no UTF-8.
        data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
        self._replace(name, lambda file: file.write(data))

    def _replace(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
        draft = self.path / f".{name}.draft"
        try:
            with draft.open("wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # Where a write fails, torch still ends its archive, and complains of that instead.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise OSError(reason.errno, reason.strerror, str(self.path / name)) from None
        draft.replace(self.path / name)


def _locked(path: Path) -> int:
    """Return the descriptor of the folder's lock: while it is open nobody else gets it."""
    place = path / ".lock"
    try:
        lock = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's: to read it is enough
        lock = os.open(place, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ExportError(
            f"{path}: another run is at work there; wait until it ends, or choose another -o"
        ) from error
    except OSError:
        pass  # a file system without locks: then two runs are the user's to keep apart
    return lock


def _of_another(path: Path) -> str | None:
    """Return the name of a model's file in a folder without a state, unless a run left it there.

    One that is killed while it first saves leaves its recipe and its model.
    """
    if (path / RECIPE).exists() and not (path / "model_card.md").exists():
        return None
    return next((name for name in (*hub.WEIGHTS, "config.json") if (path / name).exists()), None)
