"""`mixer-export convert`: what it writes, what it prints, and that it writes nothing on failure."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest

from app.model_card import read_metadata
from model_export import checkpoints, graph, verify
from model_export.cli import main
from model_export.errors import ExportError

from .conftest import FIXTURES, Convert

MODELS = Path(__file__).parents[2] / "app" / "models"
TINY = FIXTURES / "google_tiny.npz"


def initializers(proto: onnx.ModelProto) -> list[np.ndarray]:
    """Return the weights of a graph, in its order."""
    return [onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]


def test_embedded_model_is_reproduced(tmp_path: Path) -> None:
    """The committed model is what the exporter makes of the committed checkpoint."""
    again = tmp_path / "mixer-cifar10.onnx"
    assert main(["convert", str(MODELS / "mixer-cifar10"), "-o", str(again)]) == 0
    ours, committed = onnx.load(again), onnx.load(MODELS / "mixer-cifar10.onnx")
    assert [(n.op_type, list(n.input)) for n in ours.graph.node] == [
        (n.op_type, list(n.input)) for n in committed.graph.node
    ]
    # Another processor may round the folded stem differently in the last bit.
    for mine, theirs in zip(initializers(ours), initializers(committed), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-9)
    cards = [read_metadata({p.key: p.value for p in m.metadata_props}) for m in (ours, committed)]
    assert cards[0][0] == cards[1][0]
    assert np.abs(cards[0][1].logits() - cards[1][1].logits()).max() <= cards[1][1].tolerance


def test_two_exports_are_identical(tiny: Path, tmp_path: Path) -> None:
    """Exporting twice gives the same bytes: no time, no path, no random number is in them."""
    command = ["convert", str(TINY), "-o", str(tmp_path / "tiny.onnx"), "--labels"]
    assert main([*command, str(tiny.parent / "labels.txt")]) == 0
    assert (tmp_path / "tiny.onnx").read_bytes() == tiny.read_bytes()


def test_file_names_nothing_of_the_exporting_machine(tiny: Path) -> None:
    """The file holds neither the working folder's path nor the exporter's stack traces."""
    content = tiny.read_bytes()
    for trace in (str(Path.cwd()), str(Path.home()), ".py", "torch"):
        assert trace == "/" or trace.encode() not in content


def test_graph_is_made_of_fused_operators(tiny: Path) -> None:
    """GELU and LayerNorm are one operator each, and there is no convolution."""
    operators = Counter(node.op_type for node in onnx.load(tiny).graph.node)
    assert operators["Gelu"] == 4
    assert operators["LayerNormalization"] == 5
    assert not operators.keys() & {"Conv", "Erf", "Tanh", "Pow", "Sqrt"}


def test_signature_is_bytes_in_logits_out(tiny: Path) -> None:
    """The input is patches uint8 [batch, 16, 768], the output logits float32 [batch, 7]."""
    session = onnxruntime.InferenceSession(tiny)
    (patches,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (patches.name, patches.type, patches.shape) == (
        "patches",
        "tensor(uint8)",
        ["batch", 16, 768],
    )
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 7])


def test_golden_sample_holds(tiny: Path) -> None:
    """The golden sample, run through the file, gives its own logits within its tolerance."""
    session = onnxruntime.InferenceSession(tiny)
    card, golden = read_metadata(session.get_modelmeta().custom_metadata_map)
    patches = golden.patches(card.preprocessing)
    apart = np.abs(session.run(["logits"], {"patches": patches})[0] - golden.logits()).max()
    assert apart <= golden.tolerance < 1e-3 * np.abs(golden.logits()).max()
    assert patches.std() > 10


def test_batch_does_not_change_an_answer(tiny: Path) -> None:
    """An image's logits are the same alone and in a batch of 17."""
    session = onnxruntime.InferenceSession(tiny)
    patches = np.random.default_rng(0).integers(0, 256, (17, 16, 768), dtype=np.uint8)
    together = session.run(["logits"], {"patches": patches})[0]
    alone = session.run(["logits"], {"patches": patches[5:6]})[0]
    assert np.abs(together[5] - alone[0]).max() <= 1e-5


def test_failed_verification_writes_nothing(
    tmp_path: Path,
    labels: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """When ONNX and torch disagree, the old file stays, nothing is left, and the exit code is 1."""
    monkeypatch.setattr(graph, "fold_normalisation", lambda stem, *_: stem)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.onnx").write_text("old")
    command = ["convert", str(TINY), "-o", str(folder / "model.onnx"), "--labels", str(labels(7))]
    assert main(command) == 1
    assert "verification failed" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    assert (folder / "model.onnx").read_text() == "old"


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "said"),
    [
        ("Concat", ["raw", "raw"], {"axis": 1}, r"logits is float32 \(1, 14\)"),
        ("Cast", ["raw"], {"to": onnx.TensorProto.DOUBLE}, r"logits is float64 \(1, 7\)"),
        ("Mul", ["raw", "nan"], {}, "differ from torch's by nan"),
    ],
)
def test_outputs_that_are_not_as_promised(
    operator: str,
    inputs: list[str],
    attributes: dict[str, Any],
    said: str,
    tiny: Path,
    tmp_path: Path,
) -> None:
    """A graph whose logits are of another shape or type, or NaN, is refused."""
    proto = onnx.load(tiny)
    proto.graph.node[-1].output[0] = "raw"
    proto.graph.node.append(onnx.helper.make_node(operator, inputs, ["logits"], **attributes))
    nan = np.array(np.nan, np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(nan, "nan"))
    kind = attributes.get("to", onnx.TensorProto.FLOAT)
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("logits", kind, None))
    onnx.save(proto, tmp_path / "other.onnx")
    checkpoint = checkpoints.load(str(TINY))
    with pytest.raises(ExportError, match=said):
        verify.compare(checkpoint.model, checkpoint.preprocessing, tmp_path / "other.onnx")


