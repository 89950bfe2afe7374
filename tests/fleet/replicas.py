"""Replicas: `mixer-serve` processes on ports that stay theirs over restarts."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2

from tests.processes import ROOT, START_TIMEOUT_S, clean_environment

STOP_TIMEOUT_S = 30.0  # the service's drain delay and grace time, and a little


class Replica:
    """One replica; it can be started again after it has ended."""

    def __init__(self, name: str, folder: Path, **settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._settings = settings
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, **settings: str) -> None:
        """Start the process, with settings over its own; do not wait for it."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app.serve", f"--port={self.port}"],
                cwd=ROOT,
                # One thread each: three replicas share the machine with balancer and load.
                env=clean_environment(
                    MIXER_THREADS="1", MIXER_DECODE_THREADS="1", ORT_DISABLE_TELEMETRY="1"
                )
                | self._settings
                | settings,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self) -> None:
        """Return when `/readyz` answers 200."""
        wait_for(self.is_ready, f"{self.url} is not ready:\n{self._log.read_text()}")

    def is_ready(self) -> bool:
        """Return whether `/readyz` answers 200."""
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=1).status_code == httpx2.codes.OK
        except httpx2.TransportError:
            return False

    def send(self, signal_number: int) -> None:
        """Send a signal to the process."""
        assert self._process is not None
        self._process.send_signal(signal_number)

    def wait(self) -> int:
        """Wait for the process to end and return its exit code."""
        assert self._process is not None
        return self._process.wait(STOP_TIMEOUT_S)

    def restart(self) -> None:
        """Drain, end and start anew, as an orchestrator replaces a replica."""
        self.send(signal.SIGTERM)
        assert self.wait() == 0
        self.start()
        self.wait_until_ready()

    def cpu_seconds(self) -> float:
        """Return the CPU time that the process has used, to see whether it works."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End the process at once, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """Return a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for(condition: Callable[[], bool], complaint: str) -> None:
    """Return as soon as the condition holds; fail with the complaint if it never does."""
    give_up = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up, complaint
        time.sleep(0.05)
