"""Write one self-describing ONNX file from a checkpoint, or nothing at all."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from app.model_card import Golden, ModelCard, Preprocessing, write_metadata
from model_export import graph, verify
from model_export.checkpoints import Checkpoint
from model_export.errors import ExportError
from model_export.mixer import VARIANTS, MixerConfig
from model_export.samples import photo_like

_GOLDEN_SEED = 0
# Largest |Δlogit| / largest |logit| that is still the same model. Measured on the embedded model
# and a B/16: float32 against float64 6e-7, so another CPU or GPU passes; TF32 4e-4, a wrong GELU
# form 1.6e-4 and more, so a wrong runtime does not.
_GOLDEN_SHARE = 1e-4
_GOLDEN_FLOOR = 1e-6  # a head of zeros has no logits to take a share of


@dataclass(frozen=True)
class Report:
    """What was written, and how it was proven."""

    card: ModelCard
    path: Path
    file_bytes: int
    agreement: verify.Agreement


def export(
    checkpoint: Checkpoint,
    path: Path,
    *,
    name: str,
    labels: tuple[str, ...],
    preprocessing: Preprocessing,
    step: Callable[[str], object],
) -> Report:
    """Export `checkpoint` to `path`; `step` is told what is being done.

    Raises:
        ExportError: the file does not answer as the torch model does; `path` is left as it was.
    """
    card = ModelCard(
        name=name,
        version=checkpoint.checksum[:12],
        family=checkpoint.family,
        variant=variant(checkpoint.model.config),
        parameters=sum(p.numel() for p in checkpoint.model.parameters()),
        preprocessing=preprocessing,
        labels=labels,
        source=checkpoint.source,
        checksum=checkpoint.checksum,
    )
    step("tracing")
    proto = graph.to_onnx(checkpoint.model, preprocessing)
    sample = photo_like(1, preprocessing, _GOLDEN_SEED)
    logits, _ = verify.torch_outputs(checkpoint.model, preprocessing, sample)
    onnx.helper.set_model_props(proto, write_metadata(card, golden(sample, logits)))
    if not path.parent.is_dir():
        raise ExportError(f"{path}: its folder does not exist")
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".mixer-export-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        step("writing")
        onnx.save(proto, draft)
        step("verifying")
        agreement = verify.compare(checkpoint.model, preprocessing, draft)
        draft.replace(path)
    return Report(card, path, path.stat().st_size, agreement)


def golden(patches: NDArray[np.uint8], logits: NDArray[np.float32]) -> Golden:
    """Pack a sample uint8 [1, tokens, P·P·3] and its logits float32 [1, classes] for the server."""
    tolerance = max(_GOLDEN_SHARE * float(np.abs(logits).max()), _GOLDEN_FLOOR)
    return Golden.of(patches, logits, tolerance)


def variant(config: MixerConfig) -> str:
    """Name the paper's variant, or the dimensions where it is none of them."""
    for name, known in VARIANTS.items():
        if _dimensions(known) == _dimensions(config):
            return name
    return _dimensions(config)


def _dimensions(config: MixerConfig) -> str:
    return (
        f"P {config.patch_size}, S {config.tokens}, C {config.hidden}, D_S {config.token_mlp}, "
        f"D_C {config.channel_mlp}, {config.blocks} blocks"
    )
