"""Ridge regression in closed form, with every leave-one-out prediction from one decomposition.

The few-shot evaluation of Tolstikhin et al. 2021, section 3: from frozen features to one-hot
targets. As in big_vision's fewshot_lsr the features are whitened one by one, and the regulariser is
taken from powers of two; here the leave-one-out error chooses it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_REGULARISERS = 2.0 ** np.arange(-10, 21)  # big_vision's range
_SHARPNESS = 2.0 ** np.arange(0, 8, 0.25)  # factors from a regression to a logit
_FLAT = 1e-6  # a feature that varies less than this is constant


@dataclass(frozen=True)
class Head:
    """A linear classifier and what leaving out one picture at a time says of it."""

    weight: NDArray[np.float32]  # [classes, C]
    bias: NDArray[np.float32]  # [classes]
    regulariser: float
    predictions: Floats  # [n, classes]: each row from a head that never saw its picture


def fit(features: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> Head:
    """Solve for the head that predicts one-hot targets best when one picture is left out.

    Each class counts alike, however many pictures it has: picture i has the weight w_i = n /
    (number of classes · pictures of its class). Else a head that never gives a rare label would be
    the best one. In the paper's protocol, of as many pictures each, all weights are 1.

    With X centred, whitened and its rows times √w, X = U·S·Vᵀ, the fit is H·Y with H = √w√wᵀ/n +
    U·(S²/(S²+λ))·Uᵀ, and leaving out picture i moves its own prediction from f to y - (y - f) /
    (1 - H_ii): the intercept included, exactly. Scale and weights are those of all pictures.

    A regression's outputs lie between 0 and 1, which softmax would turn into nearly equal scores:
    they are multiplied by the factor whose left-out predictions have the least cross entropy. It is
    taken against Platt's targets (1999), (n+1)/(n+2) for a class of n pictures, since a few that
    are told apart without error are no proof of certainty.

    Args:
        features: float32 [n, C].
        labels: int64 [n].
        classes: how many.
    """
    x = features.astype(np.float64)
    y = np.eye(classes)[labels]  # [n, classes]
    counts = y.sum(axis=0)  # [classes]
    weights = len(x) / (np.count_nonzero(counts) * counts[labels])  # [n], of mean 1
    root = np.sqrt(weights)[:, None]  # [n, 1]
    mean = np.average(x, axis=0, weights=weights)  # [C]
    scale = np.sqrt(np.average(np.square(x - mean), axis=0, weights=weights))  # [C]
    scale = np.where(scale > _FLAT, scale, np.inf)
    u, s, vt = np.linalg.svd(root * (x - mean) / scale, full_matrices=False)  # [n, r], [r], [r, C]
    y_mean = np.average(y, axis=0, weights=weights)  # [classes]
    projected = u.T @ (root * (y - y_mean))  # [r, classes]
    best: tuple[float, float, Floats] | None = None
    for regulariser in _REGULARISERS:
        shrink = s**2 / (s**2 + regulariser)  # [r]
        fitted = y_mean + u @ (shrink[:, None] * projected) / root  # [n, classes]
        own = weights / len(x) + (u**2) @ shrink  # [n], H_ii
        left_out = y - (y - fitted) / np.maximum(1 - own, 1e-12)[:, None]  # [n, classes]
        error = float((weights[:, None] * np.square(y - left_out)).mean())
        if best is None or error < best[0]:
            best = error, float(regulariser), left_out
    assert best is not None
    _, regulariser, left_out = best
    sure = (counts + 1) / (counts + 2)  # [classes]
    targets = np.where(y > 0, sure, ((1 - sure) / (classes - 1))[labels][:, None])  # [n, classes]
    sharpness = min(
        _SHARPNESS, key=lambda factor: _cross_entropy(factor * left_out, targets, weights)
    )
    solved = (vt.T * (s / (s**2 + regulariser))) @ projected  # [C, classes]
    weight = solved / scale[:, None]  # [C, classes]
    bias = y_mean - mean @ weight  # [classes]
    return Head(
        (sharpness * weight.T).astype(np.float32),
        (sharpness * bias).astype(np.float32),
        regulariser,
        left_out,
    )


def _cross_entropy(logits: Floats, targets: Floats, weights: Floats) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)  # [n, classes]
    log_sum = np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # [n, 1]
    return float((weights * (targets * (log_sum - shifted)).sum(axis=1)).mean())
