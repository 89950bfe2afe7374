"""The recipe: every number that decides what a training run learns, in one validated object.

A recipe file is TOML with these names as keys; on the command line each is a flag.
"""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from model_export.errors import ExportError

# Twice the largest Mixer ever published (448 px), and a sample picture is still only 3 MB.
LARGEST_IMAGE = 1024

Variant = Literal["S/32", "S/16", "B/32", "B/16", "L/32", "L/16", "H/14"]
DIMENSIONS = ("image_size", "patch", "hidden", "blocks", "token_mlp", "channel_mlp")


class Recipe(BaseModel):
    """How to train, by default as Tolstikhin et al. 2021 pre-trained on ImageNet (supplement B).

    Where the default is not the paper's, the description says so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    variant: Variant | None = Field(default=None, description="a model of the paper's Table 1")
    init: str | None = Field(
        default=None,
        description="checkpoint to fine-tune: whatever mixer-export convert reads; it gets a new "
        "head and fixes all dimensions",
    )
    image_size: int = Field(
        default=32, ge=1, le=LARGEST_IMAGE, description="side of the input in pixels"
    )
    patch: int = Field(default=4, ge=1, le=512, description="side of a patch in pixels")
    hidden: int = Field(default=128, ge=1, le=16384, description="channels C of one token")
    blocks: int = Field(default=8, ge=1, le=256, description="number of mixer blocks")
    token_mlp: int = Field(default=64, ge=1, le=65536, description="D_S, width of token mixing")
    channel_mlp: int = Field(
        default=512, ge=1, le=65536, description="D_C, width of channel mixing"
    )

    epochs: int = Field(default=300, ge=1, description="passes over the training images")
    batch_size: int = Field(
        default=128, ge=1, description="images in one step; the paper's 4096 needs a cluster"
    )
    optimizer: Literal["adam", "adamw", "muon"] = Field(
        default="adamw",
        description="adam adds weight decay to the gradient, adamw does not; muon takes orthogonal "
        "steps on the blocks' matrices, and learns more in few epochs",
    )
    lr: float = Field(default=1e-3, gt=0, description="highest learning rate")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Adam's second decay rate")
    warmup_epochs: float | None = Field(
        default=None,
        ge=0,
        description="linear rise of the learning rate (default: a tenth of the run, as the paper's "
        "10k steps are of its 94k)",
    )
    decay: Literal["cosine", "linear"] = Field(
        default="linear", description="fall of the learning rate after the warm-up"
    )
    weight_decay: float = Field(default=0.1, ge=0, description="on weight matrices only")
    clip_norm: float = Field(default=1.0, ge=0, description="longest gradient; 0 never clips")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="mass on all classes")
    stochastic_depth: float = Field(
        default=0.1, ge=0, lt=1, description="chance to skip the last block, from 0 at the first"
    )
    ema: float = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="decay per step of the averaged weights that are evaluated and kept; "
        "0 keeps the last ones",
    )

    flip: bool = Field(default=True, description="mirror half of the images")
    crop_area: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="least share of the picture in a random resized crop, 1 for none; the "
        "paper's 0.05 suits larger sets than one trains at home",
    )
    crop_shift: int = Field(
        default=0, ge=0, description="furthest random shift in pixels, with reflected edges"
    )
    randaugment_layers: int = Field(default=2, ge=0, description="random operations on each image")
    randaugment_magnitude: float = Field(
        default=10.0, ge=0, le=10, description="strongest of them; the paper's 15 leaves the scale"
    )
    mixup: float = Field(default=0.5, ge=0, description="alpha of mixup's Beta; 0 for none")
    cutmix: float = Field(default=0.0, ge=0, le=1, description="share of images with CutMix")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of all that is random")

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        fixed = "variant" if self.variant else "init" if self.init else None
        if fixed and (given := self.model_fields_set & {*DIMENSIONS, "variant"} - {fixed}):
            raise ValueError(
                f"{fixed} fixes the model's dimensions, so leave out {min(given)}: token mixing "
                "has one weight per pair of tokens, and each patch is a token"
            )
        if fixed is None and self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {self.patch}")
        if self.crop_shift and self.crop_area < 1:
            raise ValueError("crop_shift and crop_area are two ways to crop; crop_area 1 is none")
        if self.crop_shift >= self.image_size and fixed is None:
            raise ValueError(f"crop_shift {self.crop_shift} reaches across the whole image")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        return self


def load(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """Read a recipe file, if any; `flags` win over it.

    Raises:
        ExportError: the file is missing, not TOML, or a value cannot be.
    """
    return check(read(path) | flags)


def read(path: Path | None) -> dict[str, Any]:
    """Return what a recipe file sets, nothing without one.

    Raises:
        ExportError: the file is missing or not TOML.
    """
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"--config {path}: not a readable recipe ({error})") from error


def check(values: dict[str, Any]) -> Recipe:
    """Return the recipe of these values.

    Raises:
        ExportError: one of them cannot be.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ExportError(f"recipe: {_plain(error.errors()[0])}") from error


def to_toml(recipe: Recipe) -> str:
    """Write every number that was set or decides something, readable by `load`."""
    fixed = recipe.variant or recipe.init
    lines = []
    for name, value in recipe.model_dump(exclude_none=True).items():
        if fixed and name in DIMENSIONS:
            continue
        # JSON writes numbers, booleans and strings as TOML does.
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _plain(detail: ErrorDetails) -> str:
    where = ".".join(map(str, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where} {detail['input']!r}: {message}" if where else message
