"""The benchmark's figures: medians of rounds, the CPU time of whole process trees; its options."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.benchmarks.__main__ import main
from tests.benchmarks.processes import Running
from tests.benchmarks.rounds import median


def test_median_of_rounds() -> None:
    """Figures become medians, a batch one that was tried, and a label stays what it is."""
    rounds = [{"cpu_ms": cpu, "best": best, "label": "ship"} for cpu, best in ((1.0, 8), (2.0, 16))]
    assert median(rounds) == {"cpu_ms": 1.5, "best": 8, "label": "ship"}


def test_ended_children_count() -> None:
    """What a server's child has used counts after the child has ended."""
    burn = "import time\\nwhile time.process_time() < 0.5: pass"
    script = (
        "import subprocess, sys\n"
        f'subprocess.run([sys.executable, "-c", "{burn}"], check=True)\n'
        "print('done', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert Running(0, 0.0, psutil.Process(process.pid)).cpu_s() >= 0.5
        process.communicate(b"")


def test_folder_without_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without JPEGs is told at once, in a line."""
    monkeypatch.setattr(sys, "argv", ["bench", "--photos", str(tmp_path)])
    assert main() == 1
    assert capsys.readouterr().err == f"bench: --photos {tmp_path}: no .jpg or .jpeg in it\n"


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
def test_options_that_count(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounds and threads are at least one."""
    monkeypatch.setattr(sys, "argv", ["bench", option, "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"{option}: '0' is not a number from 1 to 1000" in capsys.readouterr().err
