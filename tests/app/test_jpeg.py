"""A JPEG past Pillow's reading of files: the same patches, or the same problem."""

import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app import images
from app.errors import Problem
from app.images import decode
from app.jpeg import read_header
from app.model_card import Preprocessing
from tests.app.test_images import PIXELS, as_is, scene
from tests.fakes import encode

# Pillow's words on odd metadata, which a decoder does not show either.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def _turned(turn: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def _with_second_exif(whole: bytes) -> bytes:
    """Return a JPEG that says before its own EXIF that it is to be turned by 180 degrees."""
    segment = _turned(3).tobytes()
    return whole[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + whole[2:]


JPEGS = (
    encode(scene(70, 50), "JPEG"),
    encode(scene(50, 70), "JPEG", progressive=True, exif=_turned()),
    encode(scene(33, 65).convert("L"), "JPEG", comment=b"some words"),
    encode(scene(40, 40), "JPEG", quality=100, subsampling=0, icc_profile=b"x" * 200),
    encode(scene(64, 64).convert("CMYK"), "JPEG"),
    encode(scene(60, 40), "JPEG", xmp=b'<x:xmpmeta tiff:Orientation="6"/>'),
    _with_second_exif(encode(scene(40, 60), "JPEG", exif=_turned())),
)


@pytest.mark.parametrize("whole", JPEGS)
def test_each_kind(whole: bytes) -> None:
    """Grey, turned by EXIF, two or XMP, progressive, CMYK: Pillow's own reading gives the same."""
    _same_both_ways(whole, as_is(16))


@pytest.mark.parametrize(
    "segment",
    [
        b"\xe0JFIF",
        b"\xe0JFIF\0\1\1",
        b"\xe2ICC_PROFILE\0",
        b"\xe2ICC_PROFILE\0\1",
        b"\xeeAdobe",
        b"\xee",
    ],
)
def test_short_segments(segment: bytes) -> None:
    """Application data that Pillow finds too short is as corrupt past its reading."""
    size = (len(segment) + 1).to_bytes(2, "big")
    plain = JPEGS[0]
    _same_both_ways(plain[:2] + b"\xff" + segment[:1] + size + segment[1:] + plain[2:], as_is(16))


@given(
    whole=st.sampled_from(JPEGS),
    edits=st.lists(st.tuples(st.integers(0, 800), st.binary(max_size=3), st.integers(0, 3))),
)
def test_past_pillows_reading_of_files(whole: bytes, edits: list[tuple[int, bytes, int]]) -> None:
    """Whatever was done to a JPEG, Pillow's own reading of it gives the same patches or problem."""
    data = bytearray(whole)
    for place, new, removed in edits:
        data[place : place + removed] = new
    _same_both_ways(bytes(data), as_is(16))


def test_real_photos_past_pillows_reading_of_files(shared: Path) -> None:
    """So it is for real photos and for every file of the hostile corpus."""
    taken = 0
    for archive in ("photos.tar", "hostile-images.tar.xz"):
        with tarfile.open(shared / "data" / archive) as files:
            for member in files:
                file = files.extractfile(member) if member.isfile() else None
                data = file.read() if file is not None else b""
                if data.startswith(b"\xff\xd8") and len(data) < 300_000:
                    taken += read_header(data) is not None
                    _same_both_ways(data, as_is(32))
    assert taken > 250  # photos nearly all, of the corpus some


def _same_both_ways(data: bytes, preprocessing: Preprocessing) -> None:
    found: list[tuple[object, ...]] = []
    for reader in (read_header, lambda _: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(images, "read_header", reader)
            try:
                picture = decode(data, preprocessing, PIXELS)
            except Problem as problem:
                found.append((type(problem).__name__,))
            else:
                shape = picture.format, picture.width, picture.height
                found.append((*shape, picture.patches.tobytes()))
    assert found[0] == found[1]
