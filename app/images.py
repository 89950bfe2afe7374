"""From the bytes of an upload to patches: header check, decode, EXIF turn, resize, crop, patchify.

Pure functions without I/O; the service runs them in decoders, processes of their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from app import quirks
from app.cost import Upload, check_cost, check_pixels, check_scans, check_webp_canvas
from app.errors import CorruptImage, EmptyBody, Problem, TooManyPixels, UnsupportedFormat
from app.geometry import SIDEWAYS, Box, Geometry, frame_of, geometry
from app.jpeg import read_header
from app.model_card import Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Signatures tell a corrupt file of an allowed format (422) from a foreign format (415).
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM")
_EXIF_ORIENTATION = 0x0112
# EXIF 2.32, tag 0x0112: the turn that shows the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How much larger than the resize libjpeg leaves a photo: the gap of Pillow's own thumbnails. At 1/8
# it averages squares of pixels, and where the resize has nothing left to do, that is what is seen.
_MARGIN = 2
# What a PNG's profile or text may unpack to. Pillow's own limit of 1 MiB refuses sound pictures
# whose profile is a large table, as monitors' and printers' are.
PngImagePlugin.MAX_TEXT_CHUNK = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Picture:
    """One decoded upload."""

    format: str
    width: int  # as stored, before the EXIF turn
    height: int
    patches: NDArray[np.uint8]  # [tokens, P·P·3]


def decode(
    data: bytes, preprocessing: Preprocessing, max_pixels: int, *, draft: bool = True
) -> Picture:
    """Decode an upload into patches exactly as the model card says.

    `draft` lets libjpeg decode a large JPEG at 1/2, 1/4 or 1/8 scale, never below twice the resize.

    Raises:
        EmptyBody: there is nothing to decode.
        UnsupportedFormat: not JPEG, PNG, WebP, GIF or BMP.
        TooManyPixels: the header declares more than `max_pixels`; nothing was decoded.
        CorruptImage: the header or the content cannot be decoded, or costs too much to decode.
    """
    if not data:
        raise EmptyBody("The image is empty.")
    with _pillow_errors_as_problems(data, max_pixels):
        header = read_header(data) if draft else None
        if header is not None:
            check_pixels(header.width, header.height, max_pixels)
            if not header.has_one_scan:
                check_scans(data, header.width * header.height)
            file_format, turn = "JPEG", header.orientation
            width, height = header.width, header.height
            scale = header.scale(_smallest(width, height, turn, preprocessing))
            image, extent = header.decode(data, scale), (width / scale, height / scale)
        else:
            image = _open(data, max_pixels)
            # A photo with a second picture inside (MPO) is to its owner a JPEG.
            file_format = "JPEG" if image.format == "MPO" else str(image.format)
            width, height = image.size
            turn = _orientation(image)
            extent = (float(width), float(height))
            if draft and file_format == "JPEG":
                drafted = image.draft("RGB", _smallest(width, height, turn, preprocessing))
                if drafted is not None:
                    extent = drafted[1][2:]
        upright = _to_rgb(image)
        if turn in _UPRIGHT:
            upright = upright.transpose(_UPRIGHT[turn])
        frame = frame_of(upright.size, extent, turn)
        crop = geometry(*((height, width) if turn in SIDEWAYS else (width, height)), preprocessing)
        square = _sample(upright, frame, crop, preprocessing)
    return Picture(file_format, width, height, patchify(square, preprocessing.patch_size))


def patchify(image: Image.Image, patch_size: int) -> NDArray[np.uint8]:
    """Cut a square RGB image into patches, uint8 [tokens, P·P·3].

    Patches are row-major; inside a patch row, column, RGB (the order of Google's stem kernel).
    """
    pixels = np.asarray(image)  # [H, W, 3]
    grid = pixels.shape[0] // patch_size
    cut = pixels.reshape(grid, patch_size, grid, patch_size, 3)  # [row, y, column, x, 3]
    return cut.transpose(0, 2, 1, 3, 4).reshape(grid * grid, -1)  # [tokens, P·P·3]


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Return a file as Pillow opens it, once it is known what decoding it may cost."""
    # Pillow's own limit tells less than check_cost does; but what a GIF's first frame leaves behind
    # is allocated as the file is opened, and a frame may be larger than the header says. Pillow
    # raises above twice its limit, and only warns below.
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2 if data.startswith(b"GIF") else None
    check_webp_canvas(data, max_pixels)
    image = Image.open(Upload(data), formats=FORMATS)
    check_cost(image, data, max_pixels)  # before draft(), which rewrites the size
    quirks.mend_header(image, data)
    if image.format not in ("JPEG", "MPO"):
        quirks.load(image, data)  # PNG may hold its orientation after the pixels
    return image


def _smallest(width: int, height: int, turn: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the size, as stored, below which libjpeg must not scale."""
    shown = (height, width) if turn in SIDEWAYS else (width, height)
    across, down = (_MARGIN * length for length in geometry(*shown, preprocessing).scaled)
    return (down, across) if turn in SIDEWAYS else (across, down)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # any parser's error: a picture with broken EXIF still shows
        return 1


def _sample(
    image: Image.Image, frame: Box, crop: Geometry, preprocessing: Preprocessing
) -> Image.Image:
    """Crop and resize: only what the model sees of the picture in `frame` is sampled.

    One direction after the other, in the order in which Pillow would resize the whole picture, as
    torchvision has it do: a bicubic's overshoot is clipped in between.
    """
    side, kernel = preprocessing.image_size, Image.Resampling[preprocessing.interpolation.upper()]
    width, height = frame[2] - frame[0], frame[3] - frame[1]
    box = crop.box(width, height, side)
    left, right = frame[0] + box[0], frame[0] + box[2]
    top, bottom = frame[1] + box[1], frame[1] + box[3]
    if 0 < height - crop.scaled[1] > 2 * (width - crop.scaled[0]):
        first, last = _reached(left, right, side, image.width)
        if last - first < image.width:  # a crop is a copy
            image = image.crop((first, 0, last, image.height))
        flat = image.resize((image.width, side), kernel, box=(0, top, image.width, bottom))
        return flat.resize((side, side), kernel, box=(left - first, 0, right - first, side))
    first, last = _reached(top, bottom, side, image.height)
    if last - first < image.height:
        image = image.crop((0, first, image.width, last))
    slim = image.resize((side, image.height), kernel, box=(left, 0, right, image.height))
    return slim.resize((side, side), kernel, box=(0, top - first, side, bottom - first))


def _reached(start: float, end: float, side: int, length: int) -> tuple[int, int]:
    """Return from where to where `side` samples between `start` and `end` look."""
    reach = 3 * max(1.0, (end - start) / side) + 1  # Lanczos, the widest, looks 3 samples around
    return max(0, int(start - reach)), min(length, int(end + reach) + 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return any mode as RGB; whatever is transparent shows white."""
    if isinstance(image.info.get("transparency"), str):  # a PNG's text that happens to be named so
        del image.info["transparency"]
    if (paper := quirks.frame_on_paper(image)) is not None:
        return paper
    if image.mode.startswith("I"):
        return _eight_bit(image).convert("RGB")
    if image.has_transparency_data:
        # Whatever can be had without another copy of a large picture is.
        colored = image if image.mode == "RGBA" else image.convert("RGBA")
        paper = Image.new("RGB", image.size, "white")
        paper.paste(colored, mask=colored)
        return paper
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip all above 255 to white."""
    table = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # rounded: 65535 is 255 · 257
    transparent = image.info.get("transparency")
    if transparent is not None:
        table[transparent] = 255
    grey = np.asarray(image)  # [H, W]
    scaled = np.empty(grey.shape, np.uint8)
    for row in range(0, len(grey), 64):  # a large picture has no room for copies
        scaled[row : row + 64] = table.take(grey[row : row + 64], mode="clip")
    return Image.fromarray(scaled)


@contextmanager
def _pillow_errors_as_problems(data: bytes, max_pixels: int) -> Iterator[None]:
    try:
        yield
    except Problem:
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(
            f"The image has more than the {max_pixels} pixels taken here."
        ) from error
    except UnidentifiedImageError as error:
        if data.startswith(_SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
            raise CorruptImage("The image's header cannot be read.") from error
        raise UnsupportedFormat("The upload is not a JPEG, PNG, WebP, GIF or BMP image.") from error
    except MemoryError as error:
        raise CorruptImage("The image takes more memory to decode than it may.") from error
    except Exception as error:
        # Pillow's plugins let through whatever their parsers ran into (struct.error, IndexError,
        # SyntaxError, zlib.error and more), and a hostile file finds the next one: none is ours.
        raise CorruptImage(f"The image cannot be decoded: {str(error)[:200]}") from error
