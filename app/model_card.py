"""The model card: everything the server must know of a model, kept inside its ONNX file.

There is no second configuration that could drift from the weights. The card and the golden sample
are two JSON texts in the ONNX file's metadata; the exporter writes them, the server reads them.
"""

import base64
from collections.abc import Mapping
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

CARD_KEY = "mixer_serve.card"
GOLDEN_KEY = "mixer_serve.golden"

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Positive = Annotated[int, Field(ge=1)]
# JSON has no word for what is not finite, and a pixel divided by 0 is no number.
_Mean = Annotated[float, Field(allow_inf_nan=False)]
_Std = Annotated[float, Field(allow_inf_nan=False, gt=0)]


# A stranger's file must not write to a terminal or forge a line of the log.
_Line = Annotated[str, Field(pattern=r"^\P{Cc}*$")]


class CardError(Exception):
    """The file carries no model card, or one that does not hold together."""


class Preprocessing(BaseModel):
    """How an image becomes patches. Square images only, as in every published Mixer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: Positive = Field(description="side of the square model input, in pixels")
    patch_size: Positive = Field(description="side of a square patch, in pixels")
    resize: Literal["crop", "squash"] = Field(
        default="crop",
        description="crop: short side to image_size / crop_fraction, then centre crop; "
        "squash: both sides to image_size, aspect ratio lost",
    )
    crop_fraction: float = Field(default=0.875, gt=0, le=1, description="timm's crop_pct")
    interpolation: Interpolation = "bicubic"
    color_order: Literal["RGB"] = "RGB"
    mean: tuple[_Mean, _Mean, _Mean] = Field(
        default=(0.5, 0.5, 0.5), description="already folded into the stem"
    )
    std: tuple[_Std, _Std, _Std] = Field(
        default=(0.5, 0.5, 0.5), description="already folded into the stem"
    )

    @property
    def tokens(self) -> int:
        """Patches per image, S in the paper."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_bytes(self) -> int:
        """Length of one patch row: P·P·3 bytes."""
        return self.patch_size * self.patch_size * 3

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        return self


class ModelCard(BaseModel):
    """What a model is, where it came from and how to feed it. `GET /model` shows it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, pattern=r"^[^/\p{Cc}]+$")  # a part of paths
    version: _Line = Field(min_length=1, description="first 12 hex digits of checksum")
    family: _Line = Field(default="mixer", description="mixer, gmixer, resmlp or gmlp")
    variant: _Line = Field(description="S/32 … H/14, or the dimensions of a model of one's own")
    parameters: Positive
    preprocessing: Preprocessing
    labels: tuple[_Line, ...] = Field(min_length=1)
    source: _Line = Field(description="file name or hub address of the checkpoint")
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    checksum: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the checkpoint")


class Golden(BaseModel):
    """A sample input with the logits the exporter got for it, and how far a runtime may stray."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patches_base64: str = Field(description="uint8 [1, tokens, P·P·3], C order")
    logits_base64: str = Field(description="float32 little-endian [1, classes], C order")
    tolerance: float = Field(gt=0, description="largest |Δlogit| that still counts as the same")

    @classmethod
    def of(
        cls, patches: NDArray[np.uint8], logits: NDArray[np.float32], tolerance: float
    ) -> "Golden":
        """Pack `patches` uint8 [1, tokens, P·P·3] with their `logits` float32 [1, classes]."""
        return cls(
            patches_base64=base64.b64encode(np.ascontiguousarray(patches).tobytes()).decode(),
            logits_base64=base64.b64encode(logits.astype("<f4").tobytes()).decode(),
            tolerance=tolerance,
        )

    def patches(self, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        """Return the sample input, uint8 [1, tokens, P·P·3]."""
        flat = np.frombuffer(base64.b64decode(self.patches_base64), np.uint8)
        return flat.reshape(1, preprocessing.tokens, preprocessing.patch_bytes)

    def logits(self) -> NDArray[np.float32]:
        """Return the expected output, float32 [1, classes]."""
        return np.frombuffer(base64.b64decode(self.logits_base64), "<f4").reshape(1, -1)


def write_metadata(card: ModelCard, golden: Golden) -> dict[str, str]:
    """Return the ONNX metadata entries that hold `card` and `golden`."""
    return {CARD_KEY: card.model_dump_json(), GOLDEN_KEY: golden.model_dump_json()}


def read_metadata(metadata: Mapping[str, str]) -> tuple[ModelCard, Golden]:
    """Read card and golden sample back from an ONNX file's metadata.

    Raises:
        CardError: an entry is absent or malformed, or the two contradict each other.
    """
    if CARD_KEY not in metadata or GOLDEN_KEY not in metadata:
        raise CardError("it holds no model card; write it with mixer-export convert")
    try:
        card = ModelCard.model_validate_json(metadata[CARD_KEY])
        golden = Golden.model_validate_json(metadata[GOLDEN_KEY])
        golden.patches(card.preprocessing)
        classes = golden.logits().shape[1]
    except ValidationError as error:
        first = error.errors()[0]
        detail = ": ".join([*filter(None, [".".join(map(str, first["loc"]))]), first["msg"]])
        raise CardError(f"its model card is malformed: {detail}") from error
    except ValueError as error:
        raise CardError(f"its model card is malformed: {error}") from error
    if classes != len(card.labels):
        raise CardError(f"its card has {len(card.labels)} labels for {classes} logits")
    return card, golden
