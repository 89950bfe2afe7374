"""One decoder: whatever is in an upload, its process and its time are bounded."""

import os
import resource
import signal
import socket
import struct
import threading
import time
import zlib
from contextlib import closing, suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app import decoder
from app.decoder import SIZE, Task, receive, send
from app.decoder_link import DecoderLink
from app.decoders import Decoders, check_decoders
from app.errors import (
    CorruptImage,
    DecoderLost,
    NoDecoder,
    StartupError,
    UnsupportedFormat,
)
from app.images import decode
from app.model_card import Preprocessing
from app.nursery import nursery
from tests.fakes import encode, make_image
from tests.processes import cpu_s

TASK = Task(
    preprocessing=Preprocessing(image_size=32, patch_size=4),
    max_pixels=10_000,
    max_bytes=2**20,
)


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


def test_decoder_killed_over_an_upload(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An upload whose decoder is killed fails, and the next one finds another decoder."""
    # However long a busy machine takes over it, this is not the decoder's own limit.
    monkeypatch.setattr("app.decoder_link.MAX_CPU_S", 60)
    upload = png_of_profiles(20_000)  # which takes far longer
    one = DecoderLink(TASK)
    killed = one.pid
    killing = threading.Thread(target=kill_at_work, args=[killed, cpu_s(killed) + 0.2])
    killing.start()
    with pytest.raises(DecoderLost):
        one.decode(upload)
    killing.join()
    assert f"decoder {killed} has ended" in caplog.text
    assert one.decode(make_image()).format == "PNG"
    one.close()


def kill_at_work(pid: int, used_s: float) -> None:
    """Kill a process once it has used so many CPU seconds."""
    give_up = time.monotonic() + 30
    while cpu_s(pid) < used_s:
        assert time.monotonic() < give_up, "it never works"
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


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
    large = encode(Image.new("RGBA", (4000, 4000)), "PNG")
    photo = encode(Image.new("RGB", (640, 480)), "JPEG")
    for _ in range(1 + photos_before):
        one.decode(photo)
    before = kib(one, "VmRSS")
    one.decode(large)
    assert kib(one, "VmHWM") > before + 110_000
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


def test_decoder_that_was_stopped() -> None:
    """A message that comes in two parts, as after SIGSTOP and SIGCONT, is one message."""
    whole = bytes(range(256)) * 4
    pieces = [SIZE.pack(len(whole))[:1], SIZE.pack(len(whole))[1:], whole[:100], whole[100:]]
    link = Mock()
    link.recv = Mock(side_effect=pieces)
    assert receive(link) == whole
    link.recv = Mock(side_effect=[*pieces[:3], b""])
    assert receive(link) is None


@pytest.mark.parametrize("size", [1, 16 * 2**20])  # the larger one is not even sent
def test_stuck_decoder(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    """A decoder that stands still fails its upload, however large, and is replaced."""
    DecoderLink(TASK).close()  # the first one may have to wait for the nursery
    monkeypatch.setattr("app.nursery._PATIENCE", struct.pack("ll", 2, 0))
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
    wait_for_the_end_of([stuck])


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


def wait_for_the_end_of(pids: list[int]) -> None:
    """Wait until none of these processes is there any more."""
    give_up = time.monotonic() + 10
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < give_up, f"still there: {left}"
        time.sleep(0.01)
