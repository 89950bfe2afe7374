"""Prove that an ONNX file answers as the torch model does, before anyone serves it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from app.model_card import Preprocessing
from model_export.errors import ExportError
from model_export.mixer import Mixer
from model_export.samples import photo_like

if TYPE_CHECKING:
    import onnxruntime

# Summation order alone moves float32 logits by about 1e-6 of their size; this leaves room for deep
# models and still catches a wrong GELU form or eps. Logits beyond 10 may stray in proportion.
LIMIT = 1e-4
RELATIVE_LIMIT = 1e-5
BATCHES = (1, 3, 8)  # several sizes prove that the batch axis is dynamic
_SEED = 1  # the golden sample has seed 0


@dataclass(frozen=True)
class Agreement:
    """How far two models' outputs are apart over the same pictures."""

    pictures: int
    logits: float  # largest |Δlogit|
    features: float | None  # largest |Δfeature|, where the file has that output
    limit: float  # what was allowed, for both


def open_session(path: Path, threads: int = 0) -> "onnxruntime.InferenceSession":
    """Open `path` on the CPU with so many threads; 0 lets onnxruntime choose.

    Raises:
        ExportError: onnxruntime is not installed, or cannot load the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "onnxruntime is not installed: pip install 'mixer-serve[cpu]' or 'mixer-serve[gpu]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # its errors become one line of ours
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class of its own for each status code
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise ExportError(f"{path.name}: onnxruntime cannot load it ({reason})") from error


def torch_outputs(
    model: Mixer, preprocessing: Preprocessing, patches: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run the torch model on `patches` uint8 [batch, tokens, P·P·3], normalised in float32.

    Returns:
        logits float32 [batch, classes] and features float32 [batch, C].
    """
    colors = preprocessing.patch_size**2
    mean = torch.tensor(preprocessing.mean).repeat(colors)  # [P·P·3]
    std = torch.tensor(preprocessing.std).repeat(colors)  # [P·P·3]
    with torch.inference_mode():
        x = (torch.from_numpy(patches).float() / 255 - mean) / std  # [batch, tokens, P·P·3]
        features = model.features(x)  # [batch, C]
        return model.head(features).numpy(), features.numpy()


def compare(model: Mixer, preprocessing: Preprocessing, path: Path) -> Agreement:
    """Compare the float32 ONNX file at `path` with the torch model it was made from.

    Raises:
        ExportError: they differ by more than the limit, or an output is not as promised.
    """
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    logits_apart, features_apart, limit = 0.0, 0.0, LIMIT
    for number, batch in enumerate(BATCHES):
        patches = photo_like(batch, preprocessing, _SEED + number)
        expected = torch_outputs(model, preprocessing, patches)
        got = session.run(names, {"patches": patches})
        limit = max(limit, RELATIVE_LIMIT * float(np.abs(expected[0]).max()))
        for name, ours, theirs in zip(names, got, expected, strict=False):
            if ours.shape != theirs.shape or ours.dtype != np.float32:
                raise ExportError(
                    f"verification failed: {name} is {ours.dtype} {ours.shape} for a batch of "
                    f"{batch}, expected float32 {theirs.shape}"
                )
        logits_apart = max(logits_apart, float(np.abs(got[0] - expected[0]).max()))
        if "features" in names:
            features_apart = max(features_apart, float(np.abs(got[1] - expected[1]).max()))
    if not max(logits_apart, features_apart) <= limit:  # also catches NaN
        raise ExportError(
            f"verification failed: onnxruntime's logits differ from torch's by {logits_apart:.3g}, "
            f"features by {features_apart:.3g}; at most {limit:.3g} is allowed"
        )
    return Agreement(
        sum(BATCHES), logits_apart, features_apart if "features" in names else None, limit
    )
