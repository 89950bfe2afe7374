"""From logits to the best labels."""

import itertools
import math
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from app.schemas import Prediction

ScoreFunction = Literal["softmax", "sigmoid", "none"]

# Up to here numpy's dozen calls take longer than plain numbers do.
_FEW_CLASSES = 50


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
    pairs = _highest(logits, top_k) if len(logits) > _FEW_CLASSES else _all_of(logits)
    found = sorted(pairs, key=itemgetter(0), reverse=True)[:top_k]  # keeps the order of equals
    score = _softmax_of(logits, found[0][0]) if function == "softmax" else _SCORES[function]
    return [
        Prediction(label=labels[index], index=index, score=score(logit)) for logit, index in found
    ]


def _all_of(logits: NDArray[np.float32]) -> Iterable[tuple[float, int]]:
    """Return each logit with its index."""
    return zip(logits.tolist(), itertools.count())


def _highest(logits: NDArray[np.float32], top_k: int) -> Iterable[tuple[float, int]]:
    """Return the `top_k` highest logits with their indices, in no order."""
    lowest = np.partition(logits, -top_k)[-top_k]
    [indices] = (logits >= lowest).nonzero()
    if len(indices) > top_k:  # several share the last place
        indices = np.argsort(-logits, kind="stable")[:top_k]
    return zip(logits[indices].tolist(), indices.tolist(), strict=True)


def _softmax_of(logits: NDArray[np.float32], highest: float) -> Callable[[float], float]:
    """Return what makes a logit a probability, stable for any range."""
    if len(logits) > _FEW_CLASSES:
        whole = float(np.exp(logits.astype(np.float64) - highest).sum())
    else:
        whole = sum([math.exp(logit - highest) for logit in logits.tolist()])
    return lambda logit: math.exp(logit - highest) / whole


_SCORES: dict[ScoreFunction, Callable[[float], float]] = {
    "sigmoid": lambda logit: (math.tanh(logit / 2) + 1) / 2,  # stable for any range
    "none": float,
}
