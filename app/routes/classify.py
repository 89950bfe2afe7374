"""`POST /classify` and `POST /classify/batch`."""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from app import schemas
from app.classifier import Classified, Classifier
from app.errors import InvalidParameter, Problem
from app.predictions import best
from app.schemas import DEFAULT_TOP_K, TopK
from app.service import Service
from app.uploads import read_deadline, read_image, read_images, unless_gone

router = APIRouter(tags=["classify"])

_BYTES = {"type": "string", "format": "binary"}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    return {status: {"content": content} for status in statuses}


def _form(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"schema": {"type": "object", "properties": {field: schema}, "required": [field]}}


@router.post(
    "/classify",
    response_model=schemas.Classification,
    responses=_problems(400, 401, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": _form("file", _BYTES),
                "image/*": {"schema": _BYTES},
                "application/octet-stream": {"schema": _BYTES},
            },
        }
    },
)
async def classify(request: Request, top_k: TopK = None) -> Response:
    """Classify one image: multipart field `file`, or the raw body."""
    service: Service = request.app.state.service
    classifier, settings = service.classifier, service.settings
    deadline = read_deadline(request, settings)
    count = _checked_top_k(top_k, classifier)
    with service.admission.body() as budget:
        [result] = await unless_gone(
            request,
            classifier.classify([await read_image(request, settings, budget)], deadline),
        )
    if isinstance(result, Problem):
        raise result
    return _json(
        schemas.Classification(
            model=_model_name(classifier),
            image=_image_info(result),
            predictions=best(result.logits, classifier.card.labels, count),
        )
    )


@router.post(
    "/classify/batch",
    response_model=schemas.BatchClassification,
    responses=_problems(400, 401, 408, 413, 415, 422, 429, 503, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": _form("files", {"type": "array", "items": _BYTES}),
            },
        }
    },
)
async def classify_batch(request: Request, top_k: TopK = None) -> Response:
    """Classify many images: multipart, repeated field `files`; one bad image fails alone."""
    service: Service = request.app.state.service
    classifier, settings = service.classifier, service.settings
    deadline = read_deadline(request, settings)
    count = _checked_top_k(top_k, classifier)
    with service.admission.body() as budget:
        uploads = await read_images(request, settings, budget)
        results = await unless_gone(request, classifier.classify(uploads, deadline))
    return _json(
        schemas.BatchClassification(
            model=_model_name(classifier),
            results=[
                schemas.Failed(problem=schemas.ProblemBody(**result.body()))
                if isinstance(result, Problem)
                else schemas.Classified(
                    image=_image_info(result),
                    predictions=best(result.logits, classifier.card.labels, count),
                )
                for result in results
            ],
        )
    )


def _checked_top_k(top_k: int | None, classifier: Classifier) -> int:
    classes = len(classifier.card.labels)
    if top_k is None:
        return min(DEFAULT_TOP_K, classes)
    if top_k > classes:
        raise InvalidParameter(f"top_k is {top_k}; it must be from 1 to {classes}.")
    return top_k


def _model_name(classifier: Classifier) -> schemas.ModelName:
    return schemas.ModelName(name=classifier.card.name, version=classifier.card.version)


def _image_info(result: Classified) -> schemas.ImageInfo:
    picture = result.picture
    return schemas.ImageInfo(format=picture.format, width=picture.width, height=picture.height)


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")
