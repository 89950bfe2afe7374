"""What decoding an image may cost, told from its header and structure before it is decoded.

What these do not foresee ends with the decoder's own limits of time and memory (decoder.py).
"""

import io
import re

from PIL import Image, ImageFile

from app.errors import CorruptImage, TooManyPixels

# Four ways for a small file to cost seconds, each bounded at about one second of one core.
# libjpeg goes over the whole picture once per scan, about 1.5 ns a pixel. Encoders write one scan,
# or 3 to 12 progressive ones.
MAX_SCAN_PIXELS = 600_000_000
# Pillow decodes run-length coded BMPs in Python, 0.1 to 0.2 µs a pixel.
MAX_RLE_PIXELS = 4_000_000
# And with two or three reads a run, of which a dithered picture has one for every few pixels.
MAX_RLE_READS = 1_000_000
# It takes 40 ns to decode a pixel of a WebP, several times as long as of any other format.
MAX_WEBP_PIXELS = 16_000_000
# Its parsers walk segments, chunks and blocks in Python, each with a few reads of the file, 1 µs a
# read. A 20 MiB PNG in chunks of 8 KiB, libpng's own size, takes 8,000.
MAX_READS = 100_000
# A marker that begins a segment: neither a stuffed zero, nor fill, nor a restart inside coded data,
# nor a reserved one, which libjpeg passes over in coded data.
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_SCAN = bytes([0xFF, _START_OF_SCAN])
# As many segments as a file may have before its scans are no longer worth counting.
_MAX_SEGMENTS = 10_000


class Upload(io.BytesIO):
    """An upload as a file, whose parser may not ask for ever more."""

    def __init__(self, data: bytes, reads: int = MAX_READS) -> None:
        super().__init__(data)
        self._left = reads

    def read(self, size: int | None = -1, /) -> bytes:
        """Read on.

        Raises:
            CorruptImage: too many reads.
        """
        self._left -= 1
        if self._left < 0:
            raise CorruptImage("The image has too many parts to be read.")
        return super().read(size)


def check_webp_canvas(data: bytes, max_pixels: int) -> None:
    """Refuse a WebP by its canvas (RFC 9649: sections 2.5 and 2.7.1; RFC 6386, section 9.1).

    Opening it would already make room for that canvas, twice.

    Raises:
        TooManyPixels: more than `max_pixels`, or than a WebP may have.
    """
    if data[:4] != b"RIFF" or len(data) < 30:
        return
    kind, start = data[8:16], int.from_bytes(data[20:30], "little")
    if kind == b"WEBPVP8X":
        sides = 1 + (start >> 32 & 0xFFFFFF), 1 + (start >> 56)
    elif kind == b"WEBPVP8L":
        sides = 1 + (start >> 8 & 0x3FFF), 1 + (start >> 22 & 0x3FFF)
    elif kind == b"WEBPVP8 ":
        sides = start >> 48 & 0x3FFF, start >> 64 & 0x3FFF
    else:
        return
    check_pixels(*sides, min(max_pixels, MAX_WEBP_PIXELS))


def check_cost(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Refuse an opened image, `data` its file, that would cost too much to decode.

    Raises:
        TooManyPixels: more than `max_pixels`, or than a WebP may have.
        CorruptImage: too many scans, or too large for its coding.
    """
    pixels = image.width * image.height
    is_webp = image.format == "WEBP"
    check_pixels(
        image.width, image.height, min(max_pixels, MAX_WEBP_PIXELS) if is_webp else max_pixels
    )
    if image.format in ("JPEG", "MPO"):
        check_scans(data, pixels)
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else ()
    if any(tile.codec_name == "bmp_rle" for tile in tiles):
        if pixels > MAX_RLE_PIXELS:
            raise CorruptImage("The BMP is too large to be run-length coded.")
        image.fp = Upload(data, MAX_RLE_READS)  # type: ignore[attr-defined] # an ImageFile has it


def check_scans(data: bytes, pixels: int) -> None:
    """Refuse a JPEG of so many pixels whose scans would cost too much.

    Raises:
        CorruptImage: too many scans, or segments.
    """
    if _scans(data) * pixels > MAX_SCAN_PIXELS:
        raise CorruptImage("The JPEG has too many scans for its size.")


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse a picture of that size.

    Raises:
        TooManyPixels: it has more than `max_pixels`.
    """
    if width * height > max_pixels:
        raise TooManyPixels(
            f"The image has {width} x {height} pixels; at most {max_pixels} are taken here."
        )


def _scans(data: bytes) -> int:
    """Count the scans that libjpeg would decode (ITU-T T.81, annex B), or a few more.

    Any JPEG may have many, not only a progressive one. Thumbnails inside segments and whatever
    follows the picture, such as a phone's video, are no scans of it.
    """
    if data.find(_SCAN) == data.rfind(_SCAN):
        return 1  # as in most photos, and found out in a third of the time
    scans, position = 0, 2
    for _ in range(_MAX_SEGMENTS):
        marker = _JPEG_MARKER.search(data, position)
        if marker is None or marker[1][0] == _END_OF_IMAGE:
            return scans
        scans += marker[1][0] == _START_OF_SCAN
        position = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2]))
    raise CorruptImage("The JPEG has too many segments.")
