"""How a data set's pictures are decoded: in how much memory, and what is passed over."""

import errno
import os
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import pytest

from app.model_card import Preprocessing
from model_export import dataset, decoded
from model_export.train import main

from .train_data import MILD, QUICK, picture, write_images

WHOLE = Preprocessing(image_size=16, patch_size=16)


def test_few_files_are_in_memory_at_once(tmp_path: Path) -> None:
    """Of a hundred large pictures a third are held as files, not all of them."""
    for number in range(100):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(0, number) + bytes(2**20))
    tracemalloc.start()
    try:
        pictures, _, skipped = decoded.load(
            dataset.find(tmp_path / "photos"), WHOLE, WHOLE, tmp_path, 2
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(pictures), skipped) == (100, [])
    assert peak < 40 * 2**20


def test_file_that_is_larger_than_any_picture(tmp_path: Path) -> None:
    """A video in a class's folder is skipped unread, by its size."""
    photos = write_images(tmp_path / "photos", 2)
    with (photos / "train" / "red" / "film.mov").open("wb") as file:
        file.truncate(2**28 + 1)  # nothing but a hole
    tracemalloc.start()
    try:
        pictures, _, skipped = decoded.load(dataset.find(photos), WHOLE, WHOLE, tmp_path, 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    reason = "has 268435457 bytes, more than any picture"
    assert skipped == [decoded.Skipped("train/red/film.mov", reason)]
    assert len(pictures) == 6
    assert peak < 40 * 2**20


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_room_for_large_data_is_taken_at_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the disk has no room for the decoded pictures, a line says so before any is decoded."""
    monkeypatch.setattr(decoded, "MEMORY_BYTES", 0)
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(number, "no room")))
    photos = str(write_images(tmp_path / "photos", 2))
    assert main([photos, "-o", str(tmp_path / "run"), *QUICK, *MILD]) == 1
    said = capsys.readouterr().err
    assert "mixer-train: the decoded pictures take 0.0 GB, more than memory may hold" in said
    assert said.count("\n") == 1


def test_room_that_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system or a file system without the call that takes room decodes into a hole."""
    monkeypatch.setattr(decoded, "MEMORY_BYTES", 0)
    listing = dataset.find(write_images(tmp_path / "photos", 2))
    refusal = OSError(errno.EOPNOTSUPP, "Operation not supported")
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=refusal))
    assert len(decoded.load(listing, WHOLE, WHOLE, tmp_path, 1)[0]) == 6
    monkeypatch.delattr(os, "posix_fallocate")
    assert len(decoded.load(listing, WHOLE, WHOLE, tmp_path, 1)[0]) == 6
