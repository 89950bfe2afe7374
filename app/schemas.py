"""What the endpoints answer, as the OpenAPI document shows it.

Answers are dictionaries: a pydantic model for each label would cost the event loop more than the
labels themselves.
"""

from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, Field
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from app.errors import ProblemBody
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


class ModelName(TypedDict):
    """Which model answered."""

    name: Annotated[str, Field(examples=["mixer-cifar10"])]
    version: Annotated[str, Field(examples=["1f0c2d3e4a5b"])]


class ImageInfo(TypedDict):
    """What was uploaded."""

    format: Annotated[str, Field(description="JPEG, PNG, WEBP, GIF or BMP", examples=["JPEG"])]
    width: Annotated[
        int, Field(description="pixels, as stored, before the EXIF turn", examples=[1600])
    ]
    height: Annotated[
        int, Field(description="pixels, as stored, before the EXIF turn", examples=[1200])
    ]


class Prediction(TypedDict):
    """One label and its softmax probability."""

    label: Annotated[str, Field(examples=["cat"])]
    index: Annotated[int, Field(description="position of the logit", examples=[3])]
    score: Annotated[float, Field(description="softmax probability", examples=[0.93])]


class Classified(TypedDict):
    """One image's best labels."""

    image: ImageInfo
    predictions: Annotated[list[Prediction], Field(description="best first")]


class Classification(TypedDict):
    """Answer of `POST /classify`."""

    model: ModelName
    image: ImageInfo
    predictions: Annotated[list[Prediction], Field(description="best first")]


class Failed(TypedDict):
    """One image of a batch that could not be classified."""

    problem: ProblemBody


class BatchClassification(TypedDict):
    """Answer of `POST /classify/batch`."""

    model: ModelName
    results: Annotated[
        list[Classified | Failed], Field(description="one per image, in the order sent")
    ]


class Explained(TypedDict):
    """Answer of `POST /explain`."""

    model: ModelName
    prediction: Annotated[Prediction, Field(description="the label that is explained")]
    cell_pixels: Annotated[
        int,
        Field(
            description="side of one cell in pixels of the model's square view; the last row and "
            "column may be cut",
            examples=[4],
        ),
    ]
    importance: Annotated[
        list[list[float]],
        Field(
            description="rows from the top; how much log-probability (in nats) the label loses "
            "when the cell is hidden: negative where the cell speaks against it",
            examples=[[[0.02, 0.41], [-0.01, 1.3]]],
        ),
    ]


class ModelInfo(ModelCard):
    """Answer of `GET /model`: the model card, and where the model really runs."""

    execution_provider: str = Field(examples=["CUDAExecutionProvider"])


class Status(BaseModel):
    """Answer of the health endpoints."""

    status: str = Field(examples=["ready"])
