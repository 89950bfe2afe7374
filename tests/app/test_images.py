"""From bytes to patches: the right pixels or the right error."""

import io
import json
import math
import struct
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

from app.errors import CorruptImage, EmptyBody, Problem, TooManyPixels, UnsupportedFormat
from app.geometry import geometry
from app.images import decode, patchify
from app.model_card import Preprocessing
from tests.fakes import encode

PIXELS = 50_000_000


def as_is(side: int) -> Preprocessing:
    """Return preprocessing that leaves a square image of `side` untouched, in one patch."""
    return Preprocessing(
        image_size=side, patch_size=side, crop_fraction=1.0, interpolation="nearest"
    )


def pixels(data: bytes, side: int) -> NDArray[np.int64]:
    """Return the decoded pixels int64 [side, side, 3] of a square file of `side`."""
    return decode(data, as_is(side), PIXELS).patches.reshape(side, side, 3).astype(np.int64)


def scene(width: int, height: int) -> Image.Image:
    """Return a picture without any symmetry."""
    image = Image.new("RGB", (width, height), (30, 60, 90))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 2, height // 3), fill=(250, 200, 10))
    draw.ellipse((width // 3, height // 2, width - 2, height - 2), fill=(10, 220, 120))
    draw.line((0, height, width, 0), fill=(255, 255, 255), width=3)
    return image


def png(side: int, depth: int, color: int, rows: bytes, transparent: bytes) -> bytes:
    """Return a square PNG of these rows of packed samples."""
    width = len(rows) // side
    filtered = b"".join(b"\0" + rows[y * width : (y + 1) * width] for y in range(side))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, 0)),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(filtered)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_patches_are_row_major_with_rgb_innermost() -> None:
    """Patch t holds rows of pixels of grid cell (t // G, t % G), RGB innermost."""
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    patches = patchify(Image.fromarray(image), 4)
    assert patches.shape == (4, 48)
    assert patches.dtype == np.uint8
    assert (patches[0] == image[:4, :4].reshape(-1)).all()
    assert (patches[1] == image[:4, 4:].reshape(-1)).all()
    assert (patches[2] == image[4:, :4].reshape(-1)).all()


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    image_size=st.sampled_from([32, 64, 224, 336]),
    crop=st.sampled_from([0.5, 0.8, 0.875, 0.9, 1.0]),
    resize=st.sampled_from(["crop", "squash"]),
)
def test_box_lies_inside_any_image(
    width: int, height: int, image_size: int, crop: float, resize: str
) -> None:
    """Whatever the size of the image, the sampled box lies inside it and is centred."""
    preprocessing = Preprocessing.model_validate(
        {"image_size": image_size, "patch_size": 16, "resize": resize, "crop_fraction": crop}
    )
    frame = geometry(width, height, preprocessing)
    left, top, right, bottom = frame.box(width, height, image_size)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    # Off the centre by half a target pixel for the rounding, and one for the truncated long side.
    assert abs((left + right) - width) <= 2 * width / frame.scaled[0]
    assert abs((top + bottom) - height) <= 2 * height / frame.scaled[1]
    assert min(frame.scaled) >= image_size


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (97, 97), (641, 480), (40, 500)])
@pytest.mark.parametrize("crop", [0.875, 1.0, 0.9])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_sampling_equals_resize_then_crop(
    size: tuple[int, int], crop: float, interpolation: str
) -> None:
    """Sampling the crop directly gives the pixels of torchvision's Resize and CenterCrop."""
    preprocessing = Preprocessing.model_validate(
        {
            "image_size": 64,
            "patch_size": 64,
            "crop_fraction": crop,
            "interpolation": interpolation,
        }
    )
    image = scene(*size)
    short = int(64 / crop)
    width, height = size
    scaled = (
        (short, int(short * height / width))
        if width <= height
        else (int(short * width / height), short)
    )
    left, top = round((scaled[0] - 64) / 2), round((scaled[1] - 64) / 2)
    resample = Image.Resampling[interpolation.upper()]
    expected = np.asarray(image.resize(scaled, resample).crop((left, top, left + 64, top + 64)))
    found = decode(encode(image), preprocessing, PIXELS).patches.reshape(64, 64, 3)
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 2  # a rounding in the first pass, sharpened by the second
    assert (difference > 1).mean() < 0.001


