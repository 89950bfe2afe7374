"""Checkpoints without a head, as timm's with num_classes 0: what may begin with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from app.model_card import read_metadata
from model_export import cli, train

from .conftest import FIXTURES
from .train_data import CLASSES, write_images


@pytest.fixture(params=["timm_mixer_tiny", "timm_resmlp_tiny", "google_tiny.npz"])
def headless(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a tiny model, timm's or Google's, that has no head."""
    source = FIXTURES / str(request.param)
    if source.suffix == ".npz":
        with np.load(source) as file:
            arrays = {name: array for name, array in file.items() if "head/" not in name}
        np.savez(tmp_path / source.name, **arrays)
        return tmp_path / source.name
    folder = Path(shutil.copytree(source, tmp_path / "headless", copy_function=shutil.copyfile))
    tensors = load_file(folder / "model.safetensors")
    del tensors["head.weight"], tensors["head.bias"]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_classes": 0}))
    return folder


def test_no_head_to_convert(
    headless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has no head is refused as that, with the commands that give it one."""
    assert cli.main(["convert", str(headless), "-o", str(tmp_path / "m.onnx")]) == 1
    said = capsys.readouterr().err
    assert f"{headless}: has no head (num_classes 0)" in said
    assert "mixer-train --init trains one, mixer-train adapt solves for one" in said
    assert said.count("\n") == 1


def test_head_of_ones_own(headless: Path, tmp_path: Path) -> None:
    """Adapting and fine-tuning replace the head, and need none to begin with."""
    images = str(write_images(tmp_path / "colors", 3))
    output, run = tmp_path / "colors.onnx", tmp_path / "run"
    assert train.main(["adapt", str(headless), images, "-o", str(output)]) == 0
    card, _ = read_metadata({entry.key: entry.value for entry in onnx.load(output).metadata_props})
    assert card.labels == CLASSES
    quick = ["--init", str(headless), "--epochs", "1", "--no-compile", "--threads", "1"]
    assert train.main([images, "-o", str(run), *quick, "--batch-size", "3"]) == 0
    assert cli.main(["convert", str(run), "-o", str(tmp_path / "m.onnx")]) == 0


def test_half_a_head_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head without its weight is damage, and named."""
    tensors = load_file(FIXTURES / "timm_mixer_tiny" / "model.safetensors")
    del tensors["head.weight"]
    save_file(tensors, tmp_path / "half.safetensors")
    command = ["convert", str(tmp_path / "half.safetensors"), "-o", str(tmp_path / "m.onnx")]
    assert cli.main(command) == 1
    assert "tensor head.weight is missing" in capsys.readouterr().err
