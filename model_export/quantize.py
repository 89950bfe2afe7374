"""Int8 weights, and the proof of what they cost: size, logits, top-1 agreement, latency."""

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from model_export import verify
from model_export.errors import ExportError

_MATRIX_PRODUCTS = ("MatMul", "Gemm")
# More than this share of the blocks in float would give up the speed that int8 is chosen for.
_FLOAT_SHARE = 1 / 8
_PROBE_PICTURES = 32  # enough to rank the blocks by their loss
_CALIBRATION_BATCH = 8  # bounds the activations that onnxruntime keeps while it calibrates


def parts(proto: onnx.ModelProto, blocks: int) -> dict[str, list[str]]:
    """Name the matrix products of a float graph by part: stem, block 0 …, head."""
    names = [node.name for node in proto.graph.node if node.op_type in _MATRIX_PRODUCTS]
    stem, *middle, head = names
    each = len(middle) // blocks
    named = {f"block {i}": middle[i * each : (i + 1) * each] for i in range(blocks)}
    return {"stem": [stem], **named, "head": [head]}


def int8(
    proto: onnx.ModelProto, keep_float: list[str], calibration: NDArray[np.uint8] | None
) -> onnx.ModelProto:
    """Quantise the matrix products of a float32 graph, except the nodes in `keep_float`.

    Weights become int8 per output channel. Activations become uint8, with ranges taken from each
    batch, or fixed from `calibration` uint8 [pictures, tokens, P·P·3] where it is given.
    """
    from onnxruntime import quantization as ort

    proto = copy.deepcopy(proto)
    stem = next(node for node in proto.graph.node if node.op_type in _MATRIX_PRODUCTS)
    if stem.name not in keep_float:
        _quantise_stem(proto, stem)
    common = {
        "op_types_to_quantize": list(_MATRIX_PRODUCTS),
        "per_channel": True,
        "weight_type": ort.QuantType.QInt8,
        # onnxruntime takes a Gemm for a MatMul of another name, and an Add.
        "nodes_to_exclude": [*keep_float, *(f"{name}_MatMul" for name in keep_float)],
    }
    # Products of weights alone; and their outputs stay float, since bias and GELU follow.
    options = {
        "MatMulConstBOnly": True,
        "OpTypesToExcludeOutputQuantization": list(_MATRIX_PRODUCTS),
    }
    with tempfile.TemporaryDirectory() as folder, _quiet_root_logger():
        result = Path(folder) / "int8.onnx"
        if calibration is None:
            ort.quantize_dynamic(proto, result, extra_options=options, **common)
        else:
            reader = _reader(calibration)
            ort.quantize_static(proto, result, reader, extra_options=options, **common)
        quantised = onnx.load(result)
    del quantised.graph.value_info[:]
    quantised.producer_name, quantised.producer_version = proto.producer_name, ""
    return quantised


def int8_within(
    proto: onnx.ModelProto,
    blocks: int,
    compare: Callable[[onnx.ModelProto, int | None], verify.Loss],
    min_agreement: float,
    calibration: NDArray[np.uint8] | None,
) -> tuple[onnx.ModelProto, verify.Loss, list[str]]:
    """Quantise, and leave in float those blocks that lose most until the agreement suffices.

    `compare` measures a graph against the float one, over so many pictures or all.

    Returns:
        the graph, its loss, and the names of the parts left in float.

    Raises:
        ExportError: the agreement stays below `min_agreement`.
    """
    named = parts(proto, blocks)
    everything = [node for nodes in named.values() for node in nodes]
    allowed = max(1, int(blocks * _FLOAT_SHARE))
    kept: list[str] = []
    candidate = int8(proto, [], calibration)
    loss = compare(candidate, None)
    if loss.agreement < min_agreement:
        alone = {}
        for part in list(named)[1:-1]:  # stem and head are one product each: hardly worth a probe
            others = [node for node in everything if node not in named[part]]
            alone[part] = compare(int8(proto, others, calibration), _PROBE_PICTURES).rms
        ranking = sorted(alone, key=lambda part: alone[part], reverse=True)
        for part in ranking[:allowed]:
            kept.append(part)
            candidate = int8(proto, [node for p in kept for node in named[p]], calibration)
            loss = compare(candidate, None)
            if loss.agreement >= min_agreement:
                break
    if loss.agreement < min_agreement:
        raise ExportError(
            f"int8 agrees with float on {loss.agreement:.2%} of {loss.pictures} pictures, even "
            f"with {', '.join(kept)} in float; at least {min_agreement:.2%} is asked for "
            "(--min-agreement)"
        )
    return candidate, loss, kept


def _quantise_stem(proto: onnx.ModelProto, stem: onnx.NodeProto) -> None:
    """Multiply the stem's int8 weights with the patches' own bytes, which needs no rounding."""
    graph = proto.graph
    cast = next(node for node in graph.node if node.output[0] == stem.input[0])
    weight = next(w for w in graph.initializer if w.name == stem.input[1])
    values = numpy_helper.to_array(weight)  # float32 [P·P·3, C]
    scale = np.maximum(np.abs(values).max(axis=0) / 127, np.finfo(np.float32).tiny)  # [C]
    rounded = np.rint(values / scale).astype(np.int8)  # [P·P·3, C]
    graph.initializer.remove(weight)
    graph.initializer.extend(
        [
            numpy_helper.from_array(rounded, "stem.weight_int8"),
            numpy_helper.from_array(scale.astype(np.float32), "stem.scale"),
        ]
    )
    output = stem.output[0]
    replacement = [
        helper.make_node(
            "MatMulInteger", [cast.input[0], "stem.weight_int8"], ["stem.sums"], "stem_product"
        ),
        helper.make_node(
            "Cast", ["stem.sums"], ["stem.float"], "stem_cast", to=cast.attribute[0].i
        ),
        helper.make_node("Mul", ["stem.float", "stem.scale"], [output], "stem_scale"),
    ]
    rest = [node for node in graph.node if node.name not in (cast.name, stem.name)]
    del graph.node[:]
    graph.node.extend(replacement + rest)


def _reader(calibration: NDArray[np.uint8]) -> object:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
        """Feeds the pictures to the calibration in small batches."""

        def __init__(self) -> None:
            starts = range(0, len(calibration), _CALIBRATION_BATCH)
            self.batches = iter([calibration[i : i + _CALIBRATION_BATCH] for i in starts])

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"patches": batch}

    return Reader()


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Hold back the quantiser's advice to preprocess, which its own shape inference makes moot."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
