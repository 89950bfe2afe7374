"""Google's checkpoints: parity with their Flax code, and refusal of whatever is no Mixer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from app.images import patchify
from app.model_card import read_metadata
from model_export import checkpoints
from model_export.cli import main

from .conftest import FIXTURES, Convert

Arrays = dict[str, NDArray[np.generic]]
NAMINGS = pytest.mark.parametrize("file", ["google_tiny.npz", "google_tiny.prelinen.npz"])


def expected() -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return Flax's patches uint8 [4, 16, 768] and logits float32 [4, 7]."""
    with np.load(FIXTURES / "google_tiny.expected.npz") as file:
        images, logits = file["images"], file["logits"]
    return np.stack([patchify(Image.fromarray(image), 16) for image in images]), logits


@NAMINGS
def test_torch_agrees_with_flax(file: str) -> None:
    """The torch Mixer's logits are Flax's within 1e-5, from either naming."""
    patches, logits = expected()
    model = checkpoints.load(str(FIXTURES / file)).model
    with torch.inference_mode():
        ours = model(torch.from_numpy(patches) / 127.5 - 1)
    assert np.abs(ours.numpy() - logits).max() <= 1e-5


@NAMINGS
def test_onnx_agrees_with_flax(file: str, convert: Convert) -> None:
    """The exported file's logits for raw bytes are Flax's within 1e-4, from either naming."""
    patches, logits = expected()
    session = onnxruntime.InferenceSession(convert(FIXTURES / file, 7))
    assert np.abs(session.run(["logits"], {"patches": patches})[0] - logits).max() <= 1e-4


def test_card_says_how_google_preprocesses(tiny: Path) -> None:
    """A Google checkpoint's card says [-1, 1], crop 0.875, bilinear, and the inferred sizes."""
    session = onnxruntime.InferenceSession(tiny)
    card, _ = read_metadata(session.get_modelmeta().custom_metadata_map)
    shown = card.preprocessing
    assert (shown.image_size, shown.patch_size, shown.crop_fraction) == (64, 16, 0.875)
    assert (shown.interpolation, shown.mean, shown.std) == ("bilinear", (0.5,) * 3, (0.5,) * 3)
    assert card.source == "google_tiny.npz"


@pytest.fixture
def arrays() -> Arrays:
    """Return the tensors of the tiny Google checkpoint, to be spoiled."""
    with np.load(FIXTURES / "google_tiny.npz") as file:
        return dict(file)


