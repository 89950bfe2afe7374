"""Prove that an ONNX file answers as the torch model does, before anyone serves it."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.model_card import Preprocessing
from model_export.errors import ExportError
from model_export.mixer import Mixer
from model_export.samples import photo_like
from model_export.session import open_session

# Summation order alone moves float32 logits by about 1e-6 of their size; this leaves room for deep
# models and still catches a wrong GELU form or eps. Logits beyond 10 may stray in proportion.
LIMIT = 1e-4
_RELATIVE_LIMIT = 1e-5
_BATCHES = (1, 3, 8)  # several sizes prove that the batch axis is dynamic
_SEED = 1  # the golden sample has seed 0
_RUN_BATCH = 8  # bounds the memory of one run; latency is measured at the same size
_LATENCY_ROUNDS = 5  # the median of so many paired runs


@dataclass(frozen=True)
class Agreement:
    """How far the float32 file's outputs are from torch's over the same pictures."""

    pictures: int
    logits: float  # largest |Δlogit|
    features: float | None  # largest |Δfeature|, where the file has that output
    limit: float  # what was allowed, for both


@dataclass(frozen=True)
class Loss:
    """What a smaller model lost against the float32 one, over the same pictures."""

    pictures: int
    logits: float  # largest |Δlogit|
    rms: float  # root mean square of Δlogit
    agreement: float  # share of pictures with the same best class


def torch_outputs(
    model: Mixer, preprocessing: Preprocessing, patches: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run the torch model on `patches` uint8 [batch, tokens, P·P·3], normalised in float32.

    Returns:
        logits float32 [batch, classes] and features float32 [batch, C].
    """
    pixels = preprocessing.patch_size**2
    mean = torch.tensor(preprocessing.mean).repeat(pixels)  # [P·P·3]
    std = torch.tensor(preprocessing.std).repeat(pixels)  # [P·P·3]
    with torch.inference_mode():
        x = (torch.from_numpy(patches).float() / 255 - mean) / std  # [batch, tokens, P·P·3]
        features = model.features(x)  # [batch, C]
        return model.head(features).numpy(), features.numpy()


def logits_of(session: Any, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Run `patches` uint8 [pictures, tokens, P·P·3] in small batches: [pictures, classes]."""
    starts = range(0, len(patches), _RUN_BATCH)
    runs = [session.run(["logits"], {"patches": patches[i : i + _RUN_BATCH]})[0] for i in starts]
    return np.concatenate(runs)


def compare(model: Mixer, preprocessing: Preprocessing, path: Path) -> Agreement:
    """Compare the float32 ONNX file at `path` with the torch model it was made from.

    Raises:
        ExportError: they differ by more than the limit, or an output is not as promised.
    """
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    apart = dict.fromkeys(names, 0.0)
    limits = dict.fromkeys(names, LIMIT)
    for number, batch in enumerate(_BATCHES):
        patches = photo_like(batch, preprocessing, _SEED + number)
        wanted = dict(
            zip(("logits", "features"), torch_outputs(model, preprocessing, patches), strict=True)
        )
        for name, got in zip(names, session.run(names, {"patches": patches}), strict=True):
            if got.shape != wanted[name].shape or got.dtype != np.float32:
                raise ExportError(
                    f"verification failed: {name} is {got.dtype} {got.shape} for a batch of "
                    f"{batch}, expected float32 {wanted[name].shape}"
                )
            largest = float(np.abs(wanted[name]).max())
            limits[name] = max(limits[name], _RELATIVE_LIMIT * largest)
            # maximum() keeps a NaN, max() would lose it.
            apart[name] = float(np.maximum(apart[name], np.abs(got - wanted[name]).max()))
    for name, difference in apart.items():
        if not difference <= limits[name]:
            raise ExportError(
                f"verification failed: onnxruntime's {name} differ from torch's by "
                f"{difference:.3g}; at most {limits[name]:.3g} is allowed"
            )
    return Agreement(sum(_BATCHES), apart["logits"], apart.get("features"), limits["logits"])


def lose(expected: NDArray[np.float32], got: NDArray[np.float32]) -> Loss:
    """Measure logits `got` against the float model's, both float32 [pictures, classes]."""
    difference = np.abs(got - expected)
    # The highest of NaNs would be the first class, and agree with it.
    agrees = (got.argmax(axis=1) == expected.argmax(axis=1)) & np.isfinite(got).all(axis=1)
    return Loss(
        pictures=len(expected),
        logits=float(difference.max()),
        rms=float(np.sqrt(np.square(difference).mean())),
        agreement=float(agrees.mean()),
    )


def latency_ratio(baseline: Any, candidate: Any, patches: NDArray[np.uint8]) -> float:
    """Return the candidate's time for one batch of `patches` over the baseline's.

    The two take turns, so that other load on the machine falls on both.
    """
    batch = {"patches": patches[:_RUN_BATCH]}
    ratios = []
    for _ in range(_LATENCY_ROUNDS + 1):
        seconds = []
        for session in (baseline, candidate):
            start = time.perf_counter()
            session.run(["logits"], batch)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    return float(np.median(ratios[1:]))  # the first round warms up
