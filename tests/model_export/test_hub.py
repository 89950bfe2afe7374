"""hf-hub: addresses, against a local cache laid out as the hub's client keeps it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from huggingface_hub import constants
from PIL import Image

from app.images import patchify
from app.model_card import read_metadata
from model_export.cli import main

from .conftest import FIXTURES, Convert

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "timm/mixer_tiny.test"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the snapshot's folder in a cache that holds one model at main, without network."""
    root = tmp_path / "hub"
    model = root / "models--timm--mixer_tiny.test"
    snapshot = model / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(FIXTURES / "timm_mixer_tiny", snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("suffix", ["", "@main", f"@{COMMIT}"])
@pytest.mark.usefixtures("cache")
def test_cached_model_is_converted(suffix: str, convert: Convert) -> None:
    """Without network the cache serves any revision it has, and the card names the commit."""
    session = onnxruntime.InferenceSession(convert(f"hf-hub:{REPOSITORY}{suffix}", 5))
    card, _ = read_metadata(session.get_modelmeta().custom_metadata_map)
    assert card.source == f"hf-hub:{REPOSITORY}@{COMMIT}"
    with np.load(FIXTURES / "timm_mixer_tiny" / "expected.npz") as known:
        patches = np.stack([patchify(Image.fromarray(image), 16) for image in known["images"]])
        logits = session.run(["logits"], {"patches": patches})[0]
        assert np.abs(logits - known["logits"]).max() <= 1e-4


def test_bin_is_taken_where_there_is_no_safetensors(cache: Path, convert: Convert) -> None:
    """A model that the hub has only as pytorch_model.bin is converted from it."""
    (cache / "model.safetensors").unlink()
    assert convert(f"hf-hub:{REPOSITORY}", 5).is_file()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf-hub:timm/absent", "the hub cannot be reached and the local cache has no copy"),
        (f"hf-hub:{REPOSITORY}@v9", "the hub cannot be reached and the local cache has no copy"),
        ("hf-hub:no spaces/please", "must use alphanumeric chars"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_model_that_cannot_be_had_is_one_plain_line(
    address: str,
    said: str,
    tmp_path: Path,
    labels: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without network, what the cache lacks ends with exit code 1 and one line."""
    command = ["convert", address, "-o", str(tmp_path / "m.onnx"), "--labels", str(labels(5))]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
