"""Other classes for a trained model: a new head on its frozen features, within seconds.

On an .onnx file nothing here needs torch; ridge.py has the arithmetic.
"""

import hashlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from tqdm import tqdm

from app.cpus import available_cpus
from app.engine import OnnxEngine
from app.errors import first_line
from app.model_card import Golden, ModelCard, Preprocessing, read_metadata, write_metadata
from model_export import dataset, decoded, labels, ridge
from model_export.decoded import Pictures
from model_export.errors import ExportError
from model_export.ridge import Head
from model_export.samples import photo_like, tolerated_share
from model_export.session import open_engine, open_session

FEATURES = "features"
_BATCH = 32
_SHOWN = 10  # skipped files that are named


@dataclass(frozen=True)
class Adapted:
    """What was written, and how well it does on pictures that it did not see."""

    card: ModelCard
    path: Path
    pictures: int
    accuracy: float | None  # leave-one-out; None where every class has a single picture
    test: tuple[int, float] | None  # pictures and accuracy, where the data set has a test split
    regulariser: float

    def __str__(self) -> str:
        """Describe it in a few lines."""
        measured = (
            "unknown: it takes two pictures of a class to leave one out"
            if self.accuracy is None
            else f"{self.accuracy:.2%}, each picture by a head that never saw it "
            f"(regulariser {self.regulariser:g}, chosen likewise)"
        )
        lines = [
            f"{self.path}: {self.card.name}, {len(self.card.labels)} classes "
            f"from {self.pictures} pictures",
            f"  cross-validated  {measured}",
        ]
        if self.test is not None:
            lines.append(f"  test pictures    {self.test[1]:.2%} of {self.test[0]:,}")
        return "\n".join(lines)


def adapt(source: str, data: Path, output: Path, name: str | None) -> Adapted:
    """Write `output`, a servable copy of `source` that knows the classes of `data` instead.

    Raises:
        ExportError: the model has no features to work on, the data is not enough, or the written
            file does not answer as it should; `output` is left as it was.
    """
    if output.suffix.lower() != ".onnx":  # else a slip would overwrite the checkpoint itself
        raise ExportError(f"-o {output}: expected a file that ends in .onnx")
    if not output.parent.is_dir():
        raise ExportError(f"{output}: its folder does not exist")
    name = output.stem if name is None else name
    labels.check_name(name)
    listing = dataset.find(data)
    labels.check(listing.classes)
    with _exported(source) as path:
        base = _open(path)
        card, golden = read_metadata({p.key: p.value for p in base.metadata_props})
        fed = card.preprocessing
        whole = fed.model_copy(update={"patch_size": fed.image_size})
        train, test, skipped = decoded.load(listing, whole, whole, output.parent, available_cpus())
    for bad in skipped[:_SHOWN]:
        sys.stderr.write(f"mixer-train: skipped {bad.name}: {bad.reason}\n")
    if len(skipped) > _SHOWN:
        sys.stderr.write(f"mixer-train: … and {len(skipped) - _SHOWN} more\n")
    trunk = _trunk(base, source)
    features = _run(trunk, FEATURES, _patches(train, fed))  # [n, C]
    head = ridge.fit(features, train.labels, len(listing.classes))
    proto = _with_head(trunk, head)
    new_card = _card(card, head, listing.classes, name)
    sample = photo_like(1, fed, 0)
    logits = _run(proto, "logits", sample)
    tolerance = max(tolerated_share(card, golden, source) * float(np.abs(logits).max()), 1e-6)
    helper.set_model_props(proto, write_metadata(new_card, Golden.of(sample, logits, tolerance)))
    with tempfile.TemporaryDirectory(prefix=".mixer-train-", dir=output.parent) as folder:
        draft = Path(folder) / output.name
        onnx.save(proto, draft)
        engine = open_engine(draft)
        accuracy = _left_out_accuracy(head, train.labels)
        measured = (len(test), _accuracy(engine, test, fed)) if len(test) else None
        draft.replace(output)
    return Adapted(new_card, output, len(train), accuracy, measured, head.regulariser)


