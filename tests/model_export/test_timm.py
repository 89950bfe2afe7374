"""timm's checkpoints: parity of model and preprocessing for each family, and what is refused."""

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.images import decode, patchify
from app.model_card import ModelCard, Preprocessing, read_metadata
from app.settings import EMBEDDED_MODEL
from model_export import checkpoints, tensors, verify
from model_export.cli import main
from model_export.errors import ExportError
from model_export.mixer import Mixer, MixerConfig

from .conftest import FIXTURES, Convert

FAMILIES = {
    "timm_mixer_tiny": "mixer",
    "timm_mixer_tiny_miil": "mixer",
    "timm_gmixer_tiny": "gmixer",
    "timm_resmlp_tiny": "resmlp",
    "timm_gmlp_tiny": "gmlp",
}
FOLDERS = pytest.mark.parametrize("folder", FAMILIES)


def expected(folder: str) -> dict[str, NDArray[Any]]:
    """Return what timm computed for the fixture, with its images as patches uint8 [3, 16, 768]."""
    with np.load(FIXTURES / folder / "expected.npz") as file:
        arrays = dict(file)
    arrays["patches"] = np.stack([patchify(Image.fromarray(i), 16) for i in arrays["images"]])
    return arrays


@FOLDERS
def test_torch_agrees_with_timm(folder: str) -> None:
    """Logits and features are timm's within 1e-5, for every family."""
    checkpoint = checkpoints.load(str(FIXTURES / folder))
    known = expected(folder)
    logits, features = verify.torch_outputs(
        checkpoint.model, checkpoint.preprocessing, known["patches"].astype(np.uint8)
    )
    assert np.abs(logits - known["logits"]).max() <= 1e-5
    assert np.abs(features - known["features"]).max() <= 1e-5


@FOLDERS
def test_onnx_agrees_with_timm(folder: str, convert: Convert, photos: Path | None) -> None:
    """The exported file gives timm's logits, features and, through our pipeline, photo logits."""
    known = expected(folder)
    output = convert(FIXTURES / folder, known["logits"].shape[1], "--with-features")
    session = onnxruntime.InferenceSession(output)
    logits, features = session.run(["logits", "features"], {"patches": known["patches"]})
    assert np.abs(logits - known["logits"]).max() <= 1e-4
    assert np.abs(features - known["features"]).max() <= 1e-4
    card, _ = read_metadata(session.get_modelmeta().custom_metadata_map)
    assert card.family == FAMILIES[folder]
    if photos is not None:
        files = [photos / str(name) for name in known["photo_names"]]
        decoded = [decode(f.read_bytes(), card.preprocessing, 10**8, draft=False) for f in files]
        answers = session.run(["logits"], {"patches": np.stack([d.patches for d in decoded])})[0]
        assert np.abs(answers - known["photo_logits"]).max() <= 1e-3


def card_of(output: Path) -> ModelCard:
    """Return the model card inside a file."""
    session = onnxruntime.InferenceSession(output)
    return read_metadata(session.get_modelmeta().custom_metadata_map)[0]


def test_preprocessing_comes_from_the_config(convert: Convert) -> None:
    """A miil checkpoint's mean 0, std 1 and bilinear come from its pretrained_cfg."""
    shown = card_of(convert(FIXTURES / "timm_mixer_tiny_miil", 6)).preprocessing
    assert (shown.mean, shown.std, shown.interpolation) == ((0,) * 3, (1,) * 3, "bilinear")


def test_flags_override_the_config(convert: Convert, capsys: pytest.CaptureFixture[str]) -> None:
    """Mean, std, crop and interpolation can be set, and the report shows each change."""
    flags = ["--mean", "0.1", "0.2", "0.3", "--std", "1", "1", "1"]
    flags += ["--crop-pct", "0.9", "--interpolation", "nearest"]
    shown = card_of(convert(FIXTURES / "timm_mixer_tiny", 5, *flags)).preprocessing
    assert (shown.mean, shown.crop_fraction, shown.interpolation) == (
        (0.1, 0.2, 0.3),
        0.9,
        "nearest",
    )
    report = capsys.readouterr().out
    assert "crop_fraction 0.875 -> 0.9" in report
    assert "mean (0.5, 0.5, 0.5) -> (0.1, 0.2, 0.3)" in report


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "bare.pth"])
def test_every_kind_of_weights_file_is_read(name: str, tmp_path: Path) -> None:
    """A folder's .safetensors or .bin, and bare weights, hold the same model."""
    original = FIXTURES / "timm_mixer_tiny"
    known = expected("timm_mixer_tiny")
    if name == "bare.pth":
        source = tmp_path / name
        shutil.copy(original / "pytorch_model.bin", source)
    else:
        source = tmp_path
        shutil.copy(original / name, tmp_path)
        shutil.copy(original / "config.json", tmp_path)
    checkpoint = checkpoints.load(str(source))
    logits, _ = verify.torch_outputs(
        checkpoint.model, checkpoint.preprocessing, known["patches"].astype(np.uint8)
    )
    assert np.abs(logits - known["logits"]).max() <= 1e-5


