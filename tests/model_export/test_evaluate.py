"""`mixer-export evaluate` and `inspect`: measured on pictures drawn for the test."""

import io
import tarfile
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from app.images import decode
from app.model_card import read_metadata
from model_export.cli import main
from model_export.errors import ExportError
from model_export.evaluate import _match
from model_export.summary import macs

from .conftest import FIXTURES, Convert

MODELS = Path(__file__).parents[2] / "app" / "models"
MODEL = MODELS / "mixer-cifar10.onnx"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where the confusion matrix may be written."""
    monkeypatch.chdir(tmp_path)


def draw(folder: Path, labels: tuple[str, ...], each: int) -> None:
    """Write `each` random pictures into a folder per label."""
    rng = np.random.default_rng(1)
    for label in labels:
        (folder / label).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((48, 40)).save(folder / label / f"{number}.png")


def answers(folder: Path) -> list[tuple[str, list[str]]]:
    """Return (class folder, labels from the best on) of a folder, one picture at a time."""
    session = onnxruntime.InferenceSession(MODEL)
    card, _ = read_metadata(session.get_modelmeta().custom_metadata_map)
    ranked = []
    for file in folder.rglob("*.png"):
        patches = decode(file.read_bytes(), card.preprocessing, 10**8).patches
        logits = session.run(["logits"], {"patches": patches[None]})[0][0]
        ranked.append((file.parent.name, [card.labels[i] for i in (-logits).argsort()]))
    return ranked


def test_accuracy_is_that_of_single_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Top-1, top-5 and each class's accuracy are what classifying picture by picture gives."""
    labels = ("bird", "dog", "ship")
    draw(tmp_path / "data", labels, 15)
    assert main(["evaluate", str(MODEL), str(tmp_path / "data")]) == 0
    report = capsys.readouterr().out
    ranked = answers(tmp_path / "data")
    right = {label: sum(truth == best[0] == label for truth, best in ranked) for label in labels}
    assert f"top-1      {sum(right.values()) / 45:.2%}" in report
    for label in labels:
        assert f"{label:<10} {right[label] / 15:8.2%} of 15" in report
    assert "cat  " not in report
    assert f"top-5      {sum(truth in best[:5] for truth, best in ranked) / 45:.2%}" in report
    assert "images/s" in report


