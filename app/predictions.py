"""From logits to the best labels."""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from app.schemas import Prediction

ScoreFunction = Literal["softmax", "sigmoid", "none"]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return probabilities float64 [classes] of logits [classes], stable for any range."""
    exponents: NDArray[np.float64] = np.exp(logits.astype(np.float64) - logits.max())
    return exponents / float(exponents.sum())


def best(
    logits: NDArray[np.float32],
    labels: tuple[str, ...],
    top_k: int,
    function: ScoreFunction = "softmax",
) -> list[Prediction]:
    """Return the `top_k` labels of the highest scores, best first; ties by the lower index."""
    # No function changes the order of the logits, so only what is answered needs a score.
    lowest = np.partition(logits, -top_k)[-top_k]
    [indices] = (logits >= lowest).nonzero()
    found = sorted(zip(logits[indices].tolist(), indices.tolist(), strict=True), key=_logit)
    del found[top_k:]
    score = _softmax_of(logits, found[0][0]) if function == "softmax" else _SCORES[function]
    return [Prediction(label=labels[index], index=index, score=score(x)) for x, index in found]


def _logit(found: tuple[float, int]) -> float:
    return -found[0]  # sorting keeps the order of equals


def _softmax_of(logits: NDArray[np.float32], highest: float) -> Callable[[float], float]:
    whole = float(np.exp(logits.astype(np.float64) - highest).sum())
    return lambda logit: math.exp(logit - highest) / whole


_SCORES: dict[ScoreFunction, Callable[[float], float]] = {
    "sigmoid": lambda logit: (math.tanh(logit / 2) + 1) / 2,  # stable for any range
    "none": float,
}