@given(
    st.integers(1, 150),
    st.integers(1, 300),
    st.integers(8, 96),
    st.sampled_from([0.5, 0.875, 0.99, 1.0]),
    st.sampled_from(["bilinear", "hamming", "bicubic", "lanczos"]),
    st.sampled_from(["crop", "squash"]),
)
@example(65, 85, 64, 1.0, "bicubic", "crop")  # Pillow squeezes what is left the other way first
@example(16, 44, 224, 0.875, "lanczos", "crop")  # samples look beyond the box
@example(500, 571, 224, 0.99, "lanczos", "crop")
def test_hard_edges(
    width: int, height: int, side: int, crop: float, interpolation: str, resize: str
) -> None:
    """Noise in black and white, too, becomes what Pillow makes of it by resizing it whole."""
    preprocessing = Preprocessing.model_validate(
        {
            "image_size": side,
            "patch_size": side,
            "crop_fraction": crop,
            "interpolation": interpolation,
            "resize": resize,
        }
    )
    noise = np.random.default_rng(0).integers(0, 2, (height, width, 3), np.uint8) * 255
    image = Image.fromarray(noise)
    whole = geometry(width, height, preprocessing)
    left, top = whole.offset
    resized = image.resize(whole.scaled, Image.Resampling[interpolation.upper()])
    expected = np.asarray(resized.crop((left, top, left + side, top + side)))
    found = decode(encode(image), preprocessing, PIXELS).patches.reshape(side, side, 3)
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_squash_ignores_the_aspect_ratio() -> None:
    """Squash resizes both sides to the model's, nothing is cropped."""
    preprocessing = Preprocessing(
        image_size=32, patch_size=32, resize="squash", interpolation="bilinear"
    )
    image = scene(90, 50)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).reshape(1, -1)
    assert (decode(encode(image), preprocessing, PIXELS).patches == expected).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_turn(orientation: int, file_format: str) -> None:
    """An image with an EXIF orientation gives the pixels of the picture turned upright."""
    preprocessing = Preprocessing(image_size=32, patch_size=8, interpolation="bilinear")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(scene(200, 90), file_format, exif=exif)
    picture = decode(data, preprocessing, PIXELS, draft=False)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    expected = decode(encode(upright), preprocessing, PIXELS)
    assert (picture.width, picture.height) == (200, 90)
    assert (picture.patches == expected.patches).all()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("size", [(500, 500), (497, 503), (700, 500), (1600, 900), (250, 499)])
def test_draft_samples_the_same_place(size: tuple[int, int], turn: int) -> None:
    """A JPEG decoded at a part of its size looks as it does at full size, however it is turned."""
    preprocessing = Preprocessing(
        image_size=32, patch_size=8, crop_fraction=1.0, interpolation="bicubic"
    )
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    waves = np.stack((np.sin(x / 40) * 100 + 128, np.cos(y / 55) * 100 + 128, (x + y) / 10), -1)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(Image.fromarray(waves.astype(np.uint8)), "JPEG", exif=exif, quality=95)
    drafted = decode(data, preprocessing, PIXELS).patches.astype(int)
    plain = decode(data, preprocessing, PIXELS, draft=False).patches.astype(int)
    assert np.abs(drafted - plain).mean() < 1  # 3 where the part of a last pixel counts as a whole


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize("size", [(256, 256), (280, 700), (700, 280), (400, 400)])
def test_draft_keeps_fine_detail(size: tuple[int, int], mode: str) -> None:
    """A JPEG decoded at a part of its size leaves the resize at least half of the way down."""
    preprocessing = Preprocessing(image_size=32, patch_size=8, crop_fraction=1.0)
    grain = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    grainy = Image.fromarray(grain).resize(size, Image.Resampling.BICUBIC).convert(mode)
    data = encode(grainy, "JPEG", quality=95)
    drafted = decode(data, preprocessing, PIXELS).patches.astype(int)
    plain = decode(data, preprocessing, PIXELS, draft=False).patches.astype(int)
    assert 0 < np.abs(drafted - plain).mean() < 2  # 3 to 9 where libjpeg goes all the way


