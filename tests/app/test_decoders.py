"""Decoding in processes of their own: same pictures, same problems; and what if one ends."""

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app import decoder
from app.decoder import SIZE, Task, receive, send
from app.decoder_link import DecoderLink
from app.decoders import Decoders, check_decoders
from app.errors import (
    CorruptImage,
    DecoderLost,
    EmptyBody,
    NoDecoder,
    NotReady,
    Problem,
    StartupError,
    TooManyPixels,
    UnsupportedFormat,
)
from app.images import decode
from app.model_card import Preprocessing
from app.nursery import Nursery, nursery
from tests.fakes import encode, make_image
from tests.processes import ROOT, serving

TASK = Task(
    preprocessing=Preprocessing(image_size=32, patch_size=4),
    max_pixels=10_000,
    max_bytes=2**20,
)


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    """Return two decoders, ended afterwards."""
    found = Decoders(2, TASK)
    yield found
    found.close()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_same_picture(decoders: Decoders, file_format: str) -> None:
    """A picture is the same, byte for byte, as if it were decoded here."""
    upload = make_image((60, 40, 20), file_format, side=50)
    there, here = decoders.decode(upload), decode(upload, TASK.preprocessing, TASK.max_pixels)
    assert (there.format, there.width, there.height) == (here.format, here.width, here.height)
    assert there.patches.dtype == np.uint8
    np.testing.assert_array_equal(there.patches, here.patches)


def test_upload_beyond_the_pixels_memory() -> None:
    """An upload that is larger than all that its pixels may take is still read, and refused."""
    task = TASK.model_copy(update={"max_bytes": 256 * 2**20})
    with closing(DecoderLink(task)) as decoder, pytest.raises(UnsupportedFormat):
        decoder.decode(bytes(task.max_bytes))


def test_answers_of_any_length() -> None:
    """An answer that comes in pieces is put together, and a short one is not waited on."""
    large_view = Preprocessing(image_size=1024, patch_size=16)
    task = TASK.model_copy(update={"preprocessing": large_view})
    upload = make_image((60, 40, 20), "PNG", side=50)
    large = Decoders(1, task)
    for _ in range(3):
        with pytest.raises(UnsupportedFormat):
            large.decode(b"not an image")
        here = decode(upload, task.preprocessing, task.max_pixels)
        np.testing.assert_array_equal(large.decode(upload).patches, here.patches)
    large.close()


@pytest.mark.parametrize(
    ("upload", "kind"),
    [
        (b"not an image", UnsupportedFormat),
        (make_image(side=64)[:60], CorruptImage),
        (make_image(side=101), TooManyPixels),
        (b"", EmptyBody),
    ],
)
def test_same_problem(decoders: Decoders, upload: bytes, kind: type[Problem]) -> None:
    """A problem has the class and the words that it would have here."""
    with pytest.raises(kind) as here:
        decode(upload, TASK.preprocessing, TASK.max_pixels)
    with pytest.raises(kind) as there:
        decoders.decode(upload)
    assert there.value.detail == here.value.detail


def test_decoder_killed_over_an_upload(caplog: pytest.LogCaptureFixture) -> None:
    """An upload whose decoder is killed fails, and the next one finds another decoder."""
    one = DecoderLink(TASK)
    killed = one.pid
    threading.Timer(0.3, os.kill, [killed, signal.SIGKILL]).start()
    with pytest.raises(DecoderLost):
        one.decode(png_of_profiles(20_000))  # which takes longer
    assert f"decoder {killed} has ended" in caplog.text
    assert one.decode(make_image()).format == "PNG"
    one.close()


def test_decoder_killed_while_it_waits(caplog: pytest.LogCaptureFixture) -> None:
    """A decoder that ended while it had nothing to do costs no upload."""
    one = DecoderLink(TASK)
    killed = one.pid
    os.kill(killed, signal.SIGKILL)
    time.sleep(0.05)
    assert one.decode(make_image()).format == "PNG"
    assert f"decoder {killed} has ended" in caplog.text
    one.close()


def test_decoder_killed_before_it_has_read(caplog: pytest.LogCaptureFixture) -> None:
    """A decoder that is killed with its upload unread costs none either."""
    one = DecoderLink(TASK)
    killed = one.pid
    os.kill(killed, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, [killed, signal.SIGKILL]).start()
    assert one.decode(make_image()).format == "PNG"
    assert f"decoder {killed} has ended" in caplog.text
    one.close()


def test_upload_that_no_decoder_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload over which a second decoder ends fails, and the next one passes."""
    one = DecoderLink(TASK)
    with monkeypatch.context() as patch:
        patch.setattr("app.decoder_link.send", Mock(side_effect=BrokenPipeError))
        patch.setattr(one, "_connect", Mock())
        with pytest.raises(NoDecoder):
            one.decode(make_image())
    assert one.decode(make_image()).format == "PNG"
    one.close()


def test_no_memory_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that was not read to its end is never taken for the next upload's."""
    one = DecoderLink(TASK)
    with monkeypatch.context() as patch:
        patch.setattr(one, "_link", Mock(wraps=one._link, recv=Mock(side_effect=MemoryError)))
        with pytest.raises(MemoryError):
            one.decode(make_image((1, 2, 3)))
    assert one.decode(make_image((60, 40, 20))).patches[0, 0] == 60
    one.close()


