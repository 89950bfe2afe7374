"""Counters and histograms as plain numbers, which become Prometheus' own at the scrape.

prometheus_client locks each number, and looks through the buckets one by one: a tenth of what the
event loop does for a request. Each tally here is fed by one thread at a time and read by any.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]


class Tally(Collector):
    """A counter: a number for each combination of labels."""

    def __init__(self, registry: CollectorRegistry, name: str, text: str, *labels: str) -> None:
        self._about = (name, text, None, labels)
        self._values: defaultdict[Labels, float] = defaultdict(float)
        if not labels:
            self._values[()] = 0.0
        registry.register(self)

    def add(self, amount: float, *labels: str) -> None:
        """Count `amount` more."""
        self._values[labels] += amount

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Return the one family, for a scrape."""
        family = CounterMetricFamily(*self._about)
        for labels, value in list(self._values.items()):
            family.add_metric(labels, value)
        yield family


class _Series:
    """One histogram: how many values fell into each bucket, and their sum."""

    __slots__ = ("counts", "total")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.total = 0.0


class Spread(Collector):
    """A histogram: one for each combination of labels."""

    def __init__(
        self,
        registry: CollectorRegistry,
        name: str,
        text: str,
        bounds: Sequence[float],
        *labels: str,
    ) -> None:
        self._about = (name, text, None, labels)
        self._bounds = list(bounds)
        self._series: dict[Labels, _Series] = {}
        if not labels:
            self._add(())
        registry.register(self)

    def observe(self, value: float, *labels: str) -> None:
        """Take in one value: it belongs to the first bucket whose bound it does not exceed."""
        series = self._series.get(labels) or self._add(labels)
        series.counts[bisect_left(self._bounds, value)] += 1
        series.total += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Return the one family, for a scrape; its buckets are cumulative."""
        family = HistogramMetricFamily(*self._about[:2], labels=self._about[3])
        for labels, series in list(self._series.items()):
            below, buckets = 0, []
            for bound, count in zip([*self._bounds, float("inf")], series.counts, strict=True):
                below += count
                buckets.append((_bound(bound), below))
            family.add_metric(labels, buckets, series.total)
        yield family

    def _add(self, labels: Labels) -> _Series:
        series = self._series[labels] = _Series(len(self._bounds) + 1)
        return series


def _bound(value: float) -> str:
    text: str = floatToGoString(value)  # type: ignore[no-untyped-call] # no annotations
    return text
