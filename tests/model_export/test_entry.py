"""The commands of the export side where torch is missing."""

import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("mixer-export", ["--help"]), ("mixer-train", ["docker", "-o", "x"])],
)
def test_torch_is_missing(command: str, arguments: list[str]) -> None:
    """Without the extra `export` each command is one line that names it."""
    entry = command.replace("-", "_")
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from model_export import entry\n"
        f"sys.exit(entry.{entry}())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"{command}: torch is not installed: pip install '.[export]'\n"
