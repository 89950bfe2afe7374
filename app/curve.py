"""A model's latency curve: its points as text, and drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement of the engine."""

    threads: int
    batch: int
    latency_ms: float  # median of one inference

    @property
    def images_per_s(self) -> float:
        """Images per second of one inference after the other."""
        return self.batch / self.latency_ms * 1000


def table(points: Sequence[Point], best: Point) -> str:
    """Return the latency curve as text, the recommended point marked."""
    lines = ["threads  batch  latency ms  images/s"]
    for point in points:
        mark = "  <- recommended" if point == best else ""
        lines.append(
            f"{point.threads:7}  {point.batch:5}  {point.latency_ms:10.2f}  "
            f"{point.images_per_s:8.1f}{mark}"
        )
    return "\n".join(lines)


def draw(points: Sequence[Point], best: Point, path: Path) -> str:
    """Draw latency and images per second over the batch size as PNG; return what was done."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        return "no curve drawn: matplotlib is missing (pip install '.[export]')"
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for threads in sorted({point.threads for point in points}):
        curve = [point for point in points if point.threads == threads]
        batches = [point.batch for point in curve]
        label = f"{threads} thread{'s' if threads > 1 else ''}"
        left.plot(batches, [point.latency_ms for point in curve], marker="o", label=label)
        right.plot(batches, [point.images_per_s for point in curve], marker="o", label=label)
    left.plot(best.batch, best.latency_ms, "o", color="black", markersize=9, label="recommended")
    right.plot(best.batch, best.images_per_s, "o", color="black", markersize=9)
    left.set(xlabel="batch", ylabel="latency, ms", xscale="log", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    most = max(point.images_per_s for point in points)
    right.set(xlabel="batch", ylabel="images/s", xscale="log", ylim=(0, 1.08 * most))
    for axes in (left, right):
        axes.set_xticks(sorted({point.batch for point in points}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return f"curve drawn to {path}"
