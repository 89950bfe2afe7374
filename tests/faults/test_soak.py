"""Promise 12: nothing grows while it serves."""

import asyncio
import faulthandler
import os
import statistics
import time
from collections import Counter

import pytest
import uvloop

from tests.faults.conftest import Figure, Start
from tests.faults.load import Load, closed_loop, post
from tests.faults.test_overload import rate_of
from tests.processes import Server

SOAK_S = float(os.environ.get("FAULTS_SOAK_S", "600"))  # 1800 for the half-hour form
WARM_S = 20.0


class Counted(Load):
    """A load that keeps no answers: the soak is about the server's memory, not ours."""

    statuses: Counter[int]

    def settled(self, answer: object) -> None:
        """Count."""
        self.statuses[answer.status] += 1  # type: ignore[attr-defined] # an Answer


Sample = tuple[float, int, int]


async def soak(server: Server, requests: list[bytes], rate: float) -> tuple[list[Sample], float]:
    """Return MiB, descriptors besides connections, threads, once a second; the share answered."""
    load = Counted(server.url)
    load.statuses = Counter()
    running = asyncio.create_task(load.run(requests, rate, WARM_S + SOAK_S))
    await asyncio.sleep(WARM_S)
    samples: list[Sample] = []
    end = time.monotonic() + SOAK_S
    while time.monotonic() < end:
        # Connections are as many as the load has open, which keeps what a burst once needed.
        others = server.descriptors() - load.open
        samples.append((server.resident_mib(), others, server.threads()))
        await asyncio.sleep(1)
    await running
    await load.settle()
    return samples, load.statuses[200] / load.statuses.total()


@pytest.mark.slow
def test_soak(real: Start, photos: list[bytes], figure: Figure) -> None:
    """At 70 % load memory grows by less than 32 MiB, descriptors and threads not at all."""
    faulthandler.cancel_dump_traceback_later()  # nothing else may take as long
    requests = [post(photo) for photo in photos]
    with real(threads=2, decode_threads=2) as server:  # however many cores it may use
        peak = rate_of(closed_loop(server.url, requests, 32, 5))
        samples, good = uvloop.run(soak(server, requests, 0.7 * peak))
        tenth = max(1, len(samples) // 10)
        first, last = samples[:tenth], samples[-tenth:]
        growth = max(s[0] for s in last) - max(s[0] for s in first)
        descriptors = [statistics.median(s[1] for s in part) for part in (first, last)]
        threads = [max(s[2] for s in part) for part in (first, last)]
        figure(
            f"{SOAK_S:.0f} s at {0.7 * peak:.0f}/s: memory {first[0][0]:.0f} MiB, grew by "
            f"{growth:.1f}; descriptors {descriptors}, threads {threads}, {good:.2%} answered"
        )
        assert good > 0.95
        assert growth < 32
        assert descriptors[1] <= descriptors[0]
        assert threads[0] == threads[1]
        assert "Traceback" not in server.log.read_text()