@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        ["ant", "bee", "cow", "dog", "eel"],
        {"4": "eel", "1": "bee", "2": "cow", "3": "dog", "0": "ant"},
    ],
)
def test_labels_of_the_config_are_used(names: object, is_inside: bool, tmp_path: Path) -> None:
    """Without --labels, the config's label_names are the labels: a list or names by index."""
    folder = tmp_path / "named"
    shutil.copytree(FIXTURES / "timm_mixer_tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (config["pretrained_cfg"] if is_inside else config)["label_names"] = names
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(folder), "-o", str(tmp_path / "m.onnx")]) == 0
    assert card_of(tmp_path / "m.onnx").labels == ("ant", "bee", "cow", "dog", "eel")


def test_gaps_in_the_labels_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names by index with an index missing are no labels, and --labels is asked for."""
    folder = tmp_path / "named"
    shutil.copytree(FIXTURES / "timm_mixer_tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    config["label_names"] = {"0": "ant", "1": "bee", "2": "cow", "3": "dog", "5": "eel"}
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(folder), "-o", str(tmp_path / "m.onnx")]) == 1
    assert "names no classes: give its 5 by --labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "classes", "mean"), [("mixer", 5, 0.5), ("gmixer", 5, 0.485), ("resmlp", 5, 0.485)]
)
def test_assumed_input_is_said(
    family: str,
    classes: int,
    mean: float,
    tmp_path: Path,
    convert: Convert,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights that no config.json is for are fed as timm would by default, and the report says."""
    folder = FIXTURES / f"timm_{family}_tiny"
    convert(folder, classes)
    assert "  assumed  " not in capsys.readouterr().out
    bare = shutil.copy(folder / "model.safetensors", tmp_path / "bare.safetensors")
    shutil.copy(folder / "config.json", tmp_path)  # of another file
    assert card_of(convert(bare, classes)).preprocessing.mean[0] == mean
    assert f"assumed    timm's usual input for a {family}" in capsys.readouterr().out


