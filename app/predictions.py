"""From logits to the best labels."""

import itertools
import math
from collections.abc import Callable
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


def ranked(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the indices [count] of the highest logits, best first; ties by the lower index."""
    lowest = np.partition(logits, -count)[-count]
    [found] = (logits >= lowest).nonzero()  # by index; more than `count` if some share the last
    order: NDArray[np.int64] = found[np.argsort(-logits[found], kind="stable")][:count]
    return order


def best(
    logits: NDArray[np.float32],
    labels: tuple[str, ...],
    top_k: int,
    function: ScoreFunction = "softmax",
) -> list[Prediction]:
    """Return the `top_k` labels of the highest scores, best first; ties by the lower index."""
    # No function changes the order of the logits, so only what is answered needs a score.
    if len(logits) > _FEW_CLASSES:
        order = ranked(logits, top_k)
        found = list(zip(logits[order].tolist(), order.tolist(), strict=True))
    else:  # sorted() keeps the order of equals
        all_of = zip(logits.tolist(), itertools.count())
        found = sorted(all_of, key=itemgetter(0), reverse=True)[:top_k]
    score = _softmax_of(logits, found[0][0]) if function == "softmax" else _SCORES[function]
    return [
        Prediction(label=labels[index], index=index, score=score(logit)) for logit, index in found
    ]


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
