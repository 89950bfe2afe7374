"""The latency table: what was measured, and straight lines between."""

from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from app.admission import Admission
from app.errors import StartupError
from app.latency import FRESHNESS, LatencyTable, batches_at_once, warm_up
from app.settings import Settings
from app.shares import Share
from tests.fakes import FakeEngine

MAX_BATCH = 20
measurements = st.lists(
    st.tuples(st.integers(1, MAX_BATCH), st.floats(0.001, 0.003)), min_size=1, max_size=30
)


@given(measurements)
def test_between_what_was_measured(measured: list[tuple[int, float]]) -> None:
    """A size never seen takes what its neighbours say; beyond the largest one it is as that one."""
    table = LatencyTable(MAX_BATCH, decode_threads=1)
    expected = {0: 0.0}
    for images, seconds in measured:
        table.observe_batch(images, seconds)
        known = expected.get(images, seconds)
        expected[images] = known + FRESHNESS * (seconds - known)
    sizes = sorted(expected)

    line = np.interp(range(MAX_BATCH + 1), sizes, [expected[size] for size in sizes])

    found = [table.inference_s(images) for images in range(MAX_BATCH + 1)]
    assert found == pytest.approx(line.tolist())


def test_long_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up leaves out sizes that take long, and expects of them what is in proportion."""
    monkeypatch.setattr("app.latency.LONG_S", 0.05)
    table = LatencyTable(64, decode_threads=1)
    engine = FakeEngine(seconds=0.1)
    monkeypatch.setattr(engine, "run", Mock(wraps=engine.run))
    warm_up(engine, 64, table)
    assert [len(call.args[0]) for call in engine.run.call_args_list] == [1, 1]  # type: ignore[attr-defined] # of the mock
    assert table.inference_s(64) == pytest.approx(64 * table.inference_s(1))
    assert table.inference_s(32) == pytest.approx(32 * table.inference_s(1))


def test_a_surprise_counts_as_four_times_what_was_expected() -> None:
    """One picture or batch that takes a minute does not have everyone after it refused."""
    table = LatencyTable(MAX_BATCH, decode_threads=1)
    for seconds in (0.01, 60):
        table.observe_decode(seconds)
        table.observe_batch(1, seconds)
    expected = pytest.approx(0.01 * (1 + 3 * FRESHNESS))
    assert table.decoding_s(1) == expected
    assert table.inference_s(1) == expected


def test_the_slower_of_two_sets_the_pace() -> None:
    """Images wait for decoders or for the engine, whichever takes longer over all of them."""
    for decode_s, wait_s in ((0.001, 0.4), (0.1, 2.0)):
        table = LatencyTable(MAX_BATCH, decode_threads=2)
        table.observe_batch(MAX_BATCH, 0.2)
        table.observe_decode(decode_s)
        assert table.wait_s(2 * MAX_BATCH) == pytest.approx(wait_s)


def test_batches_side_by_side() -> None:
    """What the engine's threads infer side by side takes no longer than one batch."""
    table = LatencyTable(4, decode_threads=1, batches_at_once=3)
    for images, seconds in ((1, 0.1), (4, 0.2)):
        table.observe_batch(images, seconds)
    took = [table.inference_s(images) for images in (0, 1, 4, 5, 12, 13, 16, 24, 25)]
    assert took == pytest.approx([0, 0.1, 0.2, 0.2, 0.2, 0.3, 0.4, 0.4, 0.5])


@pytest.mark.parametrize(
    ("threads", "max_batch", "is_wide", "batches"),
    [(1, 16, False, 1), (2, 16, False, 1), (16, 4, False, 4), (64, 16, False, 4), (9, 4, True, 1)],
)
def test_how_many_batches_side_by_side(
    monkeypatch: pytest.MonkeyPatch, threads: int, max_batch: int, is_wide: bool, batches: int
) -> None:
    """As many batches as its threads can take the shares of, of which a wide one takes them all."""
    engine = FakeEngine(threads=threads)
    if is_wide:
        monkeypatch.setattr(engine, "cut", lambda images: [Share(images, is_wide=True)])
    assert batches_at_once(engine, max_batch) == batches