def test_report_says_what_was_verified(
    convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report names the model, its checksum, its input and how far the logits were apart."""
    convert(TINY, 7, "--name", "tiny", "--squash")
    report = capsys.readouterr().out
    for fact in (
        "tiny: mixer",
        "7 classes",
        "64 px, patches of 16, squash, bilinear",
        "labels     class 0, class 1, class 2, class 3, class 4, …",
        "max |Δlogit|",
        "SHA-256",
    ):
        assert fact in report


@pytest.mark.parametrize("count", [6, 8])
def test_labels_must_match_the_head(
    count: int,
    tmp_path: Path,
    labels: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One label too few or too many is refused with both numbers."""
    command = ["convert", str(TINY), "-o", str(tmp_path / "m.onnx"), "--labels", str(labels(count))]
    assert main(command) == 1
    assert f"{count} labels, but the head has 7 classes" in capsys.readouterr().err


def test_output_that_is_a_folder(
    tmp_path: Path, labels: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder in the output's place is told before any work, by its name."""
    (tmp_path / "m.onnx").mkdir()
    command = ["convert", str(TINY), "-o", str(tmp_path / "m.onnx"), "--labels", str(labels(7))]
    assert main(command) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"mixer-export: {tmp_path}/m.onnx: is a folder, expected a file"


def test_features_of_any_size(convert: Convert, tmp_path: Path) -> None:
    """Features have the rounding of their own size, where the head makes small logits of them."""
    with np.load(TINY) as file:
        arrays = dict(file)
    for name in ("scale", "bias"):
        arrays[f"pre_head_layer_norm/{name}"] = arrays[f"pre_head_layer_norm/{name}"] * 1e4
    arrays["head/kernel"] = arrays["head/kernel"] / 1e4
    np.savez(tmp_path / "large.npz", **arrays)
    assert convert(tmp_path / "large.npz", 7, "--with-features").is_file()


def test_missing_source_is_one_plain_line(tmp_path: Path, labels: Callable[[int], Path]) -> None:
    """As a command of its own, a missing source ends with exit code 1 and one line."""
    command = [sys.executable, "-m", "model_export.cli", "convert", "absent.npz", "-o"]
    command += [str(tmp_path / "m.onnx"), "--labels", str(labels(7))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "mixer-export: absent.npz: no such file\n"


def test_web_address_is_told_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A web address as the source is refused with what to give instead."""
    command = ["convert", "https://example.com/m.npz", "-o", str(tmp_path / "m.onnx")]
    assert main(command) == 1
    said = "https://example.com/m.npz: download the file, or give hf-hub:owner/name"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("output", ["weights.npz", ".", ""])
def test_output_must_be_an_onnx_file(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An output that is no .onnx is refused, so that no slip overwrites the checkpoint."""
    monkeypatch.chdir(tmp_path)
    weights = (FIXTURES / "google_tiny.npz").read_bytes()
    (tmp_path / "weights.npz").write_bytes(weights)
    assert main(["convert", "weights.npz", "-o", output]) == 1
    assert f"-o {output}: expected a file that ends in .onnx" in capsys.readouterr().err
    assert (tmp_path / "weights.npz").read_bytes() == weights


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--name", "owner/name", "--name owner/name: expected no /"),
        ("--name", "..", "--name ..: expected no /"),
        ("--name", "", "--name '': expected no /"),
        ("--name", "a\udcff", "'a\\udcff' is no Unicode"),
        ("--name", "a\x1b[2J", "'a\\x1b[2J' holds a control character"),
        (
            "--labels",
            '["a", "b", "c", "d\\te", "e", "f", "g"]',
            "'d\\te' holds a control character",
        ),
        ("--labels", '["a", "b", "c", "\\ud800", "e", "f", "g"]', "'\\ud800' is no Unicode"),
    ],
)
def test_texts_that_no_client_could_read(
    flag: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that no path of the API can hold, or a text that is no Unicode, is one line."""
    (tmp_path / "labels.json").write_text(value if flag == "--labels" else json.dumps(["a"] * 7))
    named = ["--name", value] if flag == "--name" else []
    output = tmp_path / "m.onnx"
    command = ["convert", str(TINY), "-o", str(output), "--labels", str(tmp_path / "labels.json")]
    assert main([*command, *named]) == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert not output.exists()


def test_model_that_no_onnx_file_holds(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of more than protobuf's 2 GiB are refused before anything is traced."""
    monkeypatch.setattr("model_export.export._MAX_PARAMETERS", 1000)
    command = ["convert", str(TINY), "-o", "m.onnx", "--labels", str(tiny.parent / "labels.txt")]
    assert main(command) == 1
    assert "parameters; an ONNX file holds at most 1,000" in capsys.readouterr().err


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl+C is one line, and the exit code that a shell gives it."""
    monkeypatch.setattr("model_export.cli.checkpoints.load", Mock(side_effect=KeyboardInterrupt))
    assert main(["convert", "weights.npz", "-o", "model.onnx"]) == 130
    assert capsys.readouterr().err == "mixer-export: stopped\n"
