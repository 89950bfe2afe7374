"""Promise 14: a wrong setting stops start-up with one line that says what, its value, its range."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Figure
from tests.processes import ROOT, clean_environment, run_serve

BAD = [
    ("PORT", "65536", "a whole number from 0 to 65535"),
    ("PORT", "-1", "a whole number from 0 to 65535"),
    ("PORT", "http", "a whole number from 0 to 65535"),
    ("PORT", "", "a whole number from 0 to 65535"),
    ("HOST", "", "a text that is not empty"),
    ("DEVICE", "tpu", "one of auto, cpu, cuda"),
    ("THREADS", "0", "a whole number from 1 to 1024"),
    ("THREADS", "1.5", "a whole number from 1 to 1024"),
    ("DECODE_THREADS", "9999", "a whole number from 1 to 1024"),
    ("MAX_BATCH", "0", "a whole number from 1 to 4096"),
    ("QUEUE_SIZE", "-5", "a whole number from 1 to 1000000"),
    ("QUEUE_BUDGET_MS", "soon", "a whole number from 1 to 3600000"),
    ("REQUEST_TIMEOUT_MS", "0", "a whole number from 1 to 3600000"),
    ("MAX_REQUESTS", "1e3", "a whole number from 1 to 1000000"),
    ("MAX_CONNECTIONS", "0", "a whole number from 1 to 1000000"),
    ("MAX_UPLOAD_BYTES", "20MB", "a whole number from 1024 to 2147483648"),
    ("MAX_UPLOAD_BYTES", "99999999999999999999", "a whole number from 1024 to 2147483648"),
    ("MAX_BYTES_IN_FLIGHT", "10", "a whole number from 1024 to 1099511627776"),
    ("MAX_PIXELS", "0", "a whole number from 1 to 2147483648"),
    ("HEADER_TIMEOUT_S", "0", "a number from 0.1 to 3600"),
    ("BODY_TIMEOUT_S", "inf", "a number from 0.1 to 3600"),
    ("KEEP_ALIVE_S", "0", "a number from 0.1 to 3600"),
    ("DRAIN_DELAY_S", "nan", "a number from 0 to 3600"),
    ("GRACE_S", "-1", "a number from 0.1 to 3600"),
    ("LOG_LEVEL", "loud", "one of debug, info, warning, error"),
    ("MAX_BATCHES", "8", "no such setting"),
    ("MODEL", "/nowhere/model.onnx", "no such file"),
    ("MODEL", "/", "a folder"),
    ("MODEL", "", "a path"),
    ("API_KEYS_FILE", "", "a path"),
    ("API_KEYS_FILE", "/nowhere/keys", "No such file"),
    ("CORS_ORIGINS", "shop.example", "origins"),
    ("CORS_ORIGINS", "https://*.shop.example", "origins"),
    ("CORS_ORIGINS", "https://shop.example:65536", "origins"),
    ("CORS_ORIGINS", "https://shop..example", "origins"),
    ("CORS_ORIGINS", "https://shop.example:443", "without a scheme's own port"),
    ("MODEL", "x" * 300, "no such file"),
    ("MODEL", __file__, "not a model"),
    ("HOST", "no.such.host.invalid", "cannot listen there"),
    ("HOST", "a..b", "cannot listen there"),
]


@pytest.mark.slow  # 30 processes; tests/app/test_serve.py has some of them
@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_bad_setting(name: str, value: str, allowed: str) -> None:
    """Each of over 30 bad settings is one line with its name, its value and what is allowed."""
    result = run_serve(**{f"MIXER_{name}": value})
    lines = result.stderr.splitlines()
    assert result.returncode != 0
    assert len(lines) == 1, result.stderr
    assert f"MIXER_{name}={value}" in lines[0]
    assert allowed in lines[0]


def test_bodies_that_never_fit() -> None:
    """An upload limit above the limit of all bytes in flight is refused: it could never be used."""
    result = run_serve(MIXER_MAX_UPLOAD_BYTES="2000000", MIXER_MAX_BYTES_IN_FLIGHT="1000000")
    assert result.returncode != 0
    assert "MIXER_MAX_BYTES_IN_FLIGHT=1000000" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_two_that_begin_at_once(tmp_path: Path) -> None:
    """Of two that are started on one port at once, one serves and the other says why not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = []
    for number in range(2):
        with (tmp_path / str(number)).open("w") as output:
            command = [sys.executable, "-m", "app.serve", "--port", port]
            both.append(subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stderr=output))
    try:
        give_up = time.monotonic() + 30
        while all(one.poll() is None for one in both) and time.monotonic() < give_up:
            time.sleep(0.05)
        [ended] = [number for number in range(2) if both[number].poll() is not None]
        assert "cannot listen there" in (tmp_path / str(ended)).read_text()
        assert both[ended].returncode == 1
    finally:
        for process in both:
            process.kill()
            process.wait()


def test_key_in_place_of_its_file() -> None:
    """A key that an operator gives by a slip is not shown: the line goes to a collector."""
    result = run_serve(MIXER_API_KEY="s3cret")
    assert "MIXER_API_KEY=…: no such setting" in result.stderr
    assert "s3cret" not in result.stderr


def test_value_of_several_lines() -> None:
    """A value with a line break in it is still one line."""
    result = run_serve(MIXER_PORT="80\n00")
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_taken_port(figure: Figure) -> None:
    """A port that is taken is one line, at once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run_serve(MIXER_PORT=str(taken.getsockname()[1]))
    figure(f"{len(BAD) + 3} bad settings; {result.stderr.strip()}")
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1
