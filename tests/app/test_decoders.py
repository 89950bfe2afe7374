"""Decoding in processes of their own: same pictures, same problems; and what if one ends."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import decoder
from app.decoder import Task, receive, send
from app.decoders import Decoder, DecoderLost, Decoders, nursery
from app.errors import CorruptImage, Problem, TooManyPixels, UnsupportedFormat
from app.images import decode
from app.model_card import Preprocessing
from tests.fakes import make_image
from tests.processes import serving

TASK = Task(preprocessing=Preprocessing(image_size=32, patch_size=4), max_pixels=10_000)


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


@pytest.mark.parametrize(
    ("upload", "kind"),
    [
        (b"not an image", UnsupportedFormat),
        (make_image(side=64)[:60], CorruptImage),
        (make_image(side=101), TooManyPixels),
        (b"", UnsupportedFormat),
    ],
)
def test_same_problem(decoders: Decoders, upload: bytes, kind: type[Problem]) -> None:
    """A problem has the class and the words that it would have here."""
    with pytest.raises(kind) as here:
        decode(upload, TASK.preprocessing, TASK.max_pixels)
    with pytest.raises(kind) as there:
        decoders.decode(upload)
    assert there.value.detail == here.value.detail


def test_killed_decoder(caplog: pytest.LogCaptureFixture) -> None:
    """An upload whose decoder is killed fails, and the next one finds another decoder."""
    one = Decoder(TASK)
    killed = one.pid
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(DecoderLost):
        one.decode(make_image())
    assert f"decoder {killed} has ended" in caplog.text
    assert one.decode(make_image()).format == "PNG"
    one.close()


def test_killed_nursery() -> None:
    """Decoders outlive the process that forked them, and a new one of those is started."""
    old = Decoder(TASK)
    parent = int(Path(f"/proc/{old.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    while nursery()._process.poll() is None:
        time.sleep(0.01)
    new = Decoder(TASK)
    for one in (old, new):
        assert one.decode(make_image()).format == "PNG"
        one.close()


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
        send(theirs, b"1")  # its process ID
        thread = threading.Thread(target=decoder.serve, args=[theirs])
        thread.start()
        one = Decoder(TASK)
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
