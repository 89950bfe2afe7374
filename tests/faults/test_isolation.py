"""Promises 5 and 10: what goes wrong goes wrong alone, and a broken engine is replaced."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import uvloop

from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import Answer, Load, get, one, post


def at_once(url: str, requests: list[bytes]) -> list[Answer]:
    """Return the answers to requests sent at once, in their order."""

    async def run() -> list[Answer]:
        load = Load(url)
        for request in requests:
            load.fire(request, time.monotonic())
        await load.settle()
        return sorted(load.answers, key=lambda answer: answer.due)

    return uvloop.run(run())


def test_killed_decoder(fake: Start, figure: Figure) -> None:
    """A decoder that the system kills while it waits costs no request: another takes its place."""
    with fake() as server:
        one(server.url, post(make_image()))
        main, nursery, *decoders = server.pids()
        os.kill(decoders[0], signal.SIGKILL)
        statuses = [one(server.url, post(make_image())).status for _ in range(20)]
        figure(f"{statuses.count(500)} × 500, {statuses.count(200)} × 200")
        assert statuses == [200] * 20
        assert len(server.pids()) == len([main, nursery, *decoders])


def wait_for(url: str, path: str, status: int) -> float:
    """Wait until `path` answers `status`; return after how many seconds."""
    start = time.monotonic()
    while one(url, get(path)).status != status:
        assert time.monotonic() < start + 20, f"{path} never answered {status}"
        time.sleep(0.02)
    return time.monotonic() - start


@pytest.mark.parametrize("bad", [b"", b"not an image", make_image(side=64)[:60]])
def test_one_bad_image_among_32(fake: Start, figure: Figure, bad: bytes) -> None:
    """One bad image among 31 good ones gets a 4xx, the others 200."""
    with fake(batch_ms=20, max_batch=32) as server:
        answers = at_once(
            server.url, [post(make_image())] * 16 + [post(bad)] + [post(make_image())] * 15
        )
        statuses = [answer.status for answer in answers]
        figure(f"{statuses[16]} among {statuses.count(200)} × 200")
        assert 400 <= statuses[16] < 500
        assert statuses.count(200) == 31


def test_engine_that_raises_once(fake: Start, figure: Figure) -> None:
    """If the engine raises, that batch gets 500 problems and the next 100 requests pass."""
    with fake(batch_ms=5) as server:
        one(server.url, get("/observed?fault=raise"))
        broken = one(server.url, post(make_image()))
        one(server.url, get("/observed?fault=none"))
        after = at_once(server.url, [post(make_image())] * 100)
        figure(f"{broken.status}, then {sum(a.status == 200 for a in after)} × 200")
        assert broken.status == 500
        assert broken.header("content-type") == "application/problem+json"
        assert b"ordered to fail" not in broken.body
        assert {a.status for a in after} == {200}


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_engine_that_stays_broken(fake: Start, figure: Figure, fault: str) -> None:
    """A lastingly broken engine fails readiness, then liveness; one that heals is ready again."""
    with fake() as server:
        one(server.url, get(f"/observed?fault={fault}"))
        for _ in range(3):
            assert one(server.url, post(make_image())).status == 500
        assert one(server.url, get("/readyz")).status == 503
        assert one(server.url, post(make_image())).status == 503  # a balancer asks another one
        assert one(server.url, get("/livez")).status == 200
        not_live_s = wait_for(server.url, "/livez", 503)
        one(server.url, get("/observed?fault=none"))
        ready_s = wait_for(server.url, "/readyz", 200)
        figure(f"not ready at once, not live after {not_live_s:.1f} s, healed in {ready_s:.1f} s")
        assert one(server.url, get("/livez")).status == 200
        assert one(server.url, post(make_image())).status == 200
        told = server.log.read_text()
    assert told.count("not ready: the engine or the decoders have failed too often") == 1
    assert told.count("ready again: ") == 1


def test_decoders_that_cannot_be_replaced(fake: Start, figure: Figure) -> None:
    """Without decoders a replica fails readiness, then liveness; with them again it is ready."""
    with fake(decode_threads=2) as server:  # on one core, too
        _, _, *decoders = server.pids()
        one(server.url, get("/observed?fault=fork"))
        os.kill(decoders[0], signal.SIGKILL)
        assert [one(server.url, post(make_image())).status for _ in range(20)] == [200] * 20
        for pid in decoders[1:]:
            os.kill(pid, signal.SIGKILL)
        while any(Path(f"/proc/{pid}").exists() for pid in decoders):
            time.sleep(0.01)  # one that still takes an upload fails that upload alone
        while one(server.url, get("/readyz")).status == 200:  # a balancer asks another one already
            assert one(server.url, post(make_image())).status == 503
        assert one(server.url, post(make_image())).status == 503
        not_live_s = wait_for(server.url, "/livez", 503)
        one(server.url, get("/observed?fault=none"))
        ready_s = wait_for(server.url, "/readyz", 200)
        figure(f"not ready in 2 s, not live after {not_live_s:.1f}, healed in {ready_s:.1f} s")
        assert one(server.url, get("/livez")).status == 200
        assert [one(server.url, post(make_image())).status for _ in range(20)] == [200] * 20


def test_nan_is_a_problem(fake: Start, figure: Figure) -> None:
    """NaN logits give a 500 problem, and never `NaN` in JSON."""
    with fake() as server:
        one(server.url, get("/observed?fault=nan"))
        answer = one(server.url, post(make_image()))
        problem = json.loads(answer.body, parse_constant=lambda name: pytest.fail(name))
        figure(f"{answer.status} {problem['title']}")
        assert answer.status == problem["status"] == 500
        assert problem["title"] == "Inference failed"
        assert answer.header("content-type") == "application/problem+json"