@pytest.mark.parametrize("size", [(300, 500), (300, 610), (300, 615), (300, 1100), (600, 1300)])
def test_hard_edges_of_tall_pictures(size: tuple[int, int]) -> None:
    """Black and white overshoot as in a whole resize, which squeezes a tall picture otherwise."""
    preprocessing = Preprocessing(image_size=224, patch_size=16, interpolation="bicubic")
    noise = np.random.default_rng(0).integers(0, 2, (*size[::-1], 1)) * 255
    image = Image.fromarray(noise.astype(np.uint8).repeat(3, axis=2))
    found = geometry(*size, preprocessing)
    left, top = found.offset
    whole = image.resize(found.scaled, Image.Resampling.BICUBIC)
    expected = patchify(whole.crop((left, top, left + 224, top + 224)), 16)
    patches = decode(encode(image), preprocessing, PIXELS).patches
    assert np.abs(patches.astype(int) - expected.astype(int)).max() <= 2


class TestModes:
    """Every mode becomes sensible RGB."""

    def test_grey(self) -> None:
        """Grey is the same value in all three channels."""
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
        assert (pixels(encode(ramp), 16) == np.asarray(ramp)[:, :, None]).all()

    def test_sixteen_bit_grey_is_scaled(self) -> None:
        """16-bit grey is scaled to 8 bits, not clipped to white."""
        ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
        found = pixels(encode(Image.fromarray(ramp)), 16)
        assert (found == np.round(ramp / 257)[:, :, None]).all()

    def test_sixteen_bit_grey_with_transparency(self) -> None:
        """The one value of 16-bit grey that a PNG calls transparent shows white."""
        ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
        found = pixels(encode(Image.fromarray(ramp), transparency=5 * 257), 16)
        expected = np.where(ramp == 5 * 257, 255, ramp // 257)
        assert (found == expected[:, :, None]).all()

    @pytest.mark.parametrize("depth", [1, 2, 4, 8])
    def test_few_bits_of_grey_with_transparency(self, depth: int) -> None:
        """The transparent value of a PNG is meant in the depth of its samples."""
        levels = 2**depth
        samples = np.arange(256).reshape(16, 16) % levels
        bits = (samples[:, :, None] >> np.arange(depth)[::-1]) & 1  # [row, column, bit]
        rows = np.packbits(bits.reshape(16, -1).astype(np.uint8), axis=1)
        for transparent in {0, 1, levels // 2, levels - 1}:
            data = png(16, depth, 0, rows.tobytes(), struct.pack(">H", transparent))
            expected = np.where(samples == transparent, 255, samples * 255 // (levels - 1))
            assert (pixels(data, 16) == expected[:, :, None]).all(), transparent

    def test_sixteen_bits_of_color_with_transparency(self) -> None:
        """Of the transparent color of 16 bits the upper eight count."""
        ramp = np.arange(256).reshape(16, 16)
        rows = np.stack([ramp * 256 + 7] * 3, axis=2).astype(">u2")
        transparent = struct.pack(">HHH", *[9 * 256 + 7] * 3)
        found = pixels(png(16, 16, 2, rows.tobytes(), transparent), 16)
        assert (found == np.where(ramp == 9, 255, ramp)[:, :, None]).all()

    def test_a_text_of_that_name(self) -> None:
        """A PNG's text that is named as Pillow names the transparent value says nothing of it."""
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
        texts = PngInfo()
        texts.add_text("transparency", "5")
        grey = Image.fromarray(ramp)
        for image in (
            grey,
            grey.convert("RGB"),
            grey.convert("P"),
            Image.fromarray(ramp * np.uint16(257)),
        ):
            found = pixels(encode(image, pnginfo=texts), 16)
            assert (found == ramp[:, :, None]).all(), image.mode

    def test_one_bit(self) -> None:
        """1-bit images are black and white, not black and nearly black."""
        checks = Image.fromarray((np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8))
        found = pixels(encode(checks.convert("1")), 16)
        assert (found == np.asarray(checks)[:, :, None]).all()

    def test_alpha_shows_white(self) -> None:
        """What is transparent shows white, half of it half."""
        image = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
        image.paste((200, 0, 0, 255), (0, 0, 8, 16))
        image.paste((200, 0, 0, 128), (8, 8, 16, 16))
        found = pixels(encode(image), 16)
        assert (found[0, 0] == (200, 0, 0)).all()
        assert (found[0, 15] == (255, 255, 255)).all()
        assert np.abs(found[15, 15] - (227, 127, 127)).max() <= 1

    def test_grey_with_alpha(self) -> None:
        """LA images are composed over white as well."""
        found = pixels(encode(Image.new("LA", (16, 16), (0, 0))), 16)
        assert (found == 255).all()

    def test_palette_with_transparency(self) -> None:
        """A palette's transparent entry shows white, the others their color."""
        image = Image.new("P", (16, 16), 0)
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.paste(1, (0, 0, 8, 16))
        for data in (encode(image, "PNG", transparency=0), encode(image, "GIF", transparency=0)):
            found = pixels(data, 16)
            assert (found[0, 0] == (200, 100, 50)).all()
            assert (found[0, 15] == 255).all()

    def test_cmyk(self) -> None:
        """A CMYK JPEG shows its colors."""
        data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
        assert np.abs(pixels(data, 16) - (255, 0, 0)).max() <= 6

    @pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
    def test_first_frame(self, file_format: str) -> None:
        """Of an animation the first frame counts."""
        frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
        options: dict[str, object] = {"lossless": True} if file_format == "WEBP" else {}
        data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert (pixels(data, 16) == (255, 0, 0)).all()


def test_phone_photo_with_a_second_picture_is_a_jpeg() -> None:
    """A multi-picture JPEG (MPO) counts as the JPEG that its owner sees."""
    image = scene(64, 64)
    data = encode(image, "MPO", save_all=True, append_images=[image])
    assert decode(data, as_is(64), PIXELS).format == "JPEG"


def test_broken_exif_does_not_matter() -> None:
    """A picture whose EXIF is garbage is decoded as it lies."""
    data = encode(scene(16, 16), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01")
    assert decode(data, as_is(16), PIXELS).width == 16


def test_pixels_of_a_webp_are_bounded() -> None:
    """A WebP without a header for its canvas may have 16 million pixels, as one with it."""
    data = bytearray(encode(Image.new("RGB", (16, 16)), "WEBP"))
    assert data[12:16] == b"VP8 "
    data[26:30] = struct.pack("<HH", 4001, 4001)  # RFC 6386, section 9.1
    with pytest.raises(TooManyPixels):
        decode(bytes(data), as_is(16), PIXELS)


def test_scans_are_bounded() -> None:
    """A JPEG with too many scans for its size is refused before it is decoded."""
    data = encode(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    decode(data, as_is(32), PIXELS)
    with pytest.raises(CorruptImage, match="too many scans"):
        decode(data[:-2] + scan * 1000 + data[-2:], as_is(32), PIXELS)


@pytest.mark.parametrize("draft", [True, False])
def test_scans_after_a_whole_one_cost_nothing(draft: bool) -> None:
    """Behind a scan of all components libjpeg decodes no other: such a file is broken, at once."""
    data = encode(Image.new("RGB", (2000, 2000)), "JPEG")
    scan = data[data.rindex(b"\xff\xda") : -2]
    decode(data, as_is(32), PIXELS)
    start = time.process_time()
    with pytest.raises(CorruptImage):
        decode(data[:-2] + scan * 1000 + data[-2:], as_is(32), PIXELS, draft=draft)
    assert time.process_time() - start < 1


def test_what_only_looks_like_a_scan_does_not_count() -> None:
    """A thumbnail inside a JPEG's segment and a video behind it are no scans of the picture."""
    data = encode(Image.new("RGB", (2000, 2000)), "JPEG", comment=b"\xff\xda" * 1000)
    decode(data + b"\xff\xda" * 1000, as_is(32), PIXELS)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF"])
def test_parts_are_bounded(file_format: str) -> None:
    """A file of millions of tiny segments, chunks or blocks is refused after a while."""
    data = encode(Image.new("P" if file_format == "GIF" else "RGB", (8, 8)), file_format)
    part, place = {
        "JPEG": (b"\xff\xfe\x00\x02", 2),
        "PNG": (struct.pack(">I4sI", 0, b"zzZz", zlib.crc32(b"zzZz")), 33),
        "GIF": (b"\x21\xfe\x01a\x00", data.find(b",", 13)),
    }[file_format]
    decode(data[:place] + part * 100 + data[place:], as_is(8), PIXELS)
    with pytest.raises(CorruptImage, match="too many parts"):
        decode(data[:place] + part * 400_000 + data[place:], as_is(8), PIXELS)


def run_length_bmp(side: int) -> bytes:
    """Return a run-length coded BMP of `side`², all of it one color."""
    palette = bytes(4 * 256)
    rows = (b"\xff\x00" * (side // 255) + bytes([side % 255, 0]) + b"\x00\x00") * side
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0)
    offset = 14 + len(info) + len(palette)
    head = b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset)
    return head + info + palette + rows


def test_run_length_coded_bmp_is_bounded() -> None:
    """A run-length coded BMP, which Pillow decodes in Python, may have 4 million pixels."""
    assert decode(run_length_bmp(1990), as_is(32), PIXELS).width == 1990
    with pytest.raises(CorruptImage, match="run-length"):
        decode(run_length_bmp(2010), as_is(32), PIXELS)


def test_run_length_coded_bmp_of_short_runs() -> None:
    """Of a dithered picture a run-length coded BMP has a run for each pixel; endless runs end."""
    data = run_length_bmp(640)
    rows = (b"\x01\x00" * 640 + b"\x00\x00") * 640
    offset = 14 + 40 + 4 * 256
    assert decode(data[:offset] + rows, as_is(32), PIXELS).width == 640
    with pytest.raises(CorruptImage, match="too many parts"):
        decode(data[:offset] + b"\x00\x00" * 3_000_000, as_is(32), PIXELS)


@given(st.binary(max_size=300))
def test_random_bytes_are_a_problem(data: bytes) -> None:
    """Random bytes are refused as a foreign format or a corrupt image, never otherwise."""
    with pytest.raises((UnsupportedFormat, CorruptImage) if data else EmptyBody):
        decode(data, as_is(16), PIXELS)


@given(
    file_format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]),
    position=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
)
def test_mutations_are_pictures_or_problems(file_format: str, position: float, value: int) -> None:
    """One changed byte of a file gives a picture or a problem, nothing else."""
    data = bytearray(encode(scene(24, 24), file_format))
    data[int(position * len(data))] = value
    try:
        picture = decode(bytes(data), as_is(16), PIXELS)
    except Problem:
        return
    assert picture.patches.shape == (1, 16 * 16 * 3)


def test_declared_size_is_checked_before_decoding() -> None:
    """A tiny file that declares a huge picture is refused by its header."""
    header = struct.pack(">IIBBBBB", 65535, 65535, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header
    chunk += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4
    with pytest.raises(TooManyPixels, match="65535 x 65535"):
        decode(data, as_is(16), PIXELS)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_frame_that_outgrows_its_screen() -> None:
    """A GIF is as large as its first frame, if that is larger than the header says."""
    data = bytearray(encode(Image.new("P", (40, 30)), "GIF"))
    data[6:10] = struct.pack("<HH", 1, 1)
    assert decode(bytes(data), as_is(16), 40 * 30).width == 40
    with pytest.raises(TooManyPixels):
        decode(bytes(data), as_is(16), 40 * 30 - 1)


def test_pngsuite(shared: Path) -> None:
    """The pictures of PngSuite give their reference pixels over white."""
    compared = 0
    for name, data, reference in _pngsuite(shared / "data" / "hostile-images.tar.xz"):
        side = math.isqrt(len(reference) // 4)
        values = np.array(reference, np.float64).reshape(side, side, 4)
        top = 65535 if values.max() > 255 else 255
        alpha = values[:, :, 3:] / top
        expected = alpha * values[:, :, :3] / top * 255 + (1 - alpha) * 255
        difference = np.abs(pixels(data, side) - expected).max()
        assert difference <= 1.01, (name, difference)
        compared += 1
    assert compared >= 12


def _pngsuite(archive: Path) -> Iterator[tuple[str, bytes, list[int]]]:
    """Yield name, file and reference (RGBA, row by row) of each square picture."""
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as members:
        for member in members:
            stream = members.extractfile(member) if "/pngsuite/" in f"/{member.name}" else None
            if stream is not None:
                found[Path(member.name).name] = stream.read()
    for name, data in found.items():
        reference = found.get(name.removesuffix(".png") + ".json")
        if name.endswith(".png") and reference is not None and name != "cdhn2c08.png":
            yield name, data, json.loads(reference)


def test_large_profile_of_a_png() -> None:
    """A PNG whose profile unpacks to 3 MiB is a picture as any other, as a JPEG's is."""
    profile = np.random.default_rng(0).bytes(3 * 2**20)
    picture = Image.new("RGB", (16, 16), (200, 0, 0))
    for file_format in ("PNG", "JPEG"):
        upload = encode(picture, file_format, icc_profile=profile)
        assert decode(upload, as_is(16), PIXELS).format == file_format
    with pytest.raises(CorruptImage, match="too large"):
        decode(encode(picture, "PNG", icc_profile=bytes(9 * 2**20)), as_is(16), PIXELS)
