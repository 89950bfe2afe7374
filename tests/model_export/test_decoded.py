"""How a data set's pictures are decoded: in how much memory, and what is passed over."""

import tracemalloc
from pathlib import Path

from app.model_card import Preprocessing
from model_export import dataset, decoded

from .train_data import picture, write_images

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
