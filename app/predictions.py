"""From logits to the best labels."""

import numpy as np
from numpy.typing import NDArray

from app.schemas import Prediction


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return probabilities float64 [classes] of logits [classes], stable for any range."""
    exponents: NDArray[np.float64] = np.exp(logits.astype(np.float64) - logits.max())
    return exponents / float(exponents.sum())


def best(logits: NDArray[np.float32], labels: tuple[str, ...], top_k: int) -> list[Prediction]:
    """Return the `top_k` most probable labels, best first; ties by the lower index."""
    scores = softmax(logits)
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [
        Prediction(label=labels[index], index=int(index), score=float(scores[index]))
        for index in order
    ]
