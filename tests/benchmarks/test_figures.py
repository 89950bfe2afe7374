"""The benchmark's figures: medians of rounds, the CPU time of whole process trees; its options."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.benchmarks import report, rounds
from tests.benchmarks.__main__ import main
from tests.benchmarks.measure import Bench, Figures
from tests.benchmarks.peers import SERVERS, Server
from tests.benchmarks.processes import BenchmarkError, Running
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


def test_server_that_ends() -> None:
    """A server that ends while it is measured is told, whatever is asked of it."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        server = Running(0, 0.0, psutil.Process(process.pid))
        process.wait()
        for ask in (server.cpu_s, server.pss_bytes):
            with pytest.raises(BenchmarkError, match="the server has ended"):
                ask()


def test_server_that_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One server that cannot be installed or breaks is left out and named; the others go on."""

    def install(server: Server, folder: Path) -> Path:
        if server.name == "pytriton":
            raise BenchmarkError("pytriton cannot be installed")
        (folder / server.name).mkdir(exist_ok=True)
        return folder / server.name

    def closed(bench: Bench, server: Server, connections: tuple[int, ...]) -> Figures:
        if server.name == "LitServe":
            raise BenchmarkError("LitServe does not start")
        load = {
            "per_s": 9.0,
            "cpu_ms": 2.0,
            "p50_ms": 1.0,
            "p99_ms": 1.0,
            "failed": 0,
            "answered": 9,
        }
        return {
            "closed": {str(count): {**load, "mean_batch": 9.0} for count in connections},
            "pss_bytes": 1,
            "ready_s": 1.0,
        }

    def opened(bench: Bench, server: Server, rates: list[float]) -> Figures:
        if server.name == "mosec":
            raise BenchmarkError("mosec has ended")
        load = {"p99_ms": 1.0, "failed": 0, "answered": 1}
        return {"rates": {f"{rate:g}": load for rate in rates}, "goodput_per_s": 9.0}

    load = {"cpu_ms": 1.0, "per_s": 9.0, "p50_ms": 1.0}
    bare = {"label": "ship", "best_batch": 16, "batched": load, "single": load, "model": load}
    for name, stand_in in {
        "FOLDER": tmp_path,
        "install": install,
        "installed_bytes": lambda _: 1,
        "closed_loops": closed,
        "open_loops": opened,
    }.items():
        monkeypatch.setattr(rounds, name, stand_in)
    monkeypatch.setattr(rounds.Rounds, "_bare", lambda *_: bare | {"decode": load})
    monkeypatch.setattr(rounds.Rounds, "_front_end", lambda *_: [{}])
    servers = [SERVERS[name] for name in ("mixer-serve", "mosec", "LitServe", "pytriton")]
    plan = rounds.Plan(servers, ["embedded"], tmp_path / "none", 2, 2, 1.0, (0.5, 1.0), "ours")

    results = rounds.Rounds(plan).run()

    told = capsys.readouterr().err
    assert list(results["left_out"]) == ["pytriton", "LitServe", "mosec"]
    assert list(results["models"]["embedded"]["servers"]) == ["mixer-serve", "mosec"]
    assert list(results["open"]) == ["mixer-serve"]
    table = report.write(results, tmp_path)
    for name, reason in results["left_out"].items():
        assert told.count(f"left out from here on: {reason}") == 1
        assert f"Left out, from where it broke: {name} ({reason})." in table
    assert "| mosec | 2.00 |" in table
    assert "| mixer-serve | 9.0 |" in table


def test_nothing_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all servers are left out the run ends, and says why."""
    monkeypatch.setattr(rounds, "FOLDER", tmp_path)
    plan = rounds.Plan([SERVERS["mosec"]], [], tmp_path / "none", 2, 1, 1.0, (1.0,), "ours")
    asked = rounds.Rounds(plan)

    def break_down() -> Figures:
        raise BenchmarkError("mosec cannot be installed")

    assert asked._visit(SERVERS["mosec"], break_down) == []
    with pytest.raises(BenchmarkError, match="mosec cannot be installed"):
        asked._medians({"mosec": []})


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
