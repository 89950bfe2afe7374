"""What the endpoints answer, as the OpenAPI document shows it."""

from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, Field

from app.model_card import ModelCard

DEFAULT_TOP_K = 5

TopK = Annotated[
    int | None,
    Query(
        ge=1,
        description="How many labels to return, at most the model's classes "
        f"(default: {DEFAULT_TOP_K}, or all of a model with fewer).",
    ),
]


class ModelName(BaseModel):
    """Which model answered."""

    name: str = Field(examples=["mixer-cifar10"])
    version: str = Field(examples=["1f0c2d3e4a5b"])


class ImageInfo(BaseModel):
    """What was uploaded."""

    format: str = Field(description="JPEG, PNG, WEBP, GIF or BMP", examples=["JPEG"])
    width: int = Field(description="pixels, as stored, before the EXIF turn", examples=[1600])
    height: int = Field(description="pixels, as stored, before the EXIF turn", examples=[1200])


class Prediction(BaseModel):
    """One label and its softmax probability."""

    label: str = Field(examples=["cat"])
    index: int = Field(description="position of the logit", examples=[3])
    score: float = Field(description="softmax probability", examples=[0.93])


class Classified(BaseModel):
    """One image's best labels."""

    image: ImageInfo
    predictions: list[Prediction] = Field(description="best first")


class Classification(BaseModel):
    """Answer of `POST /classify`."""

    model: ModelName
    image: ImageInfo
    predictions: list[Prediction] = Field(description="best first")


class ProblemBody(BaseModel):
    """An error, RFC 9457."""

    type: str = Field(examples=["urn:problem-type:mixer-serve:corrupt-image"])
    title: str = Field(examples=["Corrupt image"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["The image cannot be decoded: image file is truncated."])


class Failed(BaseModel):
    """One image of a batch that could not be classified."""

    problem: ProblemBody


class BatchClassification(BaseModel):
    """Answer of `POST /classify/batch`."""

    model: ModelName
    results: list[Classified | Failed] = Field(description="one per image, in the order sent")


class Explained(BaseModel):
    """Answer of `POST /explain`."""

    model: ModelName
    prediction: Prediction = Field(description="the label that is explained")
    cell_pixels: int = Field(
        description="side of one cell in pixels of the model's square view; the last row and "
        "column may be cut",
        examples=[4],
    )
    importance: list[list[float]] = Field(
        description="rows from the top; how much log-probability (in nats) the label loses when "
        "the cell is hidden: negative where the cell speaks against it",
        examples=[[[0.02, 0.41], [-0.01, 1.3]]],
    )


class ModelInfo(ModelCard):
    """Answer of `GET /model`: the model card, and where the model really runs."""

    execution_provider: str = Field(examples=["CUDAExecutionProvider"])


class Status(BaseModel):
    """Answer of the health endpoints."""

    status: str = Field(examples=["ready"])
