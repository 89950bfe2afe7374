"""The log of a running server, line by line."""

import json
import time
from typing import Any

from tests.processes import Server


def log_lines(server: Server, request_id: str) -> list[dict[str, Any]]:
    """Return the log lines of one request; they are written just after its answer."""
    deadline = time.monotonic() + 5
    while True:
        found = [json.loads(line) for line in server.log.read_text().splitlines()]
        lines = [line for line in found if line.get("request_id") == request_id]
        if lines or time.monotonic() > deadline:
            return lines
        time.sleep(0.02)