def test_confusion_matrix_is_a_png(tmp_path: Path) -> None:
    """The confusion matrix is drawn into the PNG that --confusion names."""
    draw(tmp_path / "data", ("bird", "dog"), 2)
    flags = ["--confusion", str(tmp_path / "matrix.png")]
    assert main(["evaluate", str(MODEL), str(tmp_path / "data"), *flags]) == 0
    with Image.open(tmp_path / "matrix.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400


def test_confusion_matrix_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A place where no PNG can be is refused before anything is measured."""
    monkeypatch.setattr("model_export.cli.evaluate", Mock(side_effect=AssertionError))
    for place in (tmp_path, tmp_path / "absent" / "matrix.png"):
        assert main(["evaluate", str(MODEL), str(tmp_path), "--confusion", str(place)]) == 1
        assert f"--confusion {place}: no file can be written there" in capsys.readouterr().err


def test_result_is_told_before_it_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A drawing that fails after all costs the drawing alone."""
    draw(tmp_path / "data", ("bird", "dog"), 2)
    monkeypatch.setattr("model_export.cli.plot_confusion", Mock(side_effect=OSError("disk full")))
    flags = ["--confusion", str(tmp_path / "matrix.png")]
    assert main(["evaluate", str(MODEL), str(tmp_path / "data"), *flags]) == 1
    assert "top-1" in capsys.readouterr().out


def test_many_classes_take_little_memory(
    tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measuring a model of 21,843 classes allocates no matrix of them, and says it drew none."""
    with np.load(FIXTURES / "google_tiny.npz") as file:
        arrays = dict(file)
    for name in ("head/kernel", "head/bias"):
        arrays[name] = np.resize(arrays[name], (*arrays[name].shape[:-1], 21_843))
    np.savez(tmp_path / "wide.npz", **arrays)
    model = convert(tmp_path / "wide.npz", 21_843)
    draw(tmp_path / "data", ("class 20000",), 3)
    tracemalloc.start()
    assert main(["evaluate", str(model), str(tmp_path / "data")]) == 0
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 * 1024 * 1024
    assert "not drawn: of more than 1,000 classes" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


def test_classes_of_one_name_are_one_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where several classes bear a folder's name, as ImageNet's cranes, each of them is right."""
    (tmp_path / "7.txt").write_text("crane\n" * 7)
    source, model = FIXTURES / "google_tiny.npz", tmp_path / "cranes.onnx"
    flags = ["--labels", str(tmp_path / "7.txt")]
    assert main(["convert", str(source), "-o", str(model), *flags]) == 0
    draw(tmp_path / "data", ("crane",), 8)
    assert main(["evaluate", str(model), str(tmp_path / "data")]) == 0
    assert "top-1      100.00%" in capsys.readouterr().out


def test_five_classes_have_no_top_5(
    tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of five classes, five guesses are all there are, and no figure."""
    model = convert(FIXTURES / "timm_mixer_tiny", 5)
    draw(tmp_path / "data", ("class 0",), 1)
    assert main(["evaluate", str(model), str(tmp_path / "data")]) == 0
    assert "top-5" not in capsys.readouterr().out


@pytest.mark.parametrize("compression", ["", "xz", "gz"])
def test_tar_is_read_and_its_test_split_taken(
    compression: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a tar of a whole data set only the test folder is measured."""
    draw(tmp_path / "set" / "train", ("bird", "dog"), 5)
    draw(tmp_path / "set" / "test", ("bird", "dog"), 3)
    archive = tmp_path / f"set.tar.{compression}".rstrip(".")
    with tarfile.open(archive, f"w:{compression}") as tar:  # type: ignore[call-overload]  # any mode
        tar.add(tmp_path / "set", "set")
    assert main(["evaluate", str(MODEL), str(archive)]) == 0
    assert "on 6 pictures of set/test/\n" in capsys.readouterr().out


@pytest.mark.parametrize("kept_bytes", [3 * 512, 3 * 512 + 100])
def test_tar_that_is_cut_off(
    kept_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tar that ends where a picture ends, or in the next one's header, is not the whole set."""
    archive = tmp_path / "set.tar"
    with tarfile.open(archive, "w") as tar:
        for label in ("bird", "dog"):
            member = tarfile.TarInfo(f"{label}/0.png")
            member.size = 1000
            tar.addfile(member, io.BytesIO(bytes(1000)))
    archive.write_bytes(archive.read_bytes()[:kept_bytes])
    assert main(["evaluate", str(MODEL), str(archive)]) == 1
    assert "set.tar: is cut off or damaged, it has no end mark" in capsys.readouterr().err


def test_undecodable_pictures_are_counted_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken picture counts neither as right nor as wrong, and is named."""
    draw(tmp_path / "data", ("bird",), 2)
    (tmp_path / "data" / "bird" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert main(["evaluate", str(MODEL), str(tmp_path / "data")]) == 0
    report = capsys.readouterr().out
    assert "on 2 pictures\n" in report
    assert "1 pictures that cannot be decoded, bird/broken.jpg" in report


def test_files_without_a_picture_s_name_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies beside the pictures under other names is left out, and counted."""
    draw(tmp_path / "data", ("bird",), 2)
    (tmp_path / "data" / "bird" / "0.png").rename(tmp_path / "data" / "bird" / "0.photo")
    assert main(["evaluate", str(MODEL), str(tmp_path / "data")]) == 0
    report = capsys.readouterr().out
    assert "on 1 pictures\n" in report
    assert "left out   1 files without the name of a picture, bird/0.photo the first" in report


def test_folders_of_other_names_match_by_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten folders that bear no label's name stand for the ten classes in order, and it says so."""
    draw(tmp_path / "data", tuple(f"n{i:08}" for i in range(10)), 1)
    assert main(["evaluate", str(MODEL), str(tmp_path / "data")]) == 0
    assert "matched by order" in capsys.readouterr().out


def test_order_that_is_not_the_folders() -> None:
    """Labels in no order are not matched by it: a good model would seem to be wrong."""
    assert _match(["cats", "dogs"], ("cat", "dog")) == ({"cats": 0, "dogs": 1}, True)
    with pytest.raises(ExportError, match="folder cats is none of the model's 2 labels"):
        _match(["cats", "dogs"], ("dog", "cat"))
    assert _match(["n01440764", "n01443537"], ("tench", "goldfish"))[1]


@pytest.mark.parametrize(
    ("folders", "said"),
    [(("bird", "unicorn"), "folder unicorn is none of the model's 10 labels"), ((), "holds no")],
)
def test_other_classes_are_refused(
    folders: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is no label, or no pictures at all, end with exit code 1 and one line."""
    (tmp_path / "data").mkdir()
    draw(tmp_path / "data", folders, 1)
    assert main(["evaluate", str(MODEL), str(tmp_path / "data")]) == 1
    assert said in capsys.readouterr().err


def test_inspect_shows_the_card_and_the_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """Inspect names labels, parameters, operators, GMACs, size and providers."""
    assert main(["inspect", str(MODEL)]) == 0
    shown = capsys.readouterr().out
    for fact in (
        "mixer-cifar10",
        "1,132,170",
        "airplane, automobile, bird, cat, deer, …",
        "LayerNormalization 17",
        "0.076 GMACs",
        "4.6 MB",
        "CUDA: yes",
    ):
        assert fact in shown


def test_macs_are_those_of_the_paper_s_formula() -> None:
    """The embedded model's multiply-accumulates are counted by hand: stem, blocks, head."""
    tokens, width, token_mlp, channel_mlp = 64, 128, 64, 512
    block = 2 * width * tokens * token_mlp + 2 * tokens * width * channel_mlp
    by_hand = tokens * 48 * width + 8 * block + width * 10
    assert macs(onnx.load(MODEL)) == by_hand


@pytest.mark.parametrize("suffix", ["onnx", "json"])  # of which onnx has a form of its own
@pytest.mark.parametrize("content", [b"no onnx at all", b""])
def test_inspect_refuses_other_files(
    content: bytes, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is no model of ours ends with exit code 1 and one line."""
    (tmp_path / f"other.{suffix}").write_bytes(content)
    assert main(["inspect", str(tmp_path / f"other.{suffix}")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_help_explains_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """--help ends with exit code 0 and names the three commands."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("convert", "inspect", "evaluate"))
