"""From logits to the best labels."""

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
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [
        Prediction(label=labels[index], index=int(index), score=float(scores[index]))
        for index in order
    ]


def _scores(logits: NDArray[np.float32], function: ScoreFunction) -> NDArray[np.float64]:
    if function == "softmax":
        return softmax(logits)
    return sigmoid(logits) if function == "sigmoid" else logits.astype(np.float64)