def test_time_is_limited(decoders: Decoders) -> None:
    """What takes longer than any honest picture ends with its decoder: 422, and the next passes."""
    with pytest.raises(CorruptImage, match="too long"):
        decoders.decode(png_of_profiles(20_000))
    assert decoders.decode(make_image()).format == "PNG"


def test_memory_is_limited() -> None:
    """What asks for far more memory than its pixels need is refused it, and the decoder goes on."""
    task = TASK.model_copy(update={"max_pixels": 20_000_000})
    one = DecoderLink(task)
    wide = encode(Image.new("1", (1, 20_000_000)), "PNG")  # each row costs some 20 bytes more
    with pytest.raises(CorruptImage):
        one.decode(wide)
    assert one.decode(make_image()).format == "PNG"
    assert kib(one, "VmHWM") < 600_000
    one.close()


def test_memory_that_is_limited_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of the container or shell below a decoder's own stays as it is."""
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    for hard, most in ((1000, 1000), (resource.RLIM_INFINITY, 2**41)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (hard, hard))
        decoder._limit_memory(2**40)
        assert limits[-1][0] <= most
    assert limits[-1][0] > 2**40


@pytest.mark.parametrize("photos_before", [0, 20])
def test_memory_comes_back(photos_before: int) -> None:
    """What a large picture has taken is given back once it is answered."""
    one = DecoderLink(TASK.model_copy(update={"max_pixels": 50_000_000}))
    large = encode(Image.new("RGBA", (6000, 6000)), "PNG")
    photo = encode(Image.new("RGB", (640, 480)), "JPEG")
    for _ in range(1 + photos_before):
        one.decode(photo)
    before = kib(one, "VmRSS")
    one.decode(large)
    assert kib(one, "VmHWM") > before + 250_000
    assert kib(one, "VmRSS") < before + 32_000
    one.close()


