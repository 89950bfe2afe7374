"""Where Pillow reads a sound file otherwise than its format says, and how that is put right."""

from PIL import Image, ImageFile, ImagePalette

_BITS_AT = {12: 24}  # by the size of a BMP's second header, where its pixels' bits are said
_USUALLY_AT = 28
_COVERED = "covered"  # in a GIF's `info`
_INDICES = {1: "P;1", 4: "P;4", 8: "P"}  # Pillow's names, by bits


def mend_header(image: ImageFile.ImageFile, data: bytes) -> None:
    """Put right what was read of an image's header, before its pixels are."""
    if image.format == "BMP" and image.mode in ("1", "L"):
        _keep_indices(image, data[_BITS_AT.get(data[14], _USUALLY_AT)])
    elif image.format == "GIF" and image.mode == "L":
        # The frame's own palette is grey: the one that all frames share is not meant.
        image.palette = None


def _keep_indices(image: ImageFile.ImageFile, bits: int) -> None:
    """Have a BMP's pixels read as what they are, indices of so many bits, and not as greys.

    Pillow leaves a palette of greys out, and takes two of them for pixels of one bit.
    """
    if bits == {"1": 1, "L": 8}[image.mode] or bits not in _INDICES:
        return
    greys = (0, 255) if image.mode == "1" else range(1 << bits)
    image._mode = "P"  # there is no public way
    image.palette = ImagePalette.raw("RGB", bytes(grey for grey in greys for _ in range(3)))
    [tile] = image.tile
    assert isinstance(tile.args, tuple)
    image.tile = [tile._replace(args=(_INDICES[bits], *tile.args[1:]))]


def load(image: ImageFile.ImageFile, data: bytes) -> None:
    """Read an image's pixels, and put right what is transparent."""
    covered = image.tile[0].extents if image.format == "GIF" and image.tile else None
    image.load()
    if image.format == "PNG" and "transparency" in image.info:
        image.info["transparency"] = _transparent(image.info["transparency"], *data[24:26])
    elif covered is not None and not image.has_transparency_data:
        image.info[_COVERED] = covered  # around a first frame is nothing, not its first color
    elif image.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        image.putalpha(255)  # nobody has filled it in


def frame_on_paper(image: Image.Image) -> Image.Image | None:
    """Return an opaque first frame that does not cover its picture, RGB on white; else nothing."""
    covered = image.info.get(_COVERED) if image.format == "GIF" else None
    if covered is None or covered == (0, 0, *image.size):
        return None
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image.crop(covered).convert("RGB"), covered[:2])
    return paper


def _transparent(samples: object, depth: int, color: int) -> object:
    """Return which color a PNG has transparent, where Pillow scales the pixels to 8 bits only.

    Of 16 bits the upper 8 are compared, since no others are left. PNG, 11.3.2.1.
    """
    if isinstance(samples, int) and color == 0 and depth in (2, 4):
        return samples % 2**depth * 255 // (2**depth - 1)
    if isinstance(samples, tuple) and depth == 16:
        return tuple(sample >> 8 for sample in samples)
    return samples