@pytest.mark.parametrize(
    ("piece_s", "size"), [(0.001, 1), (0.045, 4), (0.055, 5), (9.0, MAX_BATCH)]
)
def test_spare_work_in_short_pieces(piece_s: float, size: int) -> None:
    """Spare work is cut into the largest inferences that are short enough, the last one whole."""
    table = LatencyTable(MAX_BATCH, decode_threads=1)
    table.observe_batch(MAX_BATCH, 0.01 * MAX_BATCH)
    assert table.images_within(piece_s) == size
    for images, pieces in ((1, 1), (size, 1), (size + 1, 2), (3 * size, 3)):
        assert table.spare_s(images, piece_s) == pytest.approx(pieces * 0.01 * size)


def test_idle_service_takes_no_longer_than_it_does() -> None:
    """A lone image is decoded once and inferred once, a second after or beside it."""
    table = LatencyTable(MAX_BATCH, decode_threads=1)
    table.observe_decode(0.1)
    table.observe_batch(1, 0.01)
    assert table.service_s(1) == pytest.approx(0.11)
    assert table.service_s(2) == pytest.approx(0.21)
    table = LatencyTable(MAX_BATCH, decode_threads=2)
    table.observe_decode(0.1)
    assert table.service_s(3) == pytest.approx(0.2)


def test_slow_pictures_are_not_the_next_ones_fault() -> None:
    """After slow pictures an idle service could still do a usual one; with a slow engine not."""
    table = LatencyTable(MAX_BATCH, decode_threads=1)
    table.observe_decode(0.002)
    table.observe_batch(1, 0.002)
    table.stay_calm()
    for _ in range(20):
        table.observe_decode(1.0)
    assert table.service_s(1) > 0.5
    assert table.could_do(1, 0.1)
    for _ in range(20):
        table.observe_batch(1, 1.0)
    assert not table.could_do(1, 0.1)


def test_sizes_that_nobody_measures_come_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a slow spell, sizes that are refused since are as dear again as the smallest is."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    table = LatencyTable(MAX_BATCH, decode_threads=1)
    for images in (1, 8, MAX_BATCH):
        table.observe_batch(images, 0.01 * images)
    table.stay_calm()
    for _ in range(20):
        for images in (1, 8, MAX_BATCH):
            table.observe_batch(images, 0.4)
    assert table.inference_s(MAX_BATCH) > 0.35
    for _ in range(100):
        now += 0.2
        table.observe_batch(1, 0.02)
        assert table.inference_s(8) >= 0.159, "they come down further than the smallest has"
    assert table.inference_s(8) == pytest.approx(0.16, rel=0.01)
    assert table.inference_s(14) == pytest.approx(0.28, rel=0.01)  # between two of them
    assert table.inference_s(MAX_BATCH) == pytest.approx(0.4, rel=0.02)
    table.observe_batch(MAX_BATCH, 0.9)
    measured_s = table.inference_s(MAX_BATCH)
    for _ in range(4):
        now += 0.2
        table.observe_batch(1, 0.02)
        assert table.inference_s(MAX_BATCH) == measured_s, "it was measured within a second"
    now += 0.4
    table.observe_batch(1, 0.02)
    assert table.inference_s(MAX_BATCH) < measured_s


def test_slow_decoding_keeps_within_the_budget() -> None:
    """Four batches are taken of a slow model's images, but no more than can be decoded in time."""
    for decode_s, infer_s, taken in ((0.001, 4.0, 64), (0.19, 0.016, 7)):
        latency = LatencyTable(max_batch=16, decode_threads=2)
        latency.observe_decode(decode_s)
        latency.observe_batch(16, infer_s)
        admission = Admission(Settings(queue_budget_ms=1000), latency)
        while admission.refusal() is None:
            admission.images += 1
        assert admission.images == taken
    slow = LatencyTable(max_batch=16, decode_threads=2)
    slow.observe_decode(3)
    admission = Admission(Settings(queue_budget_ms=1000), slow)
    assert admission.refusal() is None  # what is refused measures nothing


def test_no_room_for_a_full_batch() -> None:
    """A device without room for the largest batch stops the start-up in one line."""

    def refuse(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(logits) > 4:
            raise RuntimeError("Available memory is smaller than requested\nstack")
        return logits

    with pytest.raises(StartupError) as raised:
        warm_up(FakeEngine(fault=refuse), 20, LatencyTable(20, decode_threads=1))
    assert str(raised.value) == (
        "MIXER_MAX_BATCH=8: FakeExecutionProvider cannot run so many images at once "
        "(Available memory is smaller than requested); choose fewer"
    )
