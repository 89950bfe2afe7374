"""Where an image is sampled: the resize and crop of the model card, and the picture's own edges."""

from dataclasses import dataclass

from app.model_card import Preprocessing

# EXIF's turns (tag 0x0112) that swap width and height.
SIDEWAYS = (5, 6, 7, 8)
# Those that bring the stored picture's last columns, or rows, to the left or to the top.
_TO_THE_LEFT = (2, 3, 6, 7)
_TO_THE_TOP = (3, 4, 7, 8)
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where an upright image of a given size is sampled from."""

    scaled: tuple[int, int]  # size of the whole image at the scale of the model's input
    offset: tuple[int, int]  # left, top of the crop at that scale

    def box(self, width: float, height: float, side: int) -> Box:
        """Return the crop in the coordinates of an image stored as `width` × `height`."""
        x_step, y_step = width / self.scaled[0], height / self.scaled[1]
        left, top = self.offset
        return (
            left * x_step,
            top * y_step,
            min((left + side) * x_step, width),
            min((top + side) * y_step, height),
        )


def geometry(width: int, height: int, preprocessing: Preprocessing) -> Geometry:
    """Return the resize and crop that timm (torchvision Resize, CenterCrop) would do.

    crop: short side to floor(image_size / crop_fraction), long side truncated, centre crop rounded
    half to even. squash: both sides to image_size.
    """
    side = preprocessing.image_size
    if preprocessing.resize == "squash":
        return Geometry((side, side), (0, 0))
    short = int(side / preprocessing.crop_fraction)
    scaled = (
        (short, int(short * height / width))
        if width <= height
        else (int(short * width / height), short)
    )
    return Geometry(scaled, (round((scaled[0] - side) / 2), round((scaled[1] - side) / 2)))


def frame_of(size: tuple[int, int], extent: tuple[float, float], turn: int) -> Box:
    """Return where a picture lies in an upright image of `size`, decoded as `extent` before `turn`.

    A JPEG decoded at 1/8 ends with a part of a pixel, which libjpeg fills up: 500 columns are 62.5,
    and the 63rd is half beyond the edge.
    """
    width, height = extent[::-1] if turn in SIDEWAYS else extent
    left = size[0] - width if turn in _TO_THE_LEFT else 0.0
    top = size[1] - height if turn in _TO_THE_TOP else 0.0
    return left, top, left + width, top + height
