"""Write one self-describing ONNX file from a checkpoint, or nothing at all."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from app.model_card import Golden, ModelCard, Preprocessing, write_metadata
from model_export import graph, labels, quantize, verify
from model_export.checkpoints import Checkpoint
from model_export.errors import ExportError
from model_export.mixer import VARIANTS, Mixer, MixerConfig
from model_export.samples import GOLDEN_SHARE, photo_like
from model_export.session import open_session

Precision = Literal["fp32", "fp16", "int8"]

_GOLDEN_SEED = 0
_GOLDEN_FLOOR = 1e-6  # a head of zeros has no logits to take a share of
# A protobuf message holds 2 GiB at most; the graph itself takes little beside its weights.
_MAX_PARAMETERS = (2**31 - 2**20) // 4
_LOSS_SEED = 100
_LOSS_PICTURES = 128  # the default agreement of 0.99 then allows one other answer


@dataclass(frozen=True)
class Shrunk:
    """What a smaller precision cost and gained against float32, measured in the same run."""

    loss: verify.Loss
    float_bytes: int
    latency_ratio: float  # below 1 is faster than float32
    kept_float: tuple[str, ...]  # parts that int8 would have hurt too much


@dataclass(frozen=True)
class Report:
    """What was written, and how it was proven."""

    card: ModelCard
    path: Path
    file_bytes: int
    agreement: verify.Agreement
    shrunk: Shrunk | None


@dataclass(frozen=True)
class Request:
    """What to export and how."""

    name: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    precision: Precision = "fp32"
    min_agreement: float = 0.99  # share of pictures on which a smaller precision must agree
    with_features: bool = False
    calibration: NDArray[np.uint8] | None = None  # [pictures, tokens, P·P·3], for static int8


def export(
    checkpoint: Checkpoint, request: Request, path: Path, step: Callable[[str], object]
) -> Report:
    """Export `checkpoint` to `path`; `step` is told what is being done.

    Raises:
        ExportError: the file does not answer as the torch model does, or a smaller precision
            loses too much; `path` is left as it was.
    """
    if not path.parent.is_dir():
        raise ExportError(f"{path}: its folder does not exist")
    if path.is_dir():
        raise ExportError(f"{path}: is a folder, expected a file")
    model, preprocessing = checkpoint.model, request.preprocessing
    card = _card(checkpoint, request)
    if card.parameters > _MAX_PARAMETERS:
        raise ExportError(
            f"{checkpoint.source}: {card.parameters:,} parameters; an ONNX file holds at most "
            f"{_MAX_PARAMETERS:,} in float32, which is 2 GiB"
        )
    step("tracing")
    proto = graph.to_onnx(model, preprocessing, with_features=request.with_features)
    sample = photo_like(1, preprocessing, _GOLDEN_SEED)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".mixer-export-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        onnx.save(proto, draft)
        step("verifying")
        agreement = verify.compare(model, preprocessing, draft)
        shrunk = None
        if request.precision == "fp32":
            logits, _ = verify.torch_outputs(model, preprocessing, sample)
            tolerance = GOLDEN_SHARE["fp32"] * float(np.abs(logits).max())
        else:
            proto, shrunk = _shrink(model, request, proto, step)
            session = open_session(proto.SerializeToString())
            logits = verify.logits_of(session, sample)
            # Rounding flips differ between processors, but by no more than rounding itself cost.
            tolerance = max(
                shrunk.loss.logits,
                GOLDEN_SHARE.get(request.precision, 0) * float(np.abs(logits).max()),
            )
        step("writing")
        golden = Golden.of(sample, logits, max(tolerance, _GOLDEN_FLOOR))
        onnx.helper.set_model_props(proto, write_metadata(card, golden))
        onnx.save(proto, draft)
        draft.replace(path)
    return Report(card, path, path.stat().st_size, agreement, shrunk)


def _shrink(
    model: Mixer, request: Request, proto: onnx.ModelProto, step: Callable[[str], object]
) -> tuple[onnx.ModelProto, Shrunk]:
    """Make the graph smaller and measure what that costs against the float32 one."""
    pictures = request.calibration
    if pictures is None:
        pictures = photo_like(_LOSS_PICTURES, request.preprocessing, _LOSS_SEED)
    step("running float32")
    float_bytes = proto.SerializeToString()
    baseline = open_session(float_bytes)
    expected = verify.logits_of(baseline, pictures)

    def compare(candidate: onnx.ModelProto, count: int | None) -> verify.Loss:
        session = open_session(candidate.SerializeToString())
        return verify.lose(expected[:count], verify.logits_of(session, pictures[:count]))

    step(f"converting to {request.precision}")
    kept: list[str] = []
    if request.precision == "fp16":
        proto = graph.to_onnx(
            model, request.preprocessing, with_features=request.with_features, half=True
        )
        loss = compare(proto, None)
        if not math.isfinite(loss.logits):
            raise ExportError("fp16 overflows: its logits are no finite numbers; take fp32 or int8")
        if not loss.agreement >= request.min_agreement:
            raise ExportError(
                f"fp16 agrees with float32 on {loss.agreement:.2%} of {loss.pictures} pictures; "
                f"at least {request.min_agreement:.2%} is asked for (--min-agreement)"
            )
    else:
        proto, loss, kept = quantize.int8_within(
            proto,
            model.config.blocks,
            compare,
            request.min_agreement,
            request.calibration,
        )
    step("timing")
    ratio = verify.latency_ratio(baseline, open_session(proto.SerializeToString()), pictures)
    return proto, Shrunk(loss, len(float_bytes), ratio, tuple(kept))


def _card(checkpoint: Checkpoint, request: Request) -> ModelCard:
    labels.check((request.name, checkpoint.source, *request.labels))
    return ModelCard(
        name=request.name,
        version=checkpoint.checksum[:12],
        family=checkpoint.family,
        variant=variant(checkpoint.family, checkpoint.model.config),
        parameters=sum(p.numel() for p in checkpoint.model.parameters()),
        preprocessing=request.preprocessing,
        labels=request.labels,
        source=checkpoint.source,
        precision=request.precision,
        checksum=checkpoint.checksum,
    )


def variant(family: str, config: MixerConfig) -> str:
    """Name the paper's variant, or the dimensions where it is none of them."""
    for name, known in VARIANTS.items():
        if family == "mixer" and _dimensions(known) == _dimensions(config):
            return name
    return _dimensions(config)


def _dimensions(config: MixerConfig) -> str:
    token_mlp = f"D_S {config.token_mlp}, " if config.token_mlp else ""
    return (
        f"P {config.patch_size}, S {config.tokens}, C {config.hidden}, {token_mlp}"
        f"D_C {config.channel_mlp}, {config.blocks} blocks"
    )
