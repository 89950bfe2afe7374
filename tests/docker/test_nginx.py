"""The balancer's file: its limits are the service's, and its own errors are problems, too."""

import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from app.access import SECURITY_HEADERS
from app.settings import Settings
from tests.fleet.balancers import Balancer, balancing
from tests.fleet.replicas import Replica

NGINX = (Path(__file__).parents[2] / "docker/nginx.conf").read_text()


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Balancer]:
    """Return nginx with our file before a replica that does not run, or skip."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    with balancing("nginx", [Replica("dead", tmp_path)], tmp_path) as balancer:
        yield balancer


def test_it_has_the_services_limits() -> None:
    """The limits of nginx.conf are the service's; its patience exceeds the longest request's."""
    settings = Settings()
    assert int(_directive("client_max_body_size", "m")) * 2**20 == settings.max_upload_bytes
    assert int(_directive("client_header_timeout", "s")) == settings.header_timeout_s
    assert int(_directive("client_body_timeout", "s")) == settings.body_timeout_s
    assert int(_directive("keepalive_timeout", "s")) < settings.keep_alive_s
    assert int(_directive("proxy_read_timeout", "s")) * 1000 > settings.request_timeout_ms
    assert f"larger than {settings.max_upload_bytes} bytes" in NGINX


def test_it_retries_what_another_replica_can_answer() -> None:
    """A POST is sent on after an error, a timeout or a 503, but never after a 429."""
    (conditions,) = re.findall(r"proxy_next_upstream ([^;]*);", NGINX)
    assert set(conditions.split()) == {"error", "timeout", "http_503", "non_idempotent"}


def test_its_own_errors_are_problems(nginx: Balancer) -> None:
    """What nginx refuses itself, and a fleet that is down, is answered with problem+json."""
    too_large = bytes(Settings().max_upload_bytes + 1)
    answers = [
        httpx2.get(f"{nginx.url}/model"),
        httpx2.get(f"{nginx.url}/metrics"),
        httpx2.get(f"{nginx.url}/" + 9000 * "a"),
        httpx2.get(nginx.url, headers={"X-Long": 40_000 * "a"}),
        httpx2.post(f"{nginx.url}/classify", content=too_large),
        httpx2.request("TRACE", f"{nginx.url}/model"),
    ]
    assert [answer.status_code for answer in answers] == [502, 404, 414, 431, 413, 405]
    for answer in answers:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == answer.status_code
        assert answer.json()["type"].startswith("urn:problem-type:mixer-serve:")
        for name, value in SECURITY_HEADERS.items():
            assert answer.headers[name] == value
    assert answers[0].headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "request_",
    [
        b"GARBAGE\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    ],
)
def test_what_is_not_http_gets_a_problem(nginx: Balancer, request_: bytes) -> None:
    """A request that nobody can read is answered with a 400 problem."""
    host, _, port = nginx.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request_)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"problem+json" in answer


def test_its_log_has_no_query(nginx: Balancer) -> None:
    """The access log names the path, also of a failed request, but nothing after it."""
    httpx2.get(f"{nginx.url}/model?name=secret")
    give_up = time.monotonic() + 5
    while " GET /model 502 " not in nginx.log.read_text():  # written after the answer
        assert time.monotonic() < give_up
        time.sleep(0.01)
    log = nginx.log.read_text()
    assert not re.search(r"^\S+ GET .*secret", log, re.MULTILINE)


def _directive(name: str, unit: str) -> str:
    (value,) = re.findall(rf"\b{name} (\d+){unit};", NGINX)
    return str(value)
