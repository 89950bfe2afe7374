"""No request is lost when replicas come, go or die: `make fleet-test`."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from tests.fakes import encode
from tests.fleet.balancers import PROGRAMS, Balancer, balancing
from tests.fleet.load import Report, loading, saturate
from tests.fleet.replicas import Replica

if not os.environ.get("FLEET_TEST"):
    pytest.skip("takes minutes: make fleet-test", allow_module_level=True)

REPLICAS = 3
SETTLE_S = 3.0  # a balancer's longest wait before it uses a replica again (2 s), and a little
MOST_RATE = 40.0  # requests a second; more would measure what else the machine does
SLOTS = 4  # requests in flight per replica in the overload test: small, so that it is overloaded
# As large as photos are: about 100 kB.
_NOISE = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
PHOTO = encode(Image.fromarray(_NOISE), "JPEG", quality=90)

Fleet = tuple[Balancer, list[Replica]]


@pytest.fixture(params=sorted(PROGRAMS), scope="module")
def balancer_name(request: pytest.FixtureRequest) -> str:
    """Return each balancer in turn, where it is installed."""
    name = str(request.param)
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[Replica]]:
    """Return replicas that have not been started.

    A replica that starts takes the machine's cores from the other two, as it would not on a host of
    its own. So they may let images wait for longer than by default.
    """
    replicas = [
        Replica(f"replica{number}", tmp_path, MIXER_QUEUE_BUDGET_MS="9000")
        for number in range(REPLICAS)
    ]
    yield replicas
    for replica in replicas:
        replica.kill()


@pytest.fixture
def fleet(balancer_name: str, replicas: list[Replica], tmp_path: Path) -> Iterator[Fleet]:
    """Return three ready replicas behind the balancer."""
    for replica in replicas:
        replica.start()
    for replica in replicas:
        replica.wait_until_ready()
    with balancing(balancer_name, replicas, tmp_path) as balancer:
        time.sleep(SETTLE_S)
        yield balancer, replicas


def test_a_rolling_restart_loses_nothing(fleet: Fleet) -> None:
    """While all replicas are restarted one after another, no request fails."""
    balancer, replicas = fleet
    with loading(_port(balancer), PHOTO, _half_load(balancer)) as report:
        for replica in replicas:
            replica.restart()
            time.sleep(SETTLE_S)
    _show("rolling restart", balancer, report)
    assert report.failed == 0, report


def test_killing_replicas_loses_nothing(fleet: Fleet) -> None:
    """While each replica in turn is killed with SIGKILL and comes back, no request fails."""
    balancer, replicas = fleet
    with loading(_port(balancer), PHOTO, _half_load(balancer)) as report:
        for replica in replicas:
            time.sleep(1)
            replica.kill()
            time.sleep(1)
            replica.start()
            replica.wait_until_ready()
            time.sleep(SETTLE_S)
    _show("kill -9", balancer, report)
    assert report.failed == 0, report


def test_a_stalled_replica_loses_nothing(fleet: Fleet) -> None:
    """A replica under SIGSTOP costs nobody more than the balancer's read timeout."""
    balancer, replicas = fleet
    rate = _half_load(balancer)
    with loading(_port(balancer), PHOTO, rate) as baseline:
        time.sleep(5)
    with loading(_port(balancer), PHOTO, rate) as report:
        time.sleep(1)
        replicas[0].send(signal.SIGSTOP)
        time.sleep(2 * balancer.read_timeout_s)
    replicas[0].send(signal.SIGCONT)
    _show("baseline", balancer, baseline)
    _show("SIGSTOP", balancer, report)
    assert report.failed == 0, report
    assert report.p99_s <= balancer.read_timeout_s + baseline.p99_s


def test_overload_is_429_and_ejects_nobody(
    balancer_name: str, replicas: list[Replica], tmp_path: Path
) -> None:
    """An overloaded fleet refuses with 429 and Retry-After, and every replica works on."""
    for replica in replicas:
        replica.start(MIXER_MAX_REQUESTS=str(SLOTS))
    for replica in replicas:
        replica.wait_until_ready()
    with balancing(balancer_name, replicas, tmp_path) as balancer:
        time.sleep(SETTLE_S)
        before = balancer.ejections()
        saturate(_port(balancer), PHOTO, clients=4 * SLOTS * REPLICAS, seconds=3)
        worked = [replica.cpu_seconds() for replica in replicas]
        report = saturate(_port(balancer), PHOTO, clients=4 * SLOTS * REPLICAS, seconds=5)
        worked = [r.cpu_seconds() - b for r, b in zip(replicas, worked, strict=True)]
        _show("overload", balancer, report)
        assert set(report.statuses) == {200, 429}
        refused = [answer for answer in report.answers if answer.status == 429]
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert {json.loads(answer.body)["status"] for answer in refused} == {429}
        assert balancer.ejections() == before
        assert min(worked) > 0.5 * max(worked), worked
        assert all(replica.is_ready() for replica in replicas)


