"""From logits to the best labels."""

from heapq import nlargest
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from app.schemas import Prediction

ScoreFunction = Literal["softmax", "sigmoid", "none"]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return probabilities float64 [classes] of logits [classes], stable for any range."""
    exponents: NDArray[np.float64] = np.exp(logits.astype(np.float64) - logits.max())
    return exponents / float(exponents.sum())


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return each label's own probability, float64 [classes], stable for any range."""
    halves: NDArray[np.float64] = np.tanh(logits.astype(np.float64) / 2)
    return (halves + 1) / 2


def best(
    logits: NDArray[np.float32],
    labels: tuple[str, ...],
    top_k: int,
    function: ScoreFunction = "softmax",
) -> list[Prediction]:
    """Return the `top_k` labels of the highest scores, best first; ties by the lower index."""
    scores = _scores(logits, function)
    # Not by numpy's argsort: it lets go of the GIL for even ten numbers, and the event loop then
    # waits its turn behind the other threads.
    values: list[float] = scores.tolist()
    order = nlargest(top_k, range(len(values)), key=values.__getitem__)
    return [Prediction(label=labels[index], index=index, score=values[index]) for index in order]


def _scores(logits: NDArray[np.float32], function: ScoreFunction) -> NDArray[np.float64]:
    if function == "softmax":
        return softmax(logits)
    return sigmoid(logits) if function == "sigmoid" else logits.astype(np.float64)