def kib(one: DecoderLink, field: str) -> int:
    """Return a field of a decoder's /proc/PID/status."""
    status = Path(f"/proc/{one.pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0])


def png_of_profiles(count: int) -> bytes:
    """Return a PNG of one pixel and so many color profiles, a kB each that unpacks to a MB."""
    profile = b"k\0\0" + zlib.compress(bytes(1_000_000))
    chunk = b"iCCP" + profile
    chunk = struct.pack(">I", len(profile)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    image = make_image(side=1)
    end_of_header = 8 + 25  # signature, IHDR
    return image[:end_of_header] + chunk * count + image[end_of_header:]


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
        "from tests.app.test_decoders import TASK\n"
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


def test_decoder_that_was_stopped() -> None:
    """A message that comes in two parts, as after SIGSTOP and SIGCONT, is one message."""
    whole = bytes(range(256)) * 4
    pieces = [SIZE.pack(len(whole))[:1], SIZE.pack(len(whole))[1:], whole[:100], whole[100:]]
    link = Mock()
    link.recv = Mock(side_effect=pieces)
    assert receive(link) == whole
    link.recv = Mock(side_effect=[*pieces[:3], b""])
    assert receive(link) is None


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


@pytest.mark.parametrize("size", [1, 16 * 2**20])  # the larger one is not even sent
def test_stuck_decoder(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    """A decoder that stands still fails its upload, however large, and is replaced."""
    monkeypatch.setattr("app.nursery._PATIENCE", struct.pack("ll", 0, 300_000))
    one = DecoderLink(TASK)
    stuck = one.pid
    os.kill(stuck, signal.SIGSTOP)
    without_patience = threading.Timer(20, os.kill, [stuck, signal.SIGKILL])
    without_patience.start()
    with pytest.raises(DecoderLost):
        one.decode(bytes(size))
    without_patience.cancel()
    assert f"decoder {stuck} has ended over an image" in caplog.text
    assert one.decode(make_image()).format == "PNG"
    one.close()
    _wait_for_the_end_of([stuck])


def test_no_decoder_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be decoded, start-up says so."""
    check_decoders(2, TASK)
    with monkeypatch.context() as patch:
        patch.setattr(nursery(), "new_link", Mock(side_effect=BlockingIOError(11, "no process")))
        with pytest.raises(StartupError, match=r"cannot be decoded here.*no process"):
            check_decoders(2, TASK)
    links = [nursery().new_link(), BlockingIOError(11, "no second process")]
    with monkeypatch.context() as patch:
        patch.setattr(nursery(), "new_link", Mock(side_effect=links))
        with pytest.raises(StartupError, match="no second process"):
            check_decoders(2, TASK)
    ours, theirs = socket.socketpair()
    with theirs:
        send(theirs, b"1")  # its process ID
    monkeypatch.setattr(nursery(), "new_link", Mock(return_value=ours))
    with pytest.raises(StartupError, match="cannot be decoded here"):
        check_decoders(2, TASK)


def test_memory_that_cannot_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a decoder's memory cannot be limited, start-up says so, and why."""
    missing = FileNotFoundError(2, "No such file", "/proc/self/statm")
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(nursery(), "new_link", lambda: ours)
    monkeypatch.setattr(decoder, "_limit_memory", Mock(side_effect=missing))

    def serve() -> None:
        with theirs, suppress(OSError):
            decoder.serve(theirs)

    send(theirs, b"1")  # its process ID
    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(StartupError, match=r"cannot be limited: .*/proc/self/statm"):
        check_decoders(1, TASK)
    thread.join()


def test_failures_in_a_row(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a process answers, bad images too, ends the row of uploads without one."""
    for upload, kind in ((make_image(), None), (b"not an image", UnsupportedFormat)):
        with monkeypatch.context() as patch:
            patch.setattr("app.decoder_link.nursery", Mock(side_effect=BlockingIOError))
            for one in decoders._all:
                one.close()
            with pytest.raises(NotReady):
                decoders.decode(upload)
            assert decoders.failures == 1
        if kind is None:
            decoders.decode(upload)
        else:
            with pytest.raises(kind):
                decoders.decode(upload)
        assert decoders.failures == 0


def test_one_moment_without_processes(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads that find no process in the same moment are one failure, however many they are."""
    with monkeypatch.context() as patch:
        patch.setattr("app.decoder_link.nursery", Mock(side_effect=BlockingIOError))
        for one in decoders._all:
            one.close()
        for _ in range(8):
            with pytest.raises(NotReady):
                decoders.decode(make_image())
        assert decoders.failures == 1
    decoders.decode(make_image())
    assert decoders.failures == 0


def test_nursery_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nursery that stands still fails one request for a decoder, and is replaced."""
    monkeypatch.setattr("app.nursery._PATIENCE", struct.pack("ll", 0, 300_000))
    DecoderLink(TASK).close()
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


def test_decoders_that_end_as_they_begin(
    decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What starts and ends before it has read anything counts as no process, to probes, too."""
    monkeypatch.setattr("app.decoders.BLIP_S", 0)
    for one in decoders._all:
        one.close()
    with monkeypatch.context() as patch:
        patch.setattr(nursery(), "new_link", _gone_after_hello)
        for failures in (1, 2):
            with pytest.raises(NotReady):
                decoders.decode(make_image())
            assert decoders.failures == failures
        decoders.probe()
        assert decoders.failures == 3
    decoders.probe()
    assert decoders.failures == 0


def _gone_after_hello() -> socket.socket:
    """Return a socket to a decoder that has said its process ID, and read its task, no more."""
    ours, theirs = socket.socketpair()
    send(theirs, b"1")

    def end() -> None:
        with theirs:
            receive(theirs)

    threading.Thread(target=end).start()
    return ours


def test_what_a_decoder_inherits() -> None:
    """A decoder's limit of CPU time works, and Ctrl+C passes it by, whatever started us."""
    script = (
        "import os, signal\n"
        "from app.decoder_link import DecoderLink\n"
        "from tests.app.test_decoders import TASK\n"
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


def test_closed_decoders_end(decoders: Decoders) -> None:
    """A decoder ends with its socket, and leaves no process behind."""
    pids = [one.pid for one in decoders._all]
    decoders.close()
    _wait_for_the_end_of(pids)


def test_no_process_outlives_the_service(tmp_path: Path) -> None:
    """When the service is killed, all that it started ends."""
    with serving(tmp_path / "log") as server:
        pids = server.pids()
        assert len(pids) > 2
        os.kill(server.process.pid, signal.SIGKILL)
        _wait_for_the_end_of(pids[1:])


def test_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in decoding comes back with its traceback, and the decoder goes on."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(nursery(), "new_link", lambda: ours)
        monkeypatch.setattr(decoder, "_limit_memory", lambda _: None)  # it would be this process's
        send(theirs, b"1")  # its process ID
        thread = threading.Thread(target=decoder.serve, args=[theirs])
        thread.start()
        one = DecoderLink(TASK)
        with monkeypatch.context() as broken:
            broken.setattr("app.decoder.decode", lambda *_: 1 / 0)
            with pytest.raises(RuntimeError, match="ZeroDivisionError"):
                one.decode(make_image())
        assert one.decode(make_image()).format == "PNG"
        one.close()
        thread.join()


@settings(deadline=None)
@given(st.integers(0, 3_000_000), st.integers(0, 255))
def test_messages_of_any_size(size: int, value: int) -> None:
    """What is sent arrives whole, however large; a closed socket is no message."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(60)  # so that one call sends what the buffer takes, and not all
        message = bytes([value]) * size
        thread = threading.Thread(target=send, args=[ours, b"ab", message])
        thread.start()
        assert bytes(receive(theirs) or b"") == b"ab" + message
        thread.join()
        ours.close()
        assert receive(theirs) is None


def _wait_for_the_end_of(pids: list[int]) -> None:
    give_up = time.monotonic() + 10
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < give_up, f"still there: {left}"
        time.sleep(0.01)


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