def test_a_replica_with_a_broken_model_gets_no_request(fleet: Fleet, tmp_path: Path) -> None:
    """A replica that is restarted again and again with a broken model never gets a request."""
    balancer, replicas = fleet
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    replicas[0].send(signal.SIGTERM)
    assert replicas[0].wait() == 0
    with loading(_port(balancer), PHOTO, _half_load(balancer)) as report:
        for _ in range(3):
            replicas[0].start(MIXER_MODEL=str(tmp_path / "broken.onnx"))
            assert replicas[0].wait() == 1
    _show("broken model", balancer, report)
    assert report.failed == 0, report


def test_metrics_stay_inside(fleet: Fleet) -> None:
    """However its path is spelled, the balancer hands /metrics to nobody."""
    balancer, _ = fleet
    for path in ("/metrics", "/%6detrics", "/metrics?x", "//metrics"):
        assert httpx2.get(f"{balancer.url}{path}").status_code == 404, path


def test_answers_are_the_replicas_own(fleet: Fleet) -> None:
    """Through the balancer every answer, errors included, is byte for byte a replica's own."""
    balancer, replicas = fleet
    photo = encode(_gradient(), "JPEG")
    jpeg = {"Content-Type": "image/jpeg"}
    requests = [
        httpx2.Request("POST", "http://fleet/classify", content=photo, headers=jpeg),
        httpx2.Request("POST", "http://fleet/classify?top_k=10", files={"file": photo}),
        httpx2.Request("POST", "http://fleet/classify/batch", files={"files": photo}),
        httpx2.Request("POST", "http://fleet/classify?top_k=0", content=photo, headers=jpeg),
        httpx2.Request("POST", "http://fleet/classify", content=photo[:999], headers=jpeg),
        httpx2.Request("POST", "http://fleet/classify", content=b"text", headers=jpeg),
        httpx2.Request("POST", "http://fleet/classify", content=b"", headers=jpeg),
        httpx2.Request("GET", "http://fleet/model"),
        httpx2.Request("GET", "http://fleet/nowhere"),
        httpx2.Request("GET", "http://fleet/openapi.json"),
    ]
    statuses: set[int] = set()
    for request in requests:
        direct = {_answer(request, replica.url) for replica in replicas}
        through = {_answer(request, balancer.url) for _ in range(2 * REPLICAS)}
        assert through == direct
        assert len(direct) == 1
        statuses.update(status for status, _, _ in direct)
    assert statuses == {200, 400, 404, 415, 422}


def _answer(request: httpx2.Request, url: str) -> tuple[int, str, bytes]:
    target = url + request.url.raw_path.decode()
    answer = httpx2.request(request.method, target, content=request.read(), headers=request.headers)
    return answer.status_code, answer.headers["content-type"], answer.content


def _gradient() -> Image.Image:
    """Return a picture whose answer is not the same for every model."""
    return Image.merge("RGB", [Image.linear_gradient("L").rotate(turn) for turn in (0, 90, 180)])


def _half_load(balancer: Balancer) -> float:
    """Return half of the rate that the fleet sustains, in requests a second; at most MOST_RATE.

    The lowest of three looks: the cores may have other work, and a rate that they can sustain only
    while they have none would be no half load.
    """
    looks = [saturate(_port(balancer), PHOTO, clients=4 * REPLICAS, seconds=2) for _ in range(3)]
    assert all(set(look.statuses) == {200} for look in looks)
    return min(MOST_RATE, *(len(look.answers) / 2 / 2 for look in looks))


def _port(balancer: Balancer) -> int:
    return int(balancer.url.rpartition(":")[2])


def _show(what: str, balancer: Balancer, report: Report) -> None:
    sys.stdout.write(f"\n{balancer.name}, {what}: {report}")