@pytest.fixture
def refused(
    tmp_path: Path, labels: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> Callable[[Arrays], str]:
    """Return a function that saves arrays, sees convert refuse them, and returns its one line."""

    def run(arrays: Arrays) -> str:
        source, output = tmp_path / "spoiled.npz", tmp_path / "out" / "model.onnx"
        output.parent.mkdir()
        np.savez(source, **arrays)  # type: ignore[arg-type]  # numpy's stub mistakes ** for a flag
        command = ["convert", str(source), "-o", str(output), "--labels", str(labels(7))]
        assert main(command) == 1
        assert list(output.parent.iterdir()) == []
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    return run


def test_missing_tensor_is_named(arrays: Arrays, refused: Callable[[Arrays], str]) -> None:
    """A missing tensor is named with the shape it should have."""
    del arrays["MixerBlock_1/token_mixing/Dense_1/bias"]
    assert "MixerBlock_1/token_mixing/Dense_1/bias is missing, expected shape (16,)" in refused(
        arrays
    )


def test_wrong_shape_is_named(arrays: Arrays, refused: Callable[[Arrays], str]) -> None:
    """A tensor of a wrong shape is named with its shape and the expected one."""
    arrays["MixerBlock_1/channel_mixing/Dense_0/kernel"] = np.zeros((32, 79), np.float32)
    message = refused(arrays)
    assert "MixerBlock_1/channel_mixing/Dense_0/kernel has shape (32, 79)" in message
    assert "expected (32, 80)" in message


def test_nan_weight_is_named(arrays: Arrays, refused: Callable[[Arrays], str]) -> None:
    """One NaN among the weights is refused, and its tensor named."""
    kernel = arrays["stem/kernel"].copy()
    kernel[0, 0, 0, 0] = np.nan
    arrays["stem/kernel"] = kernel
    assert "stem/kernel (16, 16, 3, 32) holds 1 values that are NaN or infinite" in refused(arrays)


def test_integer_weight_is_named(arrays: Arrays, refused: Callable[[Arrays], str]) -> None:
    """Integer weights are refused, and their tensor named."""
    arrays["head/bias"] = np.zeros(7, np.int32)
    assert "head/bias (7,) is torch.int32, expected floating point" in refused(arrays)


def test_foreign_tensor_is_named(arrays: Arrays, refused: Callable[[Arrays], str]) -> None:
    """A tensor that no Mixer has is refused by its name."""
    arrays["cls"] = np.zeros((1, 1, 32), np.float32)
    assert "foreign tensor cls of shape (1, 1, 32)" in refused(arrays)


def test_vision_transformer_is_refused(refused: Callable[[Arrays], str]) -> None:
    """A ViT is refused with the tensor that a Mixer would need and one that it has instead."""
    message = refused(
        {
            "Transformer/encoderblock_0/LayerNorm_0/bias": np.zeros(32, np.float32),
            "embedding/kernel": np.zeros((16, 16, 3, 32), np.float32),
        }
    )
    assert "not a Mixer" in message
    assert "token_mixing_phase_0/kernel1 is missing, expected (1, S, D_S)" in message
    assert "Transformer/encoderblock_0/LayerNorm_0/bias" in message


def test_tokens_that_are_no_square_are_refused(
    arrays: Arrays, refused: Callable[[Arrays], str]
) -> None:
    """Fifteen tokens make up no square image."""
    arrays["MixerBlock_0/token_mixing/Dense_0/kernel"] = np.zeros((15, 24), np.float32)
    assert "15 tokens, expected a square number" in refused(arrays)


def test_absurdly_large_image_is_refused(arrays: Arrays, refused: Callable[[Arrays], str]) -> None:
    """Tokens enough for an image of 1600 px are refused before any such image is drawn."""
    arrays["MixerBlock_0/token_mixing/Dense_0/kernel"] = np.zeros((100 * 100, 1), np.float32)
    assert "images of 1600 px, expected at most 1024" in refused(arrays)


def test_empty_tensor_is_refused(arrays: Arrays, refused: Callable[[Arrays], str]) -> None:
    """A tensor with an axis of length zero is refused."""
    arrays["MixerBlock_0/token_mixing/Dense_0/kernel"] = np.zeros((0, 24), np.float32)
    assert "has shape (0, 24), expected (S, D_S)" in refused(arrays)


@pytest.mark.parametrize("shape", [(16, 8, 3, 32), (16, 16, 1, 32)])
def test_stem_of_other_patches_is_refused(
    shape: tuple[int, ...], arrays: Arrays, refused: Callable[[Arrays], str]
) -> None:
    """Oblong and grey patches are refused with the stem's shape."""
    arrays["stem/kernel"] = np.zeros(shape, np.float32)
    assert f"stem/kernel has shape {shape}, expected (P, P, 3, C)" in refused(arrays)


def test_pickled_objects_are_refused(arrays: Arrays, refused: Callable[[Arrays], str]) -> None:
    """A member that numpy would unpickle is refused unread."""
    arrays["head/bias"] = np.array([print], dtype=object)
    assert "head/bias holds pickled Python objects" in refused(arrays)


@pytest.mark.parametrize("root", ["params/", "opt/target/", "optimizer/target/", ""])
def test_training_state_is_left_aside(
    root: str,
    arrays: Arrays,
    convert: Convert,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A training checkpoint's optimizer state is left aside, and the report says so."""
    source = tmp_path / "training.npz"
    state = {"opt/mu/stem/bias": np.zeros(32, np.float32)}
    state |= {f"{where}step": np.array(7) for where in ("", "extra/", "opt/", "optimizer/state/")}
    model = {root + name: array for name, array in arrays.items()}
    np.savez(source, **model, **state)  # type: ignore[arg-type]  # numpy's stub mistakes ** for a flag
    convert(source, 7)
    assert "left aside 5 tensors that are no part of the model: opt/" in capsys.readouterr().out


def test_bfloat16_is_read(arrays: Arrays, tmp_path: Path) -> None:
    """A bfloat16 tensor, which numpy stores as raw bytes, is read at its value."""
    bits = torch.full((7,), 1.5).to(torch.bfloat16).view(torch.int16).numpy()
    arrays["head/bias"] = bits.view(np.dtype("V2"))
    np.savez(tmp_path / "bf16.npz", **arrays)  # type: ignore[arg-type]  # numpy's stub, as above
    model = checkpoints.load(str(tmp_path / "bf16.npz")).model
    assert model.head.bias.tolist() == [1.5] * 7
