"""The commands of the export side where torch is missing."""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from model_export import entry
from tests.outputs import (
    CLOSED,
    buffered,
    check_output,
    run_closed,
    run_into_closed_pipe,
    run_into_full_disk,
)
from tests.processes import ROOT

MODEL = str(ROOT / "app" / "models" / "mixer-cifar10.onnx")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_leaves_no_draft(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either signal ends a command with a shell's exit code for it, and half-written files go."""

    def work() -> int:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), number)
        return 0

    monkeypatch.setattr(importlib, "import_module", lambda _: SimpleNamespace(main=work))
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run behind nohup
    try:
        with pytest.raises(SystemExit) as ended:
            entry.mixer_export()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert ended.value.code == 128 + number
    assert not list(tmp_path.iterdir())


def test_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that was told to outlive its terminal does."""
    monkeypatch.setattr(importlib, "import_module", lambda _: SimpleNamespace(main=lambda: 0))
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert entry.mixer_train() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_interrupted_while_torch_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl+C at once is one line, as later."""
    monkeypatch.setattr(importlib, "import_module", Mock(side_effect=KeyboardInterrupt))
    assert entry.mixer_export() == 130
    assert capsys.readouterr().err == "mixer-export: stopped\n"


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "model_export.cli", "inspect", MODEL),
        ("-m", "model_export.cli", "convert", "--help"),
        ("-m", "model_export.train", "--help"),
        ("-m", "model_export.cli", "--version"),
    ],
)
def test_output_that_takes_nothing(command: tuple[str, ...]) -> None:
    """A reader that has seen enough ends a command without a word, a full disk in one line."""
    check_output(*command)


def test_progress_that_nobody_takes() -> None:
    """Training ends likewise when the lines that tell how far it is find no reader or no room."""
    script = (
        "import sys\n"
        "from model_export import train\n"
        "train._train = lambda _: print('epoch 1', flush=True)\n"
        "sys.exit(train.main(['data', '-o', 'run']))\n"
    )
    left = run_into_closed_pipe("-c", script)
    assert (left.returncode, left.stderr) == (141, "")
    full = run_into_full_disk("-c", script)
    assert full.returncode == 1
    assert full.stderr == "mixer-train: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("closed", CLOSED)
def test_closed_streams(closed: str) -> None:
    """Whichever of the standard streams are closed, a command ends as it would with them.

    What it would tell on one of them does not go to the other.
    """
    script = "import sys; from model_export import entry; sys.exit(entry.mixer_export())"
    for code, argument in enumerate((MODEL, "absent.onnx")):
        done = run_closed(closed, "-c", script, "inspect", argument)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert code == 0 or done.stdout == ""


def test_terminal_that_lacks_a_character() -> None:
    """A report is shown as well as can be where output is no UTF-8."""
    script = "import sys; from model_export import entry; sys.exit(entry.mixer_export())"
    done = subprocess.run(
        [sys.executable, "-c", script, "inspect", MODEL],
        cwd=ROOT,
        env=buffered(PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "deer, \\u2026\n" in done.stdout


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("mixer-serve", "app.serve"),
        ("mixer-serve tune", "app.serve tune"),
        ("mixer-classify", "app.client.command"),
        ("mixer-export", "model_export.cli"),
        ("mixer-export inspect", "model_export.cli inspect"),
        ("mixer-train", "model_export.train"),
    ],
)
def test_version(command: str, module: str) -> None:
    """Each command tells the version of the package, and nothing else."""
    words = [sys.executable, "-m", *module.split(), "--version"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{command} {version('mixer-serve')}\n"


@pytest.mark.parametrize(
    ("command", "arguments", "missing", "extra"),
    [
        ("mixer-export", ["--help"], "torch", "export"),
        ("mixer-train", ["docker", "-o", "x"], "torch", "export"),
        ("mixer-train", ["adapt", "m.onnx", "docker", "-o", "x"], "onnx", "adapt"),
    ],
)
def test_extra_is_missing(command: str, arguments: list[str], missing: str, extra: str) -> None:
    """Without the extra that it needs each command is one line that names it."""
    entry = command.replace("-", "_")
    script = (
        "import sys\n"
        f"sys.modules['{missing}'] = None\n"
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
    assert result.stderr == f"{command}: {missing} is not installed: pip install '.[{extra}]'\n"
