"""Commands whose standard streams are closed, full or left by their reader."""

import os
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT, clean_environment

CLOSED = (">&-", "2>&-", "<&- >&- 2>&-")


def buffered(**settings: str) -> dict[str, str]:
    """Return an environment in which Python buffers its output as it does by default."""
    kept = clean_environment(**settings)
    kept.pop("PYTHONUNBUFFERED", None)
    return kept


def run_into_closed_pipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a command behind which nobody reads (`| head -0`)."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return _run(*arguments, stdout=writer)
    finally:
        os.close(writer)


def run_into_full_disk(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a command whose output finds no room."""
    with Path("/dev/full").open("w") as full:
        return _run(*arguments, stdout=full.fileno())


def check_output(*command: str) -> None:
    """Check that it ends without a word where nobody reads, and in one line on a full disk."""
    left = run_into_closed_pipe(*command)
    assert (left.returncode, left.stderr) == (141, "")
    full = run_into_full_disk(*command)
    assert full.returncode == 1
    assert full.stderr.endswith(": standard output: No space left on device\n")
    assert full.stderr.count("\n") == 1


def run_closed(closed: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a command, and close streams as a shell does (`>&- 2>&-`)."""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=buffered(), capture_output=True, text=True, timeout=120, check=False
    )


def _run(*arguments: str, stdout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=buffered(),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
