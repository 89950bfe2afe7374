"""`mixer-train adapt`: a few pictures of each class give a model a new head."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from app.engine import OnnxEngine
from app.model_card import Golden, read_metadata
from model_export import cli, ridge
from model_export.train import main

from .conftest import FIXTURES, Convert
from .train_data import CLASSES, write_images, write_tar

TINY = FIXTURES / "google_tiny.npz"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return five pictures of each of three colors, and five more of each to test on."""
    return write_images(tmp_path / "colors", 5)


def test_adapted_file_serves_the_new_classes(
    convert: Convert, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five pictures a class make a servable file whose card and golden sample are of its own."""
    model, output = convert(TINY, 7, "--with-features"), tmp_path / "colors.onnx"
    assert main(["adapt", str(model), str(images), "-o", str(output)]) == 0
    report = capsys.readouterr().out
    assert "3 classes from 15 pictures" in report
    assert "test pictures    100.00% of 15" in report
    engine = OnnxEngine(output, "cpu", 1)  # checks the golden sample
    _, golden = read_metadata({p.key: p.value for p in onnx.load(output).metadata_props})
    assert golden.tolerance < 1e-3 * np.abs(golden.logits()).max()
    base = OnnxEngine(model, "cpu", 1)
    assert engine.card.labels == CLASSES
    assert engine.card.name == "colors"
    assert engine.card.checksum != base.card.checksum
    width = 32 + 1
    assert base.card.parameters - engine.card.parameters == (7 - 3) * width


def test_plain_export_will_do(convert: Convert, images: Path, tmp_path: Path) -> None:
    """An export without the output features is adapted where its head is a plain linear layer."""
    model, output = convert(TINY, 7), tmp_path / "colors.onnx"
    assert main(["adapt", str(model), str(images), "-o", str(output)]) == 0
    assert OnnxEngine(output, "cpu", 1).card.labels == CLASSES


def test_checkpoint_is_exported_on_the_way(images: Path, tmp_path: Path) -> None:
    """A checkpoint is adapted without a conversion of its own before."""
    output = tmp_path / "colors.onnx"
    assert main(["adapt", str(TINY), str(images), "-o", str(output)]) == 0
    assert OnnxEngine(output, "cpu", 1).card.source == "google_tiny.npz, adapted"


def _golden(path: Path) -> Golden:
    proto = onnx.load(path)
    return read_metadata({entry.key: entry.value for entry in proto.metadata_props})[1]


def test_small_precisions_are_adapted(convert: Convert, images: Path, tmp_path: Path) -> None:
    """An int8 file keeps its int8 trunk under the new head, if it has the output features."""
    flags = ("--precision", "int8", "--min-agreement", "0")
    output = tmp_path / "colors.onnx"
    assert main(["adapt", str(convert(TINY, 7, *flags)), str(images), "-o", str(output)]) == 1
    assert not output.exists()
    model = convert(TINY, 7, *flags, "--with-features")
    assert main(["adapt", str(model), str(images), "-o", str(output)]) == 0
    assert OnnxEngine(output, "cpu", 1).card.precision == "int8"
    # As much may another CPU's logits differ: the share of the largest that the model came with.
    shares = [
        golden.tolerance / np.abs(golden.logits()).max() for golden in map(_golden, (model, output))
    ]
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    """Return the tiny Mixer as it is before anybody has trained its head."""
    with np.load(TINY) as file:
        arrays = dict(file)
    for name in ("head/kernel", "head/bias"):
        arrays[name] = np.zeros_like(arrays[name])
    np.savez(tmp_path / "headless.npz", **arrays)
    return tmp_path / "headless.npz"


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1e-4), ("fp16", 1e-2)])
def test_head_of_zeros_has_a_golden_of_its_own(
    convert: Convert, headless: Path, images: Path, tmp_path: Path, precision: str, share: float
) -> None:
    """A base whose logits are all zero gives its precision's tolerance, not any whatsoever."""
    flags = ("--with-features", "--allow-zero-head", "--precision", precision)
    model, output = convert(headless, 7, *flags), tmp_path / "colors.onnx"
    assert main(["adapt", str(model), str(images), "-o", str(output)]) == 0
    golden = _golden(output)
    assert golden.tolerance == pytest.approx(share * np.abs(golden.logits()).max(), rel=1e-3)


def test_head_of_zeros_in_int8_is_refused(
    convert: Convert,
    headless: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What int8 has cost cannot be told from logits that are all zero."""
    flags = ("--with-features", "--allow-zero-head", "--precision", "int8", "--min-agreement", "0")
    model, output = convert(headless, 7, *flags), tmp_path / "colors.onnx"
    assert main(["adapt", str(model), str(images), "-o", str(output)]) == 1
    assert "nothing tells what int8 costs" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("begins", ["adapt", "fine-tuning"])
def test_numbers_for_whole_pixels(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], begins: str
) -> None:
    """A checkpoint with a mean of pixels up to 255 is refused before anything is trained on it."""
    folder = shutil.copytree(FIXTURES / "timm_mixer_tiny", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [123.675, 116.28, 103.53]
    (folder / "config.json").write_text(json.dumps(config))
    if begins == "adapt":
        command = ["adapt", str(folder), str(images), "-o", str(tmp_path / "m.onnx")]
    else:
        command = [str(images), "-o", str(tmp_path / "run"), "--init", str(folder)]
    assert main(command) == 1
    assert "mean 123.675 116.28 103.53: expected those of pixels" in capsys.readouterr().err


def test_scores_are_decided(convert: Convert, images: Path, tmp_path: Path) -> None:
    """Softmax gives the right class most of the mass, but five pictures make nobody certain."""
    output = tmp_path / "colors.onnx"
    assert main(["adapt", str(convert(TINY, 7)), str(images), "-o", str(output)]) == 0
    engine = OnnxEngine(output, "cpu", 1)
    red = np.zeros((1, 16, 256, 3), np.uint8)
    red[..., :] = (190, 50, 50)
    logits = engine.run(red.reshape(1, 16, 768))[0]
    scores = np.exp(logits - logits.max())
    assert 0.6 < scores[CLASSES.index("red")] / scores.sum() < 0.999


def test_adapting_needs_no_torch(convert: Convert, images: Path, tmp_path: Path) -> None:
    """On an exported file torch is not imported, not even where it is installed."""
    model = convert(TINY, 7, "--with-features")
    code = (
        "import sys; sys.modules['torch'] = None; from model_export.train import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["adapt", str(model), str(images), "-o", str(tmp_path / "colors.onnx")]
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_output_must_be_an_onnx_file(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An output that is no .onnx is refused, so that no slip overwrites the checkpoint."""
    source = tmp_path / "weights.npz"
    source.write_bytes(TINY.read_bytes())
    assert main(["adapt", str(source), str(images), "-o", str(source)]) == 1
    assert f"-o {source}: expected a file that ends in .onnx" in capsys.readouterr().err
    assert source.read_bytes() == TINY.read_bytes()


def test_tar_will_do(images: Path, tmp_path: Path) -> None:
    """The pictures may come in a tar."""
    archive = write_tar(images, tmp_path / "colors.tar")
    assert main(["adapt", str(TINY), str(archive), "-o", str(tmp_path / "m.onnx")]) == 0


def test_too_little_data_is_refused(
    convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One class, or a class without a picture, is refused by name and nothing is written."""
    model, output = convert(TINY, 7), tmp_path / "colors.onnx"
    images = write_images(tmp_path / "colors", 1, splits=("",))
    (images / "violet").mkdir()
    assert main(["adapt", str(model), str(images), "-o", str(output)]) == 1
    assert "class violet has no pictures" in capsys.readouterr().err
    assert main(["adapt", str(model), str(images / "red"), "-o", str(output)]) == 1
    assert "two or more classes" in capsys.readouterr().err
    assert not output.exists()


def test_one_picture_a_class_has_no_cross_validation(
    convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One picture a class is enough for a head, and the report says what it cannot measure."""
    images = write_images(tmp_path / "colors", 1, splits=("",))
    command = ["adapt", str(convert(TINY, 7)), str(images), "-o", str(tmp_path / "m.onnx")]
    assert main(command) == 0
    assert "cross-validated  unknown" in capsys.readouterr().out


def test_class_of_one_picture_is_not_measured(
    convert: Convert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left out, the only picture of a class would be wrong for certain: it does not count."""
    images = write_images(tmp_path / "colors", 5, splits=("",))
    for number in range(1, 5):
        (images / "red" / f"{number:03}.png").unlink()
    command = ["adapt", str(convert(TINY, 7)), str(images), "-o", str(tmp_path / "m.onnx")]
    assert main(command) == 0
    assert "cross-validated  100.00%" in capsys.readouterr().out


def test_foreign_onnx_is_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is no model of ours, or is not there, is one plain line."""
    (tmp_path / "foreign.onnx").write_bytes(b"not onnx")
    for name, said in (("foreign.onnx", "not a model"), ("absent.onnx", "no such file")):
        command = ["adapt", str(tmp_path / name), str(images), "-o", str(tmp_path / "m.onnx")]
        assert main(command) == 1
        assert said in capsys.readouterr().err


def test_name_with_a_slash(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that could not stand in the API's paths is refused before any work."""
    command = ["adapt", "any.onnx", str(images), "-o", str(tmp_path / "m.onnx")]
    assert main([*command, "--name", "team/colors"]) == 1
    assert "--name team/colors: expected no /" in capsys.readouterr().err


@pytest.mark.parametrize("counts", [(4, 4, 4), (7, 3, 2)])
def test_leave_one_out_is_exact(counts: tuple[int, ...]) -> None:
    """Each closed-form prediction is that of a ridge regression without the picture."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(12, 5)).astype(np.float32), np.repeat(np.arange(3), counts)
    head = ridge.fit(x, labels, 3)
    weights = 12 / (3 * np.array(counts))[labels]  # each class counts alike
    whole = np.average(x.astype(np.float64), axis=0, weights=weights)
    variance = np.average(np.square(x.astype(np.float64) - whole), axis=0, weights=weights)
    whitened = x.astype(np.float64) / np.sqrt(variance)
    targets = np.eye(3)[labels]
    for i in range(12):
        rest = np.arange(12) != i
        w = weights[rest]
        mean = np.average(whitened[rest], axis=0, weights=w)
        offset = np.average(targets[rest], axis=0, weights=w)
        a, b = whitened[rest] - mean, targets[rest] - offset
        weight = np.linalg.solve(
            a.T @ (w[:, None] * a) + head.regulariser * np.eye(5), a.T @ (w[:, None] * b)
        )
        expected = offset + (whitened[i] - mean) @ weight
        np.testing.assert_allclose(head.predictions[i], expected, atol=1e-6)


def test_rare_class() -> None:
    """A class of 10 pictures beside one of 490 is found as often as that one."""
    rng = np.random.default_rng(0)

    def pictures(counts: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat([0, 1], counts)
        x = rng.normal(size=(len(labels), 32)).astype(np.float32)
        x[:, 0] += 4 * labels  # the best that can be is 97.7 % of each
        return x, labels

    x, labels = pictures((490, 10))
    head = ridge.fit(x, labels, 2)
    fresh, truth = pictures((2000, 2000))
    right = (fresh @ head.weight.T + head.bias).argmax(axis=1) == truth
    assert right[:2000].mean() > 0.9
    assert right[2000:].mean() > 0.85  # it was 0


def test_more_channels_than_pictures_is_no_matter() -> None:
    """With 6 pictures of 40 channels, one of them constant, the head is finite and right."""
    rng = np.random.default_rng(0)
    labels = np.arange(6) % 2
    x = rng.normal(size=(6, 40)).astype(np.float32) + 3 * labels[:, None].astype(np.float32)
    x[:, 7] = 5
    head = ridge.fit(x, labels, 2)
    assert np.isfinite(head.weight).all()
    assert ((x @ head.weight.T + head.bias).argmax(axis=1) == labels).all()
    assert (head.weight[:, 7] == 0).all()


def test_adapted_file_can_be_inspected(convert: Convert, images: Path, tmp_path: Path) -> None:
    """What adapt writes is a file like any other to mixer-export."""
    output = tmp_path / "colors.onnx"
    assert main(["adapt", str(convert(TINY, 7)), str(images), "-o", str(output)]) == 0
    assert cli.main(["inspect", str(output)]) == 0
