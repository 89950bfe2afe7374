"""Promise 1: four times more than it can do leaves it doing what it can.

A model takes all cores there are. On two of them a tenth goes to the generator's four times the
load and a sixth to 2,000 refusals a second, so that 70 to 90 % of the peak are left: shown there,
but asserted only where the generator has a core of its own.
"""

import os
import time
from collections.abc import Sequence

import pytest
import uvloop

from app.settings import Settings
from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import (
    ROUNDS,
    Answer,
    Load,
    another_process,
    closed_loop,
    get,
    one,
    percentile,
    post,
    undisturbed,
)
from tests.processes import Server

QUEUE_BUDGET_S = Settings().queue_budget_ms / 1000
OVERLOAD_S = 30.0
ENOUGH_CORES = 4  # one of them for the generator

pytestmark = pytest.mark.timed


def overload(server: Server, requests: Sequence[bytes], batch_s: float) -> tuple[float, bool, str]:
    """Overload the server; return goodput ÷ peak, whether all answers came in time, the figures."""
    peak = max(rate_of(closed_loop(server.url, requests, 48, 3)) for _ in range(2))
    calm = [one(server.url, requests[0]) for _ in range(30)]

    async def run() -> tuple[list[Answer], list[Answer]]:
        load = Load(server.url)
        await load.run(requests, 4 * peak, OVERLOAD_S)
        stopped = time.monotonic()
        hot = list(load.answers)
        while time.monotonic() < stopped + 2:  # the queue works itself off
            await load.one(requests[0])
        await load.settle()
        after = Load(server.url)
        for _ in range(30):
            await after.one(requests[0])
        await after.settle()
        return hot, after.answers

    with undisturbed():
        hot, after = uvloop.run(run())
    good = [a for a in hot if a.status == 200]
    refused = [a for a in hot if a.status == 429]
    goodput = len(good) / OVERLOAD_S / peak
    p99_good, p99_refused = percentile(good, 0.99), percentile(refused, 0.99)
    baseline, recovered = percentile(calm, 0.5), percentile(after, 0.5)
    in_time = (
        p99_good <= QUEUE_BUDGET_S + 2 * batch_s
        and p99_refused <= 0.025
        and recovered <= max(1.5 * baseline, baseline + 0.005)
        and {a.status for a in after} == {200}
        and len(good) + len(refused) == len(hot)
        and all(1 <= int(a.header("Retry-After")) <= QUEUE_BUDGET_S + 1 for a in refused)
    )
    figures = (
        f"peak {peak:.0f}/s, at four times that {goodput:.0%} of it answered, "
        f"p99 of the admitted {p99_good * 1000:.0f} ms, "
        f"{len(refused)} refusals with p99 {p99_refused * 1000:.1f} ms, "
        f"others {len(hot) - len(good) - len(refused)}, "
        f"median before {baseline * 1000:.1f} ms, after {recovered * 1000:.1f} ms"
    )
    return goodput, in_time, figures


def rate_of(answers: Sequence[Answer]) -> float:
    """Return the good answers a second, between the first and the last."""
    good = [a.done for a in answers if a.status == 200]
    return (len(good) - 1) / (max(good) - min(good))


@pytest.mark.slow
def test_fake_engine(fake: Start, figure: Figure) -> None:
    """Around an engine of 40 ms a batch of 8, overload costs neither goodput nor punctuality."""
    with fake(batch_ms=40, max_batch=8) as server:
        for _ in range(ROUNDS):
            goodput, in_time, figures = overload(server, [post(make_image())], 0.04)
            figure(figures)
            if goodput >= 0.9 and in_time:
                return
    pytest.fail("no round held the promise")


@pytest.mark.slow
def test_embedded_model(real: Start, photos: list[bytes], figure: Figure) -> None:
    """Around the embedded model and real photos, overload costs neither."""
    cores = sorted(os.sched_getaffinity(0))
    are_few = len(cores) < ENOUGH_CORES
    was_in_time = False
    try:
        if not are_few:
            os.sched_setaffinity(0, cores[1:])
        with real() as server:
            if not are_few:
                os.sched_setaffinity(0, cores[:1])
            for _ in range(ROUNDS):
                goodput, in_time, figures = overload(server, [post(p) for p in photos], 0.05)
                figure(figures)
                if goodput >= 0.9 and in_time:
                    return
                was_in_time = was_in_time or in_time
                if was_in_time and are_few:
                    break
    finally:
        os.sched_setaffinity(0, cores)
    assert was_in_time, "no round answered all in time"
    if are_few:
        pytest.skip(f"all in time, but goodput needs {ENOUGH_CORES} cores: one for the generator")
    pytest.fail("no round held the promise")


def test_newcomers(fake: Start, figure: Figure) -> None:
    """A probe that dials anew is answered beside 500 clients that ask again at once."""
    with fake() as server, another_process() as elsewhere:
        asking = elsewhere.submit(closed_loop, server.url, [get("/livez")], 500, 8)
        time.sleep(2)
        probes = []
        while not asking.done():
            began = time.monotonic()
            assert one(server.url, get("/livez")).status == 200
            probes.append(time.monotonic() - began)
            time.sleep(0.1)
        others = [answer.status for answer in asking.result()].count(200)
        figure(f"{len(probes)} probes, at most {max(probes) * 1000:.0f} ms, beside {others} × 200")
        assert max(probes) < 4  # else it is when the others have ended
