"""Where decoders come from: whoever ends, those who are left go on, and nobody stays behind."""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.decoder import receive
from app.decoder_link import DecoderLink
from app.errors import (
    NoDecoder,
)
from app.nursery import Nursery, nursery
from tests.app.test_decoder_link import TASK
from tests.fakes import make_image
from tests.processes import ROOT


def test_killed_nursery() -> None:
    """Decoders outlive the process that forked them, and a new one of those is started."""
    old = DecoderLink(TASK)
    parent = int(Path(f"/proc/{old.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    while nursery()._process.poll() is None:
        time.sleep(0.01)
    new = DecoderLink(TASK)
    for one in (old, new):
        assert one.decode(make_image()).format == "PNG"
        one.close()


def test_orphans_are_buried() -> None:
    """Where the orphans of a killed nursery fall to us, as to process 1, none stays a zombie."""
    script = (
        "import ctypes, os, signal, time\n"
        "from pathlib import Path\n"
        "from app.decoder_link import DecoderLink\n"
        "from app.nursery import nursery\n"
        "from tests.app.test_decoder_link import TASK\n"
        "ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\n"  # PR_SET_CHILD_SUBREAPER
        "old = DecoderLink(TASK)\n"
        "nursery()._process.kill()\n"
        "nursery()._process.wait()\n"
        "with_orphan = DecoderLink(TASK)\n"
        "children = Path(f'/proc/{os.getpid()}/task/{os.getpid()}/children')\n"
        "assert str(old.pid) in children.read_text().split()\n"
        "os.kill(old.pid, signal.SIGKILL)\n"
        "while 'Z' not in Path(f'/proc/{old.pid}/stat').read_text().rpartition(')')[2][:3]:\n"
        "    time.sleep(0.01)\n"
        "DecoderLink(TASK)\n"
        "assert str(old.pid) not in children.read_text().split()\n"
        "assert not nursery()._orphaned\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_one_nursery_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of threads that miss it at the same time, one starts another nursery, for all of them."""
    start, begun = Nursery._start, []

    def slowly(self: Nursery) -> None:
        begun.append(self)
        time.sleep(0.2)  # the others come meanwhile
        start(self)

    monkeypatch.setattr(Nursery, "_start", slowly)
    nursery()._process.kill()
    nursery()._process.wait()
    with ThreadPoolExecutor(4) as pool:
        for one in pool.map(DecoderLink, [TASK] * 4):
            assert one.decode(make_image()).format == "PNG"
            one.close()
    assert len(begun) == 1


def test_nursery_that_has_just_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nursery that is dead, but not yet known to be, costs nothing."""
    process = nursery()._process
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    monkeypatch.setattr(process, "poll", lambda: None)
    one = DecoderLink(TASK)
    assert one.decode(make_image()).format == "PNG"
    one.close()


def test_nursery_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nursery that stands still fails one request for a decoder, and is replaced."""
    DecoderLink(TASK).close()
    monkeypatch.setattr("app.nursery._PATIENCE", struct.pack("ll", 0, 300_000))
    stuck = nursery()._process.pid
    os.kill(stuck, signal.SIGSTOP)
    with pytest.raises(NoDecoder):
        DecoderLink(TASK)
    monkeypatch.undo()  # one that starts takes half a second
    one = DecoderLink(TASK)
    other = nursery()._process.pid
    assert other != stuck
    nursery().replace(0)  # who asked before this one came has waited for the other
    assert nursery()._process.pid == other
    assert one.decode(make_image()).format == "PNG"
    one.close()


def test_what_a_decoder_inherits() -> None:
    """A decoder's limit of CPU time works, and Ctrl+C passes it by, whatever started us."""
    script = (
        "import os, signal\n"
        "from app.decoder_link import DecoderLink\n"
        "from tests.app.test_decoder_link import TASK\n"
        "signal.signal(signal.SIGPROF, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])\n"
        "one = DecoderLink(TASK)\n"
        "print(os.getpgid(one.pid) == os.getpgid(0))\n"
        "print(open(f'/proc/{one.pid}/status').read())\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    is_same_group, status = result.stdout.split("\n", 1)
    assert is_same_group == "False", result.stderr
    for field in ("SigBlk", "SigIgn"):
        mask = int(status.partition(f"{field}:")[2].split()[0], 16)
        assert not mask >> (signal.SIGPROF - 1) & 1


def test_package_named_as_one_of_the_standard_library(tmp_path: Path) -> None:
    """An installed package does not take the place of a module that decoders need, nor of ours."""
    (tmp_path / "app").symlink_to(ROOT / "app")  # as a wheel's
    (tmp_path / "uuid.py").write_text("raise ImportError('of Python 2')")
    script = (
        "import sys\n"
        "[first, *_] = [at for at, path in enumerate(sys.path) if 'site-packages' in path]\n"
        "sys.path.insert(first, sys.argv[1])\n"
        "from app.decoder import Task\n"
        "from app.decoder_link import DecoderLink\n"
        "one = DecoderLink(Task.model_validate_json(sys.argv[2]))\n"
        "print(sys.modules['app'].__file__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", script, str(tmp_path), TASK.model_dump_json()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""
    assert str(tmp_path) in result.stdout


def test_end_without_a_word() -> None:
    """What has started a nursery ends it, too: no warning tells that one was left running."""
    script = "from app.nursery import nursery; nursery()"
    command = [sys.executable, "-X", "dev", "-c", script]  # which shows all warnings
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""


def test_service_that_is_gone_again() -> None:
    """A decoder whose service ends while it begins says nothing: there is nobody to blame."""
    control, theirs = socket.socketpair()
    ours, link = socket.socketpair()
    with control, theirs, link:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.decoder", str(theirs.fileno())],
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        ours.close()
        socket.send_fds(control, [b"1"], [link.fileno()])
        control.shutdown(socket.SHUT_WR)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, b"")


def test_fork_that_fails() -> None:
    """A decoder that cannot be forked costs its own link alone: the next one comes."""
    script = (
        "import os\n"
        "from unittest.mock import Mock\n"
        "from app import decoder\n"
        "os.fork = Mock(side_effect=[BlockingIOError(11, 'too many'), 0])\n"
        "decoder.main()\n"  # as the decoder of the second link
    )
    control, theirs = socket.socketpair()
    with control, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(theirs.fileno())],
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()  # so that it is gone with the process
        said = []
        for _ in range(2):
            ours, link = socket.socketpair()
            with ours, link:
                socket.send_fds(control, [b"1"], [link.fileno()])
                link.close()
                said.append(receive(ours))
        _, complaints = process.communicate(timeout=30)
    assert complaints == b""
    assert said == [None, str(process.pid).encode()]