def test_input_of_a_training(
    tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of timm's train.py is fed as its arguments say, where they do."""
    weights = {"state_dict": tensors.read(FIXTURES / "timm_mixer_tiny" / "pytorch_model.bin")}
    told = {"mean": [0.0], "std": [1.0, 0.9, 1.0], "crop_pct": 1.0, "interpolation": "bilinear"}
    untold = {
        "model": "mixer_b16_224",
        "mean": None,
        "std": None,
        "crop_pct": None,
        "interpolation": "",
    }
    best = tmp_path / "model_best.pth.tar"

    torch.save({**weights, "args": told}, best)  # a plain dictionary
    card = card_of(convert(best, 5))
    assert card.preprocessing.mean == (0.0, 0.0, 0.0)
    assert card.preprocessing.std == (1.0, 0.9, 1.0)
    assert (card.preprocessing.crop_fraction, card.preprocessing.interpolation) == (1, "bilinear")
    assert "  assumed  " not in capsys.readouterr().out

    torch.save({**weights, "args": argparse.Namespace(**untold)}, best)
    assert card_of(convert(best, 5)).preprocessing.interpolation == "bicubic"
    assert "  assumed  " in capsys.readouterr().out

    for name in ("mixer_b16_224_miil_in21k", "mixer_b16_224.miil_in21k_ft_in1k"):  # once, and now
        miil = {**untold, "model": name, "std": [0.5]}
        torch.save({**weights, "args": argparse.Namespace(**miil)}, best)
        card = card_of(convert(best, 5))
        assert card.preprocessing.mean == (0.0, 0.0, 0.0)
    assert card.preprocessing.std == (0.5, 0.5, 0.5)
    assert (card.preprocessing.crop_fraction, card.preprocessing.interpolation) == (
        0.875,
        "bilinear",
    )

    torch.save({**weights, "args": {**untold, "mean": torch.zeros(3)}}, best)  # no plain value
    assert card_of(convert(best, 5)).preprocessing.mean == (0.5, 0.5, 0.5)
    assert "  assumed  " in capsys.readouterr().out

    # torchvision's script has other arguments, and other numbers that they do not show.
    foreign = argparse.Namespace(interpolation="bilinear", val_crop_size=32, model="mixer")
    torch.save({**weights, "args": foreign}, best)
    assert card_of(convert(best, 5)).preprocessing.interpolation == "bicubic"
    assert "  assumed  " in capsys.readouterr().out

    torch.save({**weights, "args": argparse.Namespace(**untold | {"crop_pct": 7.0})}, best)
    assert main(["convert", str(best), "-o", str(tmp_path / "m.onnx")]) == 1
    assert "the checkpoint's args: crop_fraction: " in capsys.readouterr().err


Refuse = Callable[..., str]


@pytest.fixture
def refuse(
    tmp_path: Path, labels: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """Return a function that sees convert refuse a source, and returns its one line."""

    def run(source: Path | str, *flags: str) -> str:
        output = tmp_path / "refused.onnx"
        command = ["convert", str(source), "-o", str(output), "--labels", str(labels(5))]
        assert main([*command, *flags]) == 1
        assert not output.exists()
        message = capsys.readouterr().err
        assert message.startswith("mixer-export: ")
        assert message.count("\n") == 1
        return message

    return run


@pytest.mark.parametrize("name", ["mean", "std"])
def test_numbers_for_whole_pixels(refuse: Refuse, name: str) -> None:
    """Mean and std of pixels up to 255, as OpenCV's users write them, are refused."""
    message = refuse(FIXTURES / "timm_mixer_tiny", f"--{name}", "123.675", "116.28", "103.53")
    assert f"{name} 123.675 116.28 103.53: expected those of pixels in [0, 1]" in message


def spoiled(tmp_path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Return bare weights of the tiny Mixer with a change."""
    tensors = load_file(FIXTURES / "timm_mixer_tiny" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "spoiled.safetensors")
    return tmp_path / "spoiled.safetensors"


def without_head(tensors: dict[str, Tensor]) -> None:
    """Set the head's weights to zero, as they are before fine-tuning."""
    tensors["head.weight"].zero_()


def test_head_of_zeros_is_refused(tmp_path: Path, refuse: Refuse) -> None:
    """A checkpoint whose head is all zeros is refused with a sentence that says so."""
    source = spoiled(tmp_path, without_head)
    assert "the head is all zeros, so this is a pre-training checkpoint" in refuse(source)


def test_head_of_zeros_can_be_allowed(tmp_path: Path, convert: Convert) -> None:
    """With --allow-zero-head it is exported, and the file passes its own golden sample."""
    source = spoiled(tmp_path, without_head)
    session = onnxruntime.InferenceSession(convert(source, 5, "--allow-zero-head"))
    card, golden = read_metadata(session.get_modelmeta().custom_metadata_map)
    logits = session.run(["logits"], {"patches": golden.patches(card.preprocessing)})[0]
    assert np.abs(logits - golden.logits()).max() <= golden.tolerance


def test_vision_transformer_is_refused(tmp_path: Path, refuse: Refuse) -> None:
    """A ViT's tensors are refused by name."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".mlp_tokens." in name]:
            tensors[name.replace("mlp_tokens", "attn")] = tensors.pop(name)

    message = refuse(spoiled(tmp_path, change))
    assert "not a Mixer: tensor blocks.0.mlp_tokens.fc1.weight is missing" in message


def test_oblong_patches_are_refused(tmp_path: Path, refuse: Refuse) -> None:
    """A stem over oblong patches is refused with its shape."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["stem.proj.weight"] = tensors["stem.proj.weight"][..., :8].contiguous()

    assert "stem.proj.weight has shape (32, 3, 16, 8)" in refuse(spoiled(tmp_path, change))


def test_other_file_than_pinned_is_refused(refuse: Refuse, convert: Convert) -> None:
    """--sha256 refuses a file of another checksum before reading it; capitals are the same."""
    weights = FIXTURES / "timm_mixer_tiny" / "model.safetensors"
    pinned = hashlib.sha256(weights.read_bytes()).hexdigest().upper()
    convert(weights, 5, "--sha256", pinned)
    message = refuse(FIXTURES / "timm_mixer_tiny", "--sha256", "0" * 64)
    assert f"expected {'0' * 64}" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_size": [3, 224, 224]}, "input_size is [3, 224, 224], but the weights take"),
        ({"crop_mode": "border"}, "crop_mode border"),
        ({"crop_mode": "squash", "crop_pct": 0.9}, "crop_mode squash with crop_pct 0.9"),
        ({"interpolation": "random"}, "interpolation: Input should be"),
        ({"crop_pct": 1.5}, "crop_fraction: Input should be less than or equal to 1"),
        ({"std": [math.inf, 1, 1]}, "std: Input should be a finite number"),
        ({"std": [0, 1, 1]}, "std: Input should be greater than 0"),
        ({"mean": [math.nan, 0, 0]}, "mean: Input should be a finite number"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    change: dict[str, object], said: str, tmp_path: Path, refuse: Refuse
) -> None:
    """A config.json that contradicts the weights or asks for the unsupported is refused."""
    folder = tmp_path / "folder"
    shutil.copytree(FIXTURES / "timm_mixer_tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= change
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    assert said in refuse(folder)


def test_unknown_architecture_argument_is_refused(tmp_path: Path, refuse: Refuse) -> None:
    """A model_args entry that could change the computation is refused by name."""
    folder = tmp_path / "folder"
    shutil.copytree(FIXTURES / "timm_mixer_tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["act_layer"] = "relu"
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    assert "model_args act_layer is not supported" in refuse(folder)


def test_weights_of_eight_bits(convert: Convert, tmp_path: Path) -> None:
    """Weights in float8 are poured in as any others, a NaN among them refused by its name."""
    tensors = load_file(FIXTURES / "timm_mixer_tiny" / "model.safetensors")
    name = "head.bias"
    folder = Path(shutil.copytree(FIXTURES / "timm_mixer_tiny", tmp_path / "folder"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    assert convert(folder, len(tensors[name])).is_file()
    tensors[name] = torch.full_like(tensors[name].float(), torch.nan).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ExportError, match="NaN or infinite"):
        checkpoints.load(str(folder))


def test_draft_decoding_keeps_the_answers(photos: Path | None) -> None:
    """At 224 px at least 99 % of real photos get the same class with libjpeg's draft as without."""
    if photos is None:
        pytest.skip("no photos on this machine")
    torch.manual_seed(0)
    model = Mixer(MixerConfig(224, 16, 2, 64, 32, 128, classes=10)).eval()
    shown = Preprocessing(image_size=224, patch_size=16)
    answers = []
    for draft in (True, False):
        files = sorted(photos.iterdir())
        patches = [decode(f.read_bytes(), shown, 10**8, draft=draft).patches for f in files]
        logits, _ = verify.torch_outputs(model, shown, np.stack(patches))
        answers.append((logits - logits.mean(axis=0)).argmax(axis=1))
    assert len(set(answers[0])) > 5  # the random model tells photos apart
    assert (answers[0] == answers[1]).mean() >= 0.99


def test_draft_decoding_keeps_the_embedded_models_labels(photos: Path | None) -> None:
    """At 32 px at least 98 % of real photos get the same label with libjpeg's draft as without."""
    if photos is None:
        pytest.skip("no photos on this machine")
    session = onnxruntime.InferenceSession(EMBEDDED_MODEL)
    card, _ = read_metadata(session.get_modelmeta().custom_metadata_map)
    answers = []
    for draft in (True, False):
        files = sorted(photos.iterdir())
        pictures = [decode(f.read_bytes(), card.preprocessing, 10**8, draft=draft) for f in files]
        (logits,) = session.run(["logits"], {"patches": np.stack([p.patches for p in pictures])})
        answers.append(np.asarray(logits).argmax(axis=1))
    assert (answers[0] == answers[1]).mean() >= 0.98


def _below(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.{below}": tensor for below, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("model_best.pth.tar", lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1)}),
        ("last.pth.tar", lambda s: {"state_dict": {}, "state_dict_ema": s, "epoch": 3}),
        ("deit.pth", lambda s: {"model": {}, "model_ema": s}),
        ("lightning.ckpt", lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}}),
        ("ddp.pth", lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()}),
        ("tutorial.PT", lambda s: {"model_state_dict": s, "optimizer_state_dict": {}}),
        ("averager.pth", lambda s: {"model": s, "ema": {"decay": 0.999, "shadow_params": [1]}}),
        ("no_average.pth", lambda s: {"model": s, "model_ema": {}, "ema": {}}),
        ("ema.pth", lambda s: {"model": {**s, "n": s["norm.bias"]}, "ema": s}),
        ("swa.pth", lambda s: {"n_averaged": torch.tensor(3), **_below("module", s)}),
        ("net.ckpt", lambda s: {"state_dict": {"loss.w": s["norm.bias"], **_below("net", s)}}),
    ],
)
def test_what_training_leaves(
    name: str, wrap: Callable[[dict[str, torch.Tensor]], dict[str, object]], tmp_path: Path
) -> None:
    """A training script's checkpoint gives the tensors that its plain state dict gives."""
    plain = tensors.read(FIXTURES / "timm_mixer_tiny" / "pytorch_model.bin")
    torch.save(wrap(plain), tmp_path / name)
    found = tensors.read(tmp_path / name)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_choice_of_weights_is_said(
    tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report tells which of two states was taken, and how many tensors were no part of it."""
    plain = tensors.read(FIXTURES / "timm_mixer_tiny" / "pytorch_model.bin")
    both = {"model": plain, "ema": {**_below("module", plain), "n_averaged": torch.tensor(3)}}
    torch.save(both, tmp_path / "both.pth")
    convert(tmp_path / "both.pth", 5)
    report = capsys.readouterr().out
    assert "weights    ema; left aside: model\n" in report
    assert "left aside 1 tensors that are no part of the model: n_averaged\n" in report


def test_state_of_any_name(tmp_path: Path) -> None:
    """The one state in a file is taken, whatever it is called; of two unknown ones none is."""
    plain = tensors.read(FIXTURES / "timm_mixer_tiny" / "pytorch_model.bin")
    torch.save({"net": plain, "acc": 0.8, "optimizer": {"state": {}}}, tmp_path / "net.pth")
    found = tensors.weights(tmp_path / "net.pth")
    assert found.tensors.keys() == plain.keys()
    assert found.state == "net"  # as the report shows
    torch.save({"state_dict": {}, "net": plain}, tmp_path / "net.pth")
    assert tensors.read(tmp_path / "net.pth").keys() == plain.keys()
    torch.save({**plain, "teacher": plain}, tmp_path / "two.pth")
    with pytest.raises(ExportError, match="teacher is no tensor"):
        tensors.read(tmp_path / "two.pth")
    torch.save({"net": plain, "other": plain}, tmp_path / "two.pth")
    with pytest.raises(ExportError, match=r"net is no tensor: .*; save the model's state_dict\(\)"):
        tensors.read(tmp_path / "two.pth")


def test_modules_that_share_tensors(tmp_path: Path) -> None:
    """A state whose blocks are there under a second name holds each tensor twice, and is read."""
    plain = tensors.read(FIXTURES / "timm_mixer_tiny" / "pytorch_model.bin")
    blocks = {f"features.{name}": tensor for name, tensor in plain.items() if "blocks" in name}
    torch.save({**_below("model", plain), **blocks}, tmp_path / "lightning.ckpt")
    assert tensors.read(tmp_path / "lightning.ckpt").keys() == plain.keys()


def test_several_models_in_a_file(tmp_path: Path) -> None:
    """Of teacher and student nobody knows which one is to be served."""
    plain = tensors.read(FIXTURES / "timm_mixer_tiny" / "pytorch_model.bin")
    teacher = {name: tensor.clone() for name, tensor in plain.items()}
    torch.save({**_below("student", plain), **_below("teacher", teacher)}, tmp_path / "two.pth")
    with pytest.raises(ExportError, match=r"several models, .* 'student\.' and 'teacher\.'"):
        tensors.read(tmp_path / "two.pth")
