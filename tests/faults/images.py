"""Images made to hurt: mutations of a corpus, bombs, and files that cost more than they weigh."""

import io
import random
import struct
import zlib
from collections.abc import Sequence

from PIL import Image

from tests.fakes import encode

HUGE = 65535


class Mutations(Sequence[bytes]):
    """The files of a corpus, then `count` mutations of them; the same for the same seed."""

    def __init__(self, corpus: Sequence[bytes], count: int, seed: int = 8) -> None:
        self._corpus = corpus
        self._small = [data for data in corpus if 8 <= len(data) <= 100_000]
        self._count = count
        self._seed = seed

    def __len__(self) -> int:
        """Return how many files there are."""
        return len(self._corpus) + self._count

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override] # no slices
        """Return one file, made on the spot."""
        if index < len(self._corpus):
            return self._corpus[index]
        chance = random.Random(f"{self._seed}:{index}")
        data = bytearray(chance.choice(self._small))
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            _mutate(data, chance, self._small)
        return bytes(data) or b"\0"


def _mutate(data: bytearray, chance: random.Random, corpus: Sequence[bytes]) -> None:
    place = chance.randrange(len(data) + 1) if chance.random() < 0.5 else chance.randrange(64)
    kind = chance.randrange(7)
    if kind == 0:
        data[place : place + 1] = chance.randbytes(1)
    elif kind == 1:
        data[place : place + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff"))
    elif kind == 2:
        data[place : place + 2] = struct.pack(">H", chance.choice((1, 7000, 7071, HUGE)))
    elif kind == 3:
        data[place : place + 4] = struct.pack("<I", chance.choice((1, 7000, 50_000_000, HUGE)))
    elif kind == 4:
        del data[place:]
    elif kind == 5:
        data[place:place] = data[place : place + 500] * chance.choice((1, 2, 50))
    else:
        other = chance.choice(corpus)
        cut = chance.randrange(len(other))
        data[place:] = other[cut : cut + 50_000]


def bombs() -> dict[str, bytes]:
    """Return small files whose headers declare 65,535 × 65,535 pixels, or as many as can be."""
    picture = Image.new("RGB", (16, 16), "red")
    png = bytearray(encode(picture))
    png[16:24] = struct.pack(">II", HUGE, HUGE)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    gif = bytearray(encode(picture.convert("P"), "GIF"))
    gif[6:10] = struct.pack("<HH", HUGE, HUGE)
    # A frame larger than the picture, to be cleared when it has been shown: Pillow makes the clear
    # one as it opens the file.
    frames = bytearray(encode(picture.convert("P"), "GIF", disposal=2))
    place = frames.index(b"\x2c\0\0\0\0")
    frames[place + 5 : place + 9] = struct.pack("<HH", HUGE, HUGE)
    jpeg = bytearray(encode(picture, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", HUGE, HUGE)
    bmp = bytearray(encode(picture, "BMP"))
    bmp[18:26] = struct.pack("<ii", HUGE, HUGE)
    # WebP's own limits: 2^24 a side of the canvas in VP8X, 2^14 without it.
    size = (HUGE - 1).to_bytes(3, "little")
    inner = encode(picture, "WEBP", lossless=True)[12:]
    webp = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size * 2 + inner
    webp = b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp
    lossless = bytearray(encode(picture, "WEBP", lossless=True))
    lossless[21:25] = bytes([*b"\xff" * 3, lossless[24] | 0x0F])
    lossy = bytearray(encode(picture, "WEBP"))
    lossy[26:30] = struct.pack("<HH", 2**14 - 1, 2**14 - 1)
    return {
        "WebP, lossless": bytes(lossless),
        "WebP, lossy": bytes(lossy),
        "PNG": bytes(png),
        "GIF": bytes(gif),
        "GIF's frame": bytes(frames),
        "JPEG": bytes(jpeg),
        "BMP": bytes(bmp),
        "WebP": webp,
    }


def scans(side: int, count: int, progressive: bool = True) -> bytes:
    """Return a JPEG of `side`² with `count` more scans than it needs."""
    data = encode(Image.new("RGB", (side, side)), "JPEG", progressive=progressive)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * count + data[-2:]


def costly(upload_bytes: int) -> dict[str, bytes]:
    """Return files within all limits, or just beyond, that cost the most to decode."""
    png, jpeg = encode(Image.new("RGB", (8, 8))), encode(Image.new("RGB", (8, 8)), "JPEG")
    chunk = struct.pack(">I4sI", 0, b"zzZz", zlib.crc32(b"zzZz"))
    gif = encode(Image.new("P", (8, 8)), "GIF")
    image = gif.index(b"\x2c", 13) if b"\x2c" in gif[13:] else 13
    room = upload_bytes - 4096
    files = {
        "PNG of tiny chunks": png[:33] + chunk * (room // len(chunk)) + png[33:],
        "JPEG of tiny segments": jpeg[:2] + b"\xff\xfe\0\2" * (room // 4) + jpeg[2:],
        "GIF of tiny blocks": gif[:image] + b"\x21\xfe\1a\0" * (room // 5) + gif[image:],
        "BMP of tiny runs": _run_length_bmp(1990, b"\x01\x05" * (room // 2)),
        "BMP of empty lines": _run_length_bmp(1990, b"\x01\x05\0\0" * 1990),
        "JPEG of 1,000 scans": scans(2000, 1000),
        "JPEG of as many scans as may be": scans(774, 990),
        "sequential JPEG of 1,000 scans": scans(1000, 1000, progressive=False),
    }
    profile = b"k\0\0" + zlib.compress(bytes(1_000_000))
    files["PNG of many color profiles"] = (
        png[:33] + _chunk(b"iCCP", profile) * (room // (len(profile) + 12)) + png[33:]
    )
    exif = b"Exif\0\0" + b"I" * 600
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    files["JPEG of many EXIF segments"] = jpeg[:2] + segment * (room // len(segment)) + jpeg[2:]
    # One EXIF entry, an orientation of two million fractions.
    tiff = b"II" + struct.pack("<HIHHHIII", 42, 8, 1, 0x0112, 5, (room - 64) // 8, 26, 0)
    files["PNG of a long orientation"] = (
        png[:33] + _chunk(b"eXIf", tiff + bytes(range(1, 9)) * ((room - 64) // 8)) + png[33:]
    )
    files["PNG of 1 x 50,000,000"] = encode(Image.new("1", (1, 50_000_000)), "PNG")
    for name, side, options in (
        ("PNG", 7071, {"compress_level": 1}),
        ("WEBP", 4000, {"lossless": True, "quality": 0, "method": 0}),
    ):
        large = Image.new("RGBA", (side, side), (200, 10, 30, 128))
        files[f"{name} of {side} x {side}"] = encode(large, name, **options)
    return files


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _run_length_bmp(side: int, runs: bytes) -> bytes:
    palette = bytes(range(256)) * 4
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    offset = 14 + len(info) + len(palette)
    buffer = io.BytesIO()
    buffer.write(b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset))
    buffer.write(info + palette + runs)
    return buffer.getvalue()
