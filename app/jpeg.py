"""The usual JPEG past Pillow's reading of files: its header read here, its pixels at one go.

Pillow reads a header for all that may be in it, segment by segment, and then feeds the file to
libjpeg in pieces. For a photo that is a quarter of decoding it, and more where the code is not in
the core's cache. What is not plain here is left to Pillow, and the pixels are the same.
"""

from typing import NamedTuple

from PIL import Image

_EXIF = b"Exif\x00\x00"
_EXIF_ORIENTATION = 0x0112
_MODES = {1: "L", 3: "RGB"}  # by components; four are CMYK, which comes inverted or not
# ITU-T T.81, table B.1: baseline, extended and progressive frames, of Huffman codes all.
_FRAMES = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE = 0xC2
_HUFFMAN_TABLES, _START_OF_SCAN, _APP1, _APP2, _COMMENT = 0xC4, 0xDA, 0xE1, 0xE2, 0xFE
# Quantization tables and restart intervals; application data that changes nothing for us. What is
# left out (a second picture in APP2, say, or an arithmetic coder's tables) is Pillow's to judge.
_PASSED_OVER = frozenset({0xDB, 0xDD, _HUFFMAN_TABLES, _COMMENT, 0xE0, *range(0xE3, 0xF0)})
_ICC = b"ICC_PROFILE\x00"
# Pillow reads these, and refuses shorter ones: JFIF's, a profile's numbers, Adobe's.
_LEAST_BYTES = {0xE0: 14, _APP2: 14, 0xEE: 12}
# A header has some ten segments; one of hundreds is not of the usual kind.
_MAX_SEGMENTS = 64


class Header(NamedTuple):
    """What the header of a JPEG says."""

    width: int  # as stored, before the EXIF turn
    height: int
    components: int
    orientation: int  # EXIF's, 1 if there is none
    has_one_scan: bool  # libjpeg decodes no other, whatever follows

    def scale(self, smallest: tuple[int, int]) -> int:
        """Return the divisor of libjpeg's least scale that is not below `smallest`."""
        room = min(self.width // smallest[0], self.height // smallest[1])
        return next(scale for scale in (8, 4, 2, 1) if scale <= max(room, 1))

    def decode(self, data: bytes, scale: int) -> Image.Image:
        """Return the picture at 1 / `scale`, its last pixels filled up.

        Raises:
            ValueError: the file is cut off or broken.
        """
        size = -(-self.width // scale), -(-self.height // scale)
        mode = _MODES[self.components]
        # Its arguments are those of Pillow's own plugin: no color space but the file's, the scale.
        return Image.frombytes(mode, size, data, "jpeg", mode, "", scale, 0)


def read_header(data: bytes) -> Header | None:
    """Return what a JPEG's header says, or None if anything about it is unusual."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    position, frame, exif = 2, b"", b""
    is_progressive = False
    for _ in range(_MAX_SEGMENTS):
        head = data[position : position + 4]
        if len(head) < 4 or head[0] != 0xFF:
            return None
        marker, end = head[1], position + 2 + int.from_bytes(head[2:])
        body = data[position + 4 : min(end, position + 20)]
        if marker in _FRAMES:
            if frame or len(body) < 6:
                return None
            frame, is_progressive = body, marker == _PROGRESSIVE
        elif marker == _APP1:
            if exif or not body.startswith(_EXIF):
                return None  # XMP may hold a turn, too
            exif = data[position + 4 : end]
        elif marker == _START_OF_SCAN:
            if not frame or not body:
                return None
            return _header(frame, exif, not is_progressive and body[0] == frame[5])
        elif len(body) < _LEAST_BYTES.get(marker, 0) or not (
            marker in _PASSED_OVER or (marker == _APP2 and body.startswith(_ICC))
        ):
            return None
        position = end
    return None


def _header(frame: bytes, exif: bytes, has_one_scan: bool) -> Header | None:
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    if frame[0] != 8 or not width or not height or frame[5] not in _MODES:
        return None
    return Header(width, height, frame[5], _orientation(exif), has_one_scan)


def _orientation(exif: bytes) -> int:
    if not exif:
        return 1
    found = Image.Exif()
    try:
        found.load(exif)
        return int(found.get(_EXIF_ORIENTATION, 1))
    except Exception:  # any parser's error: a picture with broken EXIF still shows
        return 1
