"""A real `mixer-serve` process on a free port, for what only a real server shows."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 30.0


@dataclass(frozen=True)
class LiveServer:
    """A server that has told its address."""

    url: str
    log: Path

    def lines(self, request_id: str) -> list[dict[str, Any]]:
        """Return the log lines of one request; they are written just after its answer."""
        deadline = time.monotonic() + 5
        while True:
            found = [json.loads(line) for line in self.log.read_text().splitlines()]
            lines = [line for line in found if line.get("request_id") == request_id]
            if lines or time.monotonic() > deadline:
                return lines
            time.sleep(0.02)


@contextmanager
def live_server(folder: Path, *flags: str, **environment: str) -> Iterator[LiveServer]:
    """Run `mixer-serve` with `flags`, its log in `folder`, until the block ends."""
    log = folder / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.serve", "--port", "0", "--drain-delay-s", "0", *flags],
            stderr=stream,
            env={**os.environ, **environment},
        )
    try:
        yield LiveServer(_address(process, log), log)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        text = log.read_text()
        found = re.search(r"http://[0-9.]+:\d+", text)
        if found and "startup complete" in text:
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")