@contextmanager
def _exported(source: str) -> Iterator[Path]:
    """Yield an .onnx file of `source`; a checkpoint is exported to one first, which needs torch."""
    if source.endswith(".onnx"):
        if not Path(source).is_file():
            raise ExportError(f"{source}: no such file")
        yield Path(source)
        return
    from model_export import checkpoints, export

    checkpoint = checkpoints.load(source, allow_zero_head=True)
    checkpoints.check_pixels(checkpoint.preprocessing)
    count = checkpoint.model.config.classes
    request = export.Request(
        name="base",
        labels=tuple(map(str, range(count))),  # they go with the head
        preprocessing=checkpoint.preprocessing,
        with_features=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.onnx"
        export.export(checkpoint, request, path, lambda _: None)
        yield path


def _open(path: Path) -> onnx.ModelProto:
    open_engine(path)  # its golden sample proves it sound
    return onnx.load(path)


def _trunk(base: onnx.ModelProto, source: str) -> onnx.ModelProto:
    """Return the graph that computes the features alone, as its only output.

    Where the file has no such output, but ends in a plain linear head, they are what goes into it.
    """
    outputs = {output.name for output in base.graph.output}
    last = next(node for node in base.graph.node if "logits" in node.output)
    if FEATURES not in outputs and last.op_type != "Gemm":
        raise ExportError(
            f"{source}: has no output {FEATURES} and ends in {last.op_type}; export it again with "
            "mixer-export convert --with-features"
        )
    wanted = FEATURES if FEATURES in outputs else last.input[0]
    needed, nodes = {wanted}, []
    for node in reversed(base.graph.node):  # a node comes after those it takes from
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    if wanted != FEATURES:
        nodes.insert(0, helper.make_node("Identity", [wanted], [FEATURES]))
    weights = [tensor for tensor in base.graph.initializer if tensor.name in needed]
    output = helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, ["batch", "channels"])
    graph = helper.make_graph(nodes[::-1], "mixer", base.graph.input, [output], weights)
    return _model(graph, base)


def _with_head(trunk: onnx.ModelProto, head: Head) -> onnx.ModelProto:
    """Add the new head behind the features; the features stay an output."""
    weight = numpy_helper.from_array(head.weight, "adapted.weight")
    bias = numpy_helper.from_array(head.bias, "adapted.bias")
    gemm = helper.make_node("Gemm", [FEATURES, weight.name, bias.name], ["logits"], transB=1)
    logits = helper.make_tensor_value_info(
        "logits", onnx.TensorProto.FLOAT, ["batch", len(head.bias)]
    )
    old = trunk.graph
    graph = helper.make_graph(
        [*old.node, gemm],
        "mixer",
        old.input,
        [logits, *old.output],
        [*old.initializer, weight, bias],
    )
    return _model(graph, trunk)


def _model(graph: onnx.GraphProto, like: onnx.ModelProto) -> onnx.ModelProto:
    return helper.make_model(
        graph,
        opset_imports=like.opset_import,
        ir_version=like.ir_version,
        producer_name="mixer-train",
    )


def _card(base: ModelCard, head: Head, labels: tuple[str, ...], name: str) -> ModelCard:
    digest = hashlib.sha256(base.checksum.encode() + head.weight.tobytes() + head.bias.tobytes())
    checksum, width = digest.hexdigest(), head.weight.shape[1] + 1
    return base.model_copy(
        update={
            "name": name,
            "version": checksum[:12],
            "parameters": base.parameters + (len(labels) - len(base.labels)) * width,
            "labels": labels,
            "source": f"{base.source}, adapted",
            "checksum": checksum,
        }
    )


def _run(proto: onnx.ModelProto, output: str, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Run patches uint8 [n, S, P·P·3] in batches: float32 [n, channels or classes]."""
    session = open_session(proto.SerializeToString())
    starts = tqdm(range(0, len(patches), _BATCH), desc=output, leave=False, disable=None)
    try:
        parts = [session.run([output], {"patches": patches[i : i + _BATCH]})[0] for i in starts]
    except Exception as error:  # onnxruntime raises a class of its own for each status code
        raise ExportError(f"onnxruntime cannot run the model ({first_line(error)})") from error
    return np.concatenate(parts)


def _patches(pictures: Pictures, fed: Preprocessing) -> NDArray[np.uint8]:
    """Cut pictures uint8 [n, H, H, 3] into patches uint8 [n, S, P·P·3]."""
    patch, grid = fed.patch_size, fed.image_size // fed.patch_size
    cut = pictures.pixels.reshape(-1, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(len(pictures), fed.tokens, fed.patch_bytes)


def _left_out_accuracy(head: Head, labels: NDArray[np.int64]) -> float | None:
    """Count over the classes that still have a picture when one is left out."""
    measurable = np.bincount(labels)[labels] > 1  # [n]
    if not measurable.any():
        return None
    right = head.predictions.argmax(axis=1) == labels
    return float(right[measurable].mean())


def _accuracy(engine: OnnxEngine, pictures: Pictures, fed: Preprocessing) -> float:
    patches = _patches(pictures, fed)
    starts = range(0, len(pictures), _BATCH)
    answers = np.concatenate([engine.run(patches[i : i + _BATCH]).argmax(axis=1) for i in starts])
    return float((answers == pictures.labels).mean())
