"""From logits to labels: the quick way agrees with the plain one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.predictions import ScoreFunction, best, softmax

# A few values only, so that many are equal, and some far too large for a plain exponential.
LOGITS = st.sampled_from([-1e4, -3.5, 0.0, 1.0, 1.25, 700.0, 1e4])
# Few classes and many take different ways.
logit_lists = st.lists(LOGITS, min_size=1) | st.lists(LOGITS, min_size=51, max_size=90)


@given(logit_lists, st.data())
def test_order_and_scores(values: list[float], data: st.DataObject) -> None:
    """The best labels are those of a stable sort, with the scores that all of them would have."""
    logits = np.array(values, np.float32)
    top_k = data.draw(st.integers(1, len(values)))
    labels = tuple(f"label {index}" for index in range(len(values)))
    order = np.argsort(-logits, kind="stable")[:top_k].tolist()

    found = best(logits, labels, top_k)

    assert [one["index"] for one in found] == order
    assert [one["label"] for one in found] == [labels[index] for index in order]
    assert [one["score"] for one in found] == pytest.approx(softmax(logits)[order].tolist())


@pytest.mark.parametrize(
    ("function", "expected"),
    [("softmax", [1, 0, 0]), ("sigmoid", [1, 0.5, 0]), ("none", [2000, 0, -2000])],
)
def test_far_apart(function: ScoreFunction, expected: list[float]) -> None:
    """No function overflows, however far the logits are apart."""
    found = best(np.array([0, 2000, -2000], np.float32), ("a", "b", "c"), 3, function)
    assert [(one["label"], one["score"]) for one in found] == list(
        zip("bac", expected, strict=True)
    )
