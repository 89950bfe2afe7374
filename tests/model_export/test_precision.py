"""fp16 and int8: what they keep, what they cost, and when they are refused."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from app.engine import OnnxEngine
from app.model_card import Preprocessing, read_metadata
from model_export import pictures, quantize, verify
from model_export.cli import main
from model_export.samples import photo_like

from .conftest import FIXTURES, Convert

MODELS = Path(__file__).parents[2] / "app" / "models"
TINY = FIXTURES / "google_tiny.npz"


def cifar10(output: Path, *flags: str) -> list[str]:
    """Return the command that exports a checkpoint of 32 epochs on CIFAR-10 with `flags`."""
    command = ["convert", str(FIXTURES / "mixer_cifar10.npz"), "-o", str(output)]
    return [*command, "--labels", str(FIXTURES / "cifar10.txt"), "--crop-pct", "1", *flags]


def _adds_bytes_exactly() -> bool:
    """Return whether this CPU multiplies int8 without clipping sums to 16 bits (VNNI, dotprod)."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return not {"avx512_vnni", "avx_vnni", "asimddp"}.isdisjoint(flags)


# Elsewhere the exporter measures 94 % agreement for this checkpoint, and refuses to write the file.
exact_int8 = pytest.mark.skipif(
    not _adds_bytes_exactly(), reason="this CPU has no VNNI: its int8 products clip"
)


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return that checkpoint as it is."""
    output = tmp_path_factory.mktemp("float32") / "float32.onnx"
    assert main(cifar10(output)) == 0
    return output


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return it in int8."""
    output = tmp_path_factory.mktemp("int8") / "int8.onnx"
    assert main(cifar10(output, "--precision", "int8")) == 0
    return output


@exact_int8
def test_int8_is_a_quarter_of_the_size(int8: Path, float32: Path) -> None:
    """The int8 file is at most 0.3 of the float one."""
    assert int8.stat().st_size < 0.3 * float32.stat().st_size


@exact_int8
def test_int8_answers_as_float_does(int8: Path, float32: Path) -> None:
    """Over pictures that the exporter did not see, int8 agrees with float on at least 97 %."""
    session, baseline = (onnxruntime.InferenceSession(path) for path in (int8, float32))
    card, _ = read_metadata(session.get_modelmeta().custom_metadata_map)
    pictures = photo_like(300, card.preprocessing, 77)
    loss = verify.lose(verify.logits_of(baseline, pictures), verify.logits_of(session, pictures))
    assert card.precision == "int8"
    assert loss.agreement >= 0.97
    assert 0 < loss.rms < 0.05


@exact_int8
def test_int8_stem_multiplies_bytes(int8: Path) -> None:
    """The first matrix product takes the patches themselves, unconverted."""
    graph = onnx.load(int8).graph
    assert (graph.node[0].op_type, graph.node[0].input[0]) == ("MatMulInteger", "patches")
    assert Counter(n.op_type for n in graph.node)["MatMulInteger"] == 34


@exact_int8
def test_server_takes_an_int8_model(int8: Path) -> None:
    """The serving engine accepts the file's golden sample, alone and in a batch."""
    engine = OnnxEngine(int8, "cpu", 1)
    assert engine.run(photo_like(2, engine.card.preprocessing, 0)).shape == (2, 10)


@exact_int8
def test_table_shows_what_int8_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report has size, logits, agreement and latency of both precisions."""
    assert main(cifar10(tmp_path / "m.onnx", "--precision", "int8")) == 0
    report = capsys.readouterr().out
    for row in ("file size", "max |Δlogit|", "top-1 agreement", "latency, this CPU"):
        assert row in report


def test_too_little_agreement_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below --min-agreement nothing is written, and the line says how many agreed."""
    monkeypatch.setattr(verify, "lose", lambda *_: verify.Loss(128, 0.1, 0.1, 0.9))
    flags = ["--precision", "int8", "--min-agreement", "0.95"]
    assert main(cifar10(tmp_path / "m.onnx", *flags)) == 1
    assert list(tmp_path.iterdir()) == []
    message = capsys.readouterr().err
    assert "with block" in message
    assert "at least 95.00% is asked for" in message


