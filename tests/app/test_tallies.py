"""Counters and histograms of plain numbers, beside prometheus_client's own."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from app.tallies import Spread, Tally

BOUNDS = (0.1, 1.0, 10.0)


def _without_births(text: bytes) -> list[str]:
    """Return the lines but for the times at which prometheus_client's own series were made."""
    return [line for line in text.decode().splitlines() if "_created" not in line]


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.floats(0, 20) | st.sampled_from(BOUNDS)), max_size=20
    )
)
def test_the_same_exposition(values: list[tuple[str, float]]) -> None:
    """What a scrape shows is what prometheus_client's counter and histogram would show."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    plain = Tally(ours, "n", "Some"), Spread(ours, "h", "Seconds", BOUNDS)
    labelled = Tally(ours, "ln", "Some", "x"), Spread(ours, "lh", "Seconds", BOUNDS, "x")
    counter = Counter("n", "Some", registry=theirs)
    histogram = Histogram("h", "Seconds", buckets=BOUNDS, registry=theirs)
    counter_of = Counter("ln", "Some", ["x"], registry=theirs)
    histogram_of = Histogram("lh", "Seconds", ["x"], buckets=BOUNDS, registry=theirs)
    for label, value in values:
        plain[0].add(value)
        plain[1].observe(value)
        labelled[0].add(value, label)
        labelled[1].observe(value, label)
        counter.inc(value)
        histogram.observe(value)
        counter_of.labels(label).inc(value)
        histogram_of.labels(label).observe(value)
    assert generate_latest(ours).decode().splitlines() == _without_births(generate_latest(theirs))
