"""Sound files that Pillow alone reads otherwise than their formats say."""

import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from app.images import decode
from app.model_card import Preprocessing
from tests.fakes import encode

SIDE = 16
WHOLE = Preprocessing(image_size=SIDE, patch_size=SIDE, crop_fraction=1.0)
INDICES = np.random.default_rng(0).integers(0, 16, (SIDE, SIDE), np.uint8)
COLORS = bytes(np.random.default_rng(1).integers(0, 256, 768, np.uint8))
GREYS = bytes(value for value in range(256) for _ in range(3))


def seen(data: bytes) -> NDArray[np.uint8]:
    """Return the pixels uint8 [row, column, RGB] that a model of this size is fed."""
    return decode(data, WHOLE, 10_000).patches.reshape(SIDE, SIDE, 3)


def indexed(indices: NDArray[np.uint8], palette: bytes) -> Image.Image:
    """Return a picture with a palette."""
    image = Image.frombytes("P", (indices.shape[1], indices.shape[0]), indices.tobytes())
    image.putpalette(palette)
    return image


def bmp(
    rows: bytes, bits: int, palette: bytes = b"", masks: tuple[int, ...] = (), compression: int = 0
) -> bytes:
    """Return a BMP of 16 × 16 pixels, whose rows begin at the top."""
    compression = 3 if masks else compression
    header = struct.pack("<IiiHHIIiiII", 40, SIDE, -SIDE, 1, bits, compression, 0, 0, 0, 0, 0)
    if masks:  # BITMAPV4HEADER: the masks, and what nobody reads
        header = struct.pack("<I", 108) + header[4:] + struct.pack("<4I", *masks) + bytes(52)
    body = header + palette + rows
    return b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, 14 + len(header + palette)) + body


@pytest.mark.parametrize("palette", [bytes(3) + b"\xff" * 3, bytes(3)])
def test_bmp_of_black_and_white(palette: bytes) -> None:
    """A BMP of one byte a pixel, with black and white or black alone, is what its PNG is."""
    mask = indexed(INDICES % (len(palette) // 3), palette)
    assert np.array_equal(seen(encode(mask, "BMP")), seen(encode(mask, "PNG")))


def test_bmp_of_sixteen_greys() -> None:
    """A BMP of four bits a pixel, whose palette is grey, is read by its palette."""
    palette = b"".join(bytes((grey, grey, grey, 0)) for grey in range(16))
    rows = bytes((INDICES[:, ::2] << 4 | INDICES[:, 1::2]).astype(np.uint8))
    assert np.array_equal(seen(bmp(rows, 4, palette)), np.repeat(INDICES[..., None], 3, axis=2))


def test_bmp_of_os2() -> None:
    """The same, from OS/2, whose header is shorter and whose palette has three bytes a color."""
    palette = b"".join(bytes((grey, grey, grey)) for grey in range(16))
    rows = bytes((INDICES[::-1, ::2] << 4 | INDICES[::-1, 1::2]).astype(np.uint8))
    header = struct.pack("<IHHHH", 12, SIDE, SIDE, 1, 4)
    body = header + palette + rows
    data = b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, 14 + len(header + palette)) + body
    assert np.array_equal(seen(data), np.repeat(INDICES[..., None], 3, axis=2))


def test_bmp_in_runs() -> None:
    """A BMP whose pixels are stored in runs, with black and white alone, is what it was."""
    rows = INDICES // 8
    runs = b"".join(b"".join(bytes((1, pixel)) for pixel in row) + b"\0\0" for row in rows)
    palette = bytes(4) + b"\xff\xff\xff\0"
    data = bytearray(bmp(runs + b"\0\1", 8, palette, compression=1))
    data[46:50] = struct.pack("<I", 2)  # colors in the palette
    assert np.array_equal(seen(bytes(data)), np.repeat(rows[..., None] * 255, 3, axis=2))


def test_bmp_of_one_bit_and_many_greys() -> None:
    """A BMP of one bit a pixel whose palette holds 256 greys is read by its palette."""
    bits = INDICES % 2
    rows = b"".join(np.packbits(row).tobytes().ljust(4, b"\0") for row in bits)
    palette = b"".join(bytes((grey, grey, grey, 0)) for grey in range(256))
    data = bytearray(bmp(rows, 1, palette))
    data[46:50] = struct.pack("<I", 256)  # colors in the palette
    assert np.array_equal(seen(bytes(data)), np.repeat(bits[..., None], 3, axis=2))


def test_bmp_of_one_bit() -> None:
    """A BMP of one bit a pixel, black and white, is what it was."""
    mask = Image.fromarray(INDICES % 2 * 255).convert("1")
    assert np.array_equal(seen(encode(mask, "BMP")), seen(encode(mask, "PNG")))


@pytest.mark.parametrize("alpha", [0, 1])
def test_bmp_whose_alpha_is_nothing(alpha: int) -> None:
    """A BMP's alpha that is 0 everywhere is none; one that is 1 somewhere is taken at its word."""
    pixels = np.full((SIDE, SIDE, 4), (10, 20, 30, 0), np.uint8)  # BGRA
    pixels[0, 0, 3] = alpha
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    found = seen(bmp(pixels.tobytes(), 32, masks=masks))
    assert found[8, 8].tolist() == ([255, 255, 255] if alpha else [30, 20, 10])


@pytest.mark.parametrize("transparent", [None, 3])
def test_gif_whose_first_frame_is_a_part(transparent: int | None) -> None:
    """Around a first frame that does not cover the picture it is white, not the first color."""
    more = {} if transparent is None else {"transparency": transparent}
    gif = bytearray(encode(indexed(INDICES[:8, :8], COLORS), "GIF", optimize=False, **more))
    gif[6:10] = struct.pack("<HH", SIDE, SIDE)  # the screen
    frame = gif.index(b"\x2c" + struct.pack("<HHHH", 0, 0, 8, 8))
    gif[frame + 1 : frame + 5] = struct.pack("<HH", 4, 6)
    table = np.frombuffer(COLORS, np.uint8).reshape(256, 3)
    wanted = np.full((SIDE, SIDE, 3), 255, np.uint8)
    wanted[6:14, 4:12] = table[INDICES[:8, :8]]
    if transparent is not None:
        wanted[6:14, 4:12][INDICES[:8, :8] == transparent] = 255
    assert np.array_equal(seen(bytes(gif)), wanted)


@pytest.mark.parametrize("transparent", [None, 3])
def test_gif_whose_frame_is_grey(transparent: int | None) -> None:
    """A frame's own palette counts, even if it is grey and that of the whole file is not."""
    more = {} if transparent is None else {"transparency": transparent}
    gif = encode(indexed(INDICES, COLORS), "GIF", optimize=False, interlace=0, **more)
    frame = gif.index(b"\x2c" + struct.pack("<HHHH", 0, 0, SIDE, SIDE))
    assert not gif[frame + 9] & 0x80, "no palette of its own"
    gif = gif[: frame + 9] + b"\x87" + GREYS + gif[frame + 10 :]
    wanted = np.repeat(INDICES[..., None], 3, axis=2)
    if transparent is not None:
        wanted[transparent == INDICES] = 255
    assert np.array_equal(seen(gif), wanted)
