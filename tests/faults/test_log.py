"""A log that nobody takes costs its lines, and nothing else."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from app.logs import StandardError
from tests.fakes import make_image
from tests.faults.conftest import Figure
from tests.faults.load import get, one, post
from tests.processes import ROOT, clean_environment

COMMAND = (sys.executable, "-m", "tests.faults.observed", "--drain-delay-s", "0")


@contextmanager
def logging_to(
    descriptor: int | None, *arguments: str, closed: str = "2>&-"
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Serve with standard error in a descriptor; give process and URL at its answer.

    Without a descriptor standard error is closed, or what `closed` says in the shell's words.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = (*COMMAND, "--port", str(port), "--log-format", "json", *arguments)
    if descriptor is None:
        command = ("sh", "-c", f'exec "$@" {closed}', "sh", *command)
    environment = clean_environment(OBSERVED_BATCH_MS="0")
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=descriptor) as process:
        try:
            give_up = time.monotonic() + 30
            while not is_ready(url):
                assert process.poll() is None
                assert time.monotonic() < give_up
                time.sleep(0.05)
            yield process, url
        finally:
            process.kill()


def is_ready(url: str) -> bool:
    """Return whether the service answers."""
    try:
        return httpx2.get(f"{url}/readyz").status_code == 200
    except httpx2.TransportError:
        return False


def lost(url: str) -> float:
    """Return how many lines the service says it has lost."""
    told = one(url, get("/metrics")).body.decode()
    return float(told.partition("\nmixer_log_lines_lost ")[2].split()[0])


def raw(url: str, data: bytes) -> bytes:
    """Send bytes on a connection; return all that comes until it is closed."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(data)
        answer = b""
        while piece := client.recv(65536):
            answer += piece
        return answer


@pytest.mark.parametrize("place", ["full disk", "reader that is gone"])
def test_lines_that_cannot_be_written(place: str, figure: Figure) -> None:
    """Answers, deadlines, limits and the end are what they are with a log."""
    if place == "full disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        end, descriptor = os.pipe()
        os.close(end)
    with logging_to(descriptor, "--header-timeout-s", "1", "--queue-size", "1") as (process, url):
        os.close(descriptor)
        assert one(url, post(make_image())).status == 200
        closing = post(make_image()).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        assert raw(url, closing).startswith(b"HTTP/1.1 200")
        assert raw(url, b"no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert raw(url, b"GET / HTTP/1.1\r\n").startswith(b"HTTP/1.1 408")
        figure(f"{lost(url):.0f} lines lost")
        assert lost(url) >= 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


def test_lines_of_requests_are_of_a_level(tmp_path: Path) -> None:
    """Where only warnings are wanted, a request that went well writes no line."""
    with (
        (tmp_path / "log").open("wb") as log,
        logging_to(log.fileno(), "--log-level", "warning") as (process, url),
    ):
        assert one(url, post(make_image())).status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_standard_error_that_is_closed(closed: str) -> None:
    """Without standard streams there is no log, and requests are served and forgotten as ever."""
    options = ("--log-format", "auto", "--grace-s", "30")
    with logging_to(None, *options, closed=closed) as (process, url):
        assert one(url, post(make_image())).status == 200
        assert lost(url) >= 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


def test_reader_that_has_stopped(figure: Figure) -> None:
    """A collector that reads nothing stops neither the service nor its end."""
    end, descriptor = os.pipe()
    with logging_to(descriptor) as (process, url):
        os.close(descriptor)
        for _ in range(600):  # 64 KiB are some 200 lines
            assert one(url, post(make_image())).status == 200
        figure(f"{lost(url):.0f} of 600 lines lost")
        assert lost(url) > 100
        kept = os.read(end, 1 << 20)
        assert one(url, post(make_image())).status == 200
        kept += os.read(end, 1 << 20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    os.close(end)
    assert kept.endswith(b"}\n")


def test_terminal_that_nobody_reads(figure: Figure) -> None:
    """A terminal that has stopped, as with Ctrl+S, stops neither the service nor its end."""
    end, descriptor = pty.openpty()
    with logging_to(descriptor) as (process, url):
        os.close(descriptor)
        for _ in range(300):
            assert one(url, post(make_image())).status == 200
        figure(f"{lost(url):.0f} of 300 lines lost")
        assert lost(url) > 100
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    os.close(end)


def test_line_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be encoded, as of a file's name that is no UTF-8, is written with its number."""
    end, descriptor = os.pipe()
    with open(end, "rb") as reader, open(descriptor, "w") as stream:  # noqa: PTH123 - descriptors
        monkeypatch.setattr(sys, "stderr", stream)
        log = StandardError()
        log.write("caf\udce9\n")
        assert reader.readline() == b"caf\\udce9\n"
        assert log.lost == 0


def test_standard_error_closed_meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A line for a standard error that Python has closed is lost, as any other."""
    with (tmp_path / "log").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
    log = StandardError()
    log.write("a line\n")
    assert log.lost == 1


def test_line_that_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a line of which only a part was taken the next one begins anew."""
    end, descriptor = os.pipe()
    with open(end, "rb") as reader, open(descriptor, "w") as stream:  # noqa: PTH123 - descriptors
        monkeypatch.setattr(sys, "stderr", stream)
        log = StandardError()
        log.write("x" * 100_000 + "\n")
        assert log.lost == 1
        taken = reader.read(65_536)
        log.write("the next one\n")
        assert log.lost == 1
        assert taken == b"x" * 65_536
        assert os.read(end, 100) == b"\nthe next one\n"
