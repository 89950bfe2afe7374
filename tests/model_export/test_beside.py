"""Checkpoints that hold more than the model: what is told of it, and what is refused for it."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from app.model_card import read_metadata
from model_export import tensors, train
from model_export.cli import main

from .conftest import FIXTURES, Convert
from .train_data import write_images


@pytest.fixture
def plain() -> dict[str, Tensor]:
    """Return the tensors of the tiny Mixer."""
    return tensors.read(FIXTURES / "timm_mixer_tiny" / "pytorch_model.bin")


def _below(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{below}": tensor for below, tensor in state.items()}


@pytest.mark.parametrize(("mean", "model"), [("0.mean", "1"), ("mean", "net")])
def test_normalisation_before_the_model(
    mean: str,
    model: str,
    plain: dict[str, Tensor],
    tmp_path: Path,
    convert: Convert,
    labels: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A layer that normalises is not dropped unseen: its mean and std have to be given."""
    std, source = mean.replace("mean", "std"), tmp_path / "sequential.pth"
    own = {mean: torch.full((3, 1, 1), 0.4), std: torch.full((3, 1, 1), 0.2)}
    torch.save(own | _below(model, plain), source)
    command = ["convert", str(source), "-o", str(tmp_path / "m.onnx"), "--labels", str(labels(5))]
    for given in ([], ["--mean", "0.4", "0.4", "0.4"]):
        assert main([*command, *given]) == 1
        said = capsys.readouterr().err
        assert f"holds {mean} and {std} beside the model" in said
        assert "give what they hold as --mean and --std" in said
        assert said.count("\n") == 1
    flags = ["--mean", "0.4", "0.4", "0.4", "--std", "0.2", "0.2", "0.2"]
    session = onnxruntime.InferenceSession(convert(source, 5, *flags))
    card, _ = read_metadata(session.get_modelmeta().custom_metadata_map)
    assert (card.preprocessing.mean, card.preprocessing.std) == ((0.4,) * 3, (0.2,) * 3)
    assert f"left aside 2 tensors that are no part of the model: {mean}, {std}\n" in (
        capsys.readouterr().out
    )


def test_normalisation_before_fine_tuning(
    plain: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is trained or adapted on a model whose normalisation would be dropped."""
    source = tmp_path / "sequential.pth"
    torch.save({"0.mean": torch.zeros(3), "0.std": torch.ones(3), **_below("1", plain)}, source)
    images = str(write_images(tmp_path / "colors", 2))
    for command in (
        ["adapt", str(source), images, "-o", str(tmp_path / "m.onnx")],
        [images, "-o", str(tmp_path / "run"), "--init", str(source), "--no-compile"],
    ):
        assert train.main(command) == 1
        assert "holds 0.mean and 0.std beside the model" in capsys.readouterr().err


def test_what_is_left_aside_is_named(
    plain: dict[str, Tensor], tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report names the first tensors that are no part of the model."""
    loss = {f"loss.{name}": torch.zeros(2) for name in "abcd"}
    torch.save({"state_dict": loss | _below("net", plain)}, tmp_path / "net.ckpt")
    convert(tmp_path / "net.ckpt", 5)
    said = "left aside 4 tensors that are no part of the model: loss.a, loss.b, loss.c, …\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "average",
    [
        lambda state: {"module": state, "decay": 0.9999, "updates": 3},
        lambda state: {"state_dict": _below("module", state), "decay": torch.tensor(0.9999)},
    ],
)
def test_average_that_is_kept_with_its_decay(
    average: Callable[[dict[str, Tensor]], dict[str, object]],
    plain: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    """Averaged weights are taken from inside what else is kept of the average."""
    raw = {name: tensor + 1 for name, tensor in plain.items()}
    for number, kept in enumerate(({"model": raw, "ema": average(plain)}, {"ema": average(plain)})):
        torch.save(kept, tmp_path / f"{number}.pth")
        found = tensors.weights(tmp_path / f"{number}.pth")
        assert found.state == ("" if number else "ema; left aside: model")
        assert all(torch.equal(found.tensors[name], plain[name]) for name in plain)


def test_average_that_cannot_be_read_is_named(
    plain: dict[str, Tensor], tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report says that raw weights were taken where the averaged ones have no names."""
    average = {"decay": 0.999, "shadow_params": list(plain.values())}
    torch.save({"model": plain, "ema": average}, tmp_path / "averager.pth")
    convert(tmp_path / "averager.pth", 5)
    assert "weights    model; left aside: ema\n" in capsys.readouterr().out
