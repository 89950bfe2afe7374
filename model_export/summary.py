"""Look into a model file: its card, operators, size and cost."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from app.model_card import CardError, ModelCard, read_metadata
from model_export.errors import ExportError
from model_export.session import open_session

# onnxruntime's CUDA provider has no kernel for these (docs/OperatorKernels.md), at least not for
# the uint8 activations that int8 models have.
_CPU_ONLY = frozenset({"DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul"})


@dataclass(frozen=True)
class Summary:
    """What a model file holds."""

    card: ModelCard
    operators: Counter[str]
    gmacs: float  # multiply-accumulates of one image, in 10⁹
    file_bytes: int
    outputs: tuple[str, ...]
    cpu_only: tuple[str, ...]  # operators that keep the model from CUDA


def inspect(path: Path) -> Summary:
    """Read the model file at `path`, and prove that onnxruntime loads it.

    Raises:
        ExportError: it is no model file of ours, or cannot be loaded.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    try:
        proto = onnx.load(path, "protobuf", load_external_data=False)  # ours have none
        card, _ = read_metadata({entry.key: entry.value for entry in proto.metadata_props})
    except DecodeError as error:
        raise ExportError(f"{path}: not an ONNX file ({error})") from error
    except CardError as error:
        raise ExportError(f"{path}: {error}") from error
    open_session(path)
    operators = Counter(node.op_type for node in proto.graph.node)
    return Summary(
        card=card,
        operators=operators,
        gmacs=macs(proto) / 1e9,
        file_bytes=path.stat().st_size,
        outputs=tuple(output.name for output in proto.graph.output),
        cpu_only=tuple(sorted(operators.keys() & _CPU_ONLY)),
    )


def macs(proto: onnx.ModelProto) -> int:
    """Count the multiply-accumulates of one image's matrix products."""
    single = onnx.ModelProto()
    single.CopyFrom(proto)
    single.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(single).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        # What is named after the batch stands for it in the outputs.
        shapes[value.name] = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
    products = [n for n in graph.node if n.op_type in {"MatMul", "Gemm", "MatMulInteger"}]
    return sum(math.prod(shapes[n.output[0]]) * shapes[n.input[0]][-1] for n in products)
