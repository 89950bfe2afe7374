"""Decoding in processes of their own: same pictures, same problems; and what if one ends."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from app.decoder import receive, send
from app.decoder_link import DecoderLink
from app.decoders import Decoders, check_decoders
from app.errors import (
    CorruptImage,
    DecoderLost,
    EmptyBody,
    NotReady,
    Problem,
    StartupError,
    TooManyPixels,
    UnsupportedFormat,
)
from app.images import decode
from app.nursery import nursery
from tests.app.test_decoder_link import TASK, png_of_profiles, wait_for_the_end_of
from tests.fakes import make_image
from tests.processes import serving


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


def test_time_is_limited(decoders: Decoders) -> None:
    """What takes longer than any honest picture ends with its decoder: 422, and the next passes."""
    with pytest.raises(CorruptImage, match="too long"):
        decoders.decode(png_of_profiles(20_000))
    assert decoders.decode(make_image()).format == "PNG"


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


def test_decoders_that_hang(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that never answers is a failure; a crash over an image is none, nor a cure."""
    monkeypatch.setattr(DecoderLink, "decode", Mock(side_effect=DecoderLost("gone")))
    monkeypatch.setattr("app.decoders.STUCK_S", 0)
    with pytest.raises(DecoderLost):
        decoders.decode(make_image())
    assert decoders.failures == 1
    monkeypatch.setattr("app.decoders.STUCK_S", 30)
    with pytest.raises(DecoderLost):
        decoders.decode(make_image())
    assert decoders.failures == 1


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


def test_closed_decoders_end(decoders: Decoders) -> None:
    """A decoder ends with its socket, and leaves no process behind."""
    pids = [one.pid for one in decoders._all]
    decoders.close()
    wait_for_the_end_of(pids)


def test_no_process_outlives_the_service(tmp_path: Path) -> None:
    """When the service is killed, all that it started ends."""
    with serving(tmp_path / "log") as server:
        pids = server.pids()
        assert len(pids) > 2
        os.kill(server.process.pid, signal.SIGKILL)
        wait_for_the_end_of(pids[1:])
