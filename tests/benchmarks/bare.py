"""The bare work, in a tight loop without any server: decode, resize, patchify, model.

    python -m tests.benchmarks.bare PHOTOS SECONDS BATCH…   prints the result as JSON

One thread decodes a batch and runs it, so the CPU time is that of the work and nothing else. What a
server uses more per request is its own.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from app.cpus import available_cpus
from tests.benchmarks.photos import load_photos
from tests.benchmarks.servers.work import Work

Figures = dict[str, float]
MIN_CALLS = 5  # a large model's full batch alone may take seconds
MIN_SINGLE_CALLS = 40  # of which the median is compared with a server's


def main() -> None:
    """Measure and print; the batch of least CPU per image is the best one."""
    photos, seconds = cycle(load_photos(Path(sys.argv[1]))), float(sys.argv[2])
    batches = [int(batch) for batch in sys.argv[3:]]
    work = Work()
    cores = available_cpus()
    decoders = ThreadPoolExecutor(cores)

    def whole(batch: int) -> None:
        patches = [work.prepare(photo) for photo in islice(photos, batch)]
        for logits in work.infer(patches):
            json.dumps(work.answer(logits))

    def decode(batch: int) -> None:
        for _ in decoders.map(work.prepare, islice(photos, batch)):
            pass

    swept = {batch: _loop(whole, batch, seconds) for batch in batches}
    best = min(swept, key=lambda batch: swept[batch]["cpu_ms"])
    patches = [work.prepare(photo) for photo in islice(photos, max(batches))]
    first = work.prepare(load_photos(Path(sys.argv[1]))[0])
    measured: dict[str, Any] = {
        "best_batch": best,
        "label": work.answer(work.infer([first])[0])["predictions"][0]["label"],
        "batched": swept[best],
        "single": _loop(whole, 1, seconds, MIN_SINGLE_CALLS),
        "decode": _loop(decode, 8 * cores, seconds),
        "model": _loop(lambda batch: work.infer(patches[:batch]), best, seconds),
    }
    sys.stdout.write(json.dumps(measured))


def _loop(
    once: Callable[[int], object], batch: int, seconds: float, min_calls: int = MIN_CALLS
) -> Figures:
    """Return CPU milliseconds and rate per image, and the median milliseconds of one call."""
    once(batch)  # allocates
    calls: list[float] = []
    begin, cpu_s = time.perf_counter(), _cpu_s()
    while (start := time.perf_counter()) < begin + seconds or len(calls) < min_calls:
        once(batch)
        calls.append(time.perf_counter() - start)
    took_s, cpu_s = time.perf_counter() - begin, _cpu_s() - cpu_s
    images = batch * len(calls)
    return {
        "cpu_ms": cpu_s / images * 1000,
        "per_s": images / took_s,
        "p50_ms": statistics.median(calls) * 1000,
    }


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


if __name__ == "__main__":
    main()