@pytest.mark.parametrize("share", ["nan", "-0.1", "99"])
def test_agreement_is_a_share(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A --min-agreement that is no share, such as a percentage, is refused at once."""
    with pytest.raises(SystemExit) as ended:
        main(["convert", "absent.npz", "-o", "m.onnx", f"--min-agreement={share}"])
    assert ended.value.code == 2
    assert "is not a number from 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("blocks", [4, 8])
def test_lossiest_block_stays_float(blocks: int) -> None:
    """Where agreement is short by one block's loss, that block is left in float, be it of four."""
    proto = onnx.load(MODELS / "mixer-cifar10.onnx")
    card, _ = read_metadata({p.key: p.value for p in proto.metadata_props})
    losses = iter(
        [0.9, *[0.99] * blocks, 0.995]
    )  # all, each block alone, with the lossiest in float
    rms = iter([0.0, *[1.0, 2.0, 9.0, 3.0, 4.0, 5.0, 6.0, 7.0][:blocks], 0.0])

    def compare(candidate: onnx.ModelProto, count: int | None) -> verify.Loss:
        return verify.Loss(1, 0.0, next(rms), next(losses))

    quantised, loss, kept = quantize.int8_within(proto, blocks, compare, 0.99, None)
    assert kept == ["block 2"]
    assert loss.agreement == 0.995
    products = Counter(n.op_type for n in quantised.graph.node)
    assert (products["MatMul"], products["MatMulInteger"]) == (32 // blocks, 34 - 32 // blocks)
    assert card.precision == "fp32"


def test_head_stays_float() -> None:
    """What is to stay in float does, whichever operator it is."""
    proto = onnx.load(MODELS / "mixer-cifar10.onnx")
    head = quantize.parts(proto, 8)["head"]
    products = Counter(n.op_type for n in quantize.int8(proto, head, None).graph.node)
    assert products["MatMulInteger"] == 33


def test_static_int8_takes_its_ranges_from_photos(convert: Convert, tmp_path: Path) -> None:
    """With --calibration the ranges are fixed, so a picture's logits do not depend on its batch."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(3)
    for number in range(12):
        pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 70)).save(photos / f"{number}.png")
    (photos / "broken.jpg").write_bytes(b"no picture")
    flags = ["--precision", "int8", "--calibration", str(photos), "--min-agreement", "0.5"]
    session = onnxruntime.InferenceSession(convert(TINY, 7, *flags))
    card, _ = read_metadata(session.get_modelmeta().custom_metadata_map)
    pictures = photo_like(5, card.preprocessing, 5)
    together = session.run(["logits"], {"patches": pictures})[0]
    alone = session.run(["logits"], {"patches": pictures[2:3]})[0]
    assert np.abs(together[2] - alone[0]).max() <= 1e-5
    operators = {n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "DynamicQuantizeLinear" not in operators
    assert "QuantizeLinear" in operators


def test_calibration_needs_pictures(
    tmp_path: Path, labels: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without pictures is refused by name."""
    command = ["convert", str(TINY), "-o", str(tmp_path / "m.onnx"), "--labels", str(labels(7))]
    (tmp_path / "empty").mkdir()
    flags = ["--precision", "int8", "--calibration", str(tmp_path / "empty")]
    assert main([*command, *flags]) == 1
    assert "holds no picture that can be decoded" in capsys.readouterr().err


def test_calibration_is_spread_over_all_folders(tmp_path: Path) -> None:
    """Of more pictures than calibration takes, those of the last folder count as the first's do."""
    for name, shade in (("a", 10), ("b", 240)):
        (tmp_path / name).mkdir()
        for number in range(200):
            Image.new("L", (8, 8), shade).save(tmp_path / name / f"{number:03}.png")
    fed = Preprocessing(image_size=8, patch_size=4)
    shades = pictures.calibration(tmp_path, fed).mean(axis=(1, 2))
    assert len(shades) == 256
    assert (shades < 100).sum() == 128


def test_calibration_of_fp32_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--calibration without a smaller precision would do nothing, so it is refused."""
    assert main(cifar10(tmp_path / "m.onnx", "--calibration", str(tmp_path))) == 1
    assert "nothing to calibrate or to compare; add --precision int8" in capsys.readouterr().err


@pytest.mark.parametrize("least", ["0", "0.99"])
def test_fp16_that_overflows_is_refused(
    least: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits that are no numbers in half precision agree with nothing."""
    with np.load(TINY) as file:
        arrays = dict(file)
    for name in arrays:
        if name.startswith(("stem", "MixerBlock")) and name.endswith("kernel"):
            arrays[name] = arrays[name] * 1e4
    np.savez(tmp_path / "large.npz", **arrays)
    (tmp_path / "labels.txt").write_text("".join(f"class {i}\n" for i in range(7)))
    command = ["convert", str(tmp_path / "large.npz"), "-o", str(tmp_path / "large.onnx")]
    command += ["--labels", str(tmp_path / "labels.txt"), "--precision", "fp16"]
    assert main([*command, "--min-agreement", least]) == 1
    assert "fp16 overflows" in capsys.readouterr().err
    assert not (tmp_path / "large.onnx").exists()


def test_nothing_agrees_with_what_is_no_number() -> None:
    """The first class of NaNs is no answer."""
    expected = np.array([[1, 0], [1, 0]], np.float32)
    got = np.array([[np.nan, np.nan], [2, 1]], np.float32)
    assert verify.lose(expected, got).agreement == 0.5


def test_fp16_computes_in_half_and_answers_in_float(convert: Convert) -> None:
    """fp16 weights are half, the head and the outputs float32, and the logits nearly float's."""
    output = convert(TINY, 7, "--precision", "fp16", "--with-features")
    session = onnxruntime.InferenceSession(output)
    assert [o.type for o in session.get_outputs()] == ["tensor(float)"] * 2
    _, golden = read_metadata(session.get_modelmeta().custom_metadata_map)
    assert golden.tolerance >= 0.0099 * np.abs(golden.logits()).max()  # as another GPU may round
    graph = onnx.load(output).graph
    kinds = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    assert kinds == {onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT}
    operators = Counter(node.op_type for node in graph.node)
    assert (operators["Gelu"], operators["LayerNormalization"]) == (4, 5)
    with np.load(FIXTURES / "google_tiny.expected.npz") as known:
        images, logits = known["images"], known["logits"]
    cut = images.reshape(4, 4, 16, 4, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(4, 16, 768)
    ours = session.run(["logits"], {"patches": np.ascontiguousarray(cut)})[0]
    assert 1e-6 < np.abs(ours - logits).max() < 0.01


def test_fp16_layer_norms_take_float_statistics(convert: Convert) -> None:
    """Every LayerNormalization of an fp16 file computes its statistics in float32."""
    graph = onnx.load(convert(TINY, 7, "--precision", "fp16")).graph
    for node in graph.node:
        if node.op_type == "LayerNormalization":
            stash = [a.i for a in node.attribute if a.name == "stash_type"]
            assert stash in ([], [onnx.TensorProto.FLOAT])  # float is the operator's default
