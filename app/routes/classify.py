"""`POST /classify` and `POST /classify/batch`."""

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from app import schemas
from app.admission import BodyBudget
from app.answers import Extent, InPieces, Steps, put_together
from app.classifier import Classified, Classifier
from app.documents import EXAMPLE_IMAGE, ImageDocument, read_document
from app.errors import InvalidParameter, Problem
from app.predictions import best
from app.routes.openapi import BYTES, CLASSIFY_STATUSES, image_body, problems
from app.schemas import DEFAULT_TOP_K, TopK
from app.service import Service
from app.settings import Settings
from app.uploads import (
    JSON,
    media_type_of,
    read_image,
    read_images,
    unless_gone,
)

router = APIRouter(tags=["classify"])

# Of all images of a request, which themselves may have come in a few kB.
MAX_PREDICTIONS = 100_000


@router.post(
    "/classify",
    response_model=schemas.Classification,
    responses=problems(*CLASSIFY_STATUSES),
    openapi_extra={"requestBody": image_body(ImageDocument, {"image": EXAMPLE_IMAGE})},
)
async def classify(request: Request, top_k: TopK = None) -> Response:
    """Classify one image: multipart field `file`, the raw body, or JSON with base64."""
    service: Service = request.app.state.service
    classifier, settings = service.classifier, service.settings
    count = checked_top_k(top_k, classifier)
    with service.admission.body() as budget:
        upload, deadline = await read_upload(request, settings, budget)
        extent = Extent(1, len(classifier.card.labels), predictions=count)
        with service.admission.answering(extent.images, extent.seconds, deadline) as took:
            [result] = await unless_gone(request, classifier.classify([upload], deadline))
            if isinstance(result, Problem):
                raise result
            steps = _answer(classifier, result, count)
            return await put_together(request, deadline, extent, took, steps)


@router.post(
    "/classify/batch",
    response_model=schemas.BatchClassification,
    responses=problems(*(status for status in CLASSIFY_STATUSES if status != 500)),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {"files": {"type": "array", "items": BYTES}},
                        "required": ["files"],
                    },
                    "example": {"files": ["cat.jpg", "ship.png"]},
                },
            },
        }
    },
)
async def classify_batch(request: Request, top_k: TopK = None) -> Response:
    """Classify many images: multipart, repeated field `files`; one bad image fails alone."""
    service: Service = request.app.state.service
    classifier, settings = service.classifier, service.settings
    count = checked_top_k(top_k, classifier)
    with service.admission.body() as budget:
        uploads, deadline = await read_images(request, settings, budget)
        check_predictions(len(uploads), count)
        extent = Extent(len(uploads), len(classifier.card.labels), predictions=count)
        with service.admission.answering(extent.images, extent.seconds, deadline) as took:
            results = await unless_gone(request, classifier.classify(uploads, deadline))
            steps = _batch_answer(classifier, results, count)
            return await put_together(request, deadline, extent, took, steps)


async def read_upload(
    request: Request, settings: Settings, budget: BodyBudget
) -> tuple[bytes, float]:
    """Return the request's one image in whichever way it came, and the request's deadline.

    Raises:
        EmptyBody, BodyTooLarge, BodyTimeout, DeadlineExceeded, MalformedForm, MalformedJson,
            InvalidParameter, UnsupportedFormat, QueueFull, ClientDisconnect: as their names say.
    """
    if media_type_of(request) == JSON:
        document, deadline = await read_document(request, settings, budget, ImageDocument)
        return document.image, deadline
    return await read_image(request, settings, budget)


def checked_top_k(top_k: int | None, classifier: Classifier) -> int:
    """Return how many labels to answer with.

    Raises:
        InvalidParameter: the model has fewer.
    """
    classes = len(classifier.card.labels)
    if top_k is None:
        return min(DEFAULT_TOP_K, classes)
    if top_k > classes:
        raise InvalidParameter(f"top_k is {top_k}; it must be from 1 to {classes}.")
    return top_k


def check_predictions(images: int, each: int) -> None:
    """See whether an answer may hold so many predictions for each of so many images.

    Raises:
        InvalidParameter: it may not.
    """
    if images * each > MAX_PREDICTIONS:
        raise InvalidParameter(
            f"{each} predictions for each of {images} images are more than the {MAX_PREDICTIONS} "
            "that an answer may hold."
        )


def classification(
    result: Classified, classifier: Classifier, top_k: int
) -> schemas.Classification:
    """Return the answer about one image."""
    return schemas.Classification(
        model=model_name(classifier),
        image=_image_info(result),
        predictions=best(result.logits, classifier.card.labels, top_k),
    )


def model_name(classifier: Classifier) -> schemas.ModelName:
    """Return which model answers."""
    return schemas.ModelName(name=classifier.card.name, version=classifier.card.version)


def json_response(answer: object) -> Response:
    """Return one of the answers of `schemas` as it stands, past FastAPI's checks of it."""
    return InPieces(to_json(answer), media_type="application/json")


def _answer(classifier: Classifier, result: Classified, top_k: int) -> Steps[Response]:
    yield
    return json_response(classification(result, classifier, top_k))


def _batch_answer(
    classifier: Classifier, results: Sequence[Classified | Problem], top_k: int
) -> Steps[Response]:
    written = []
    for result in results:
        yield
        one = (
            schemas.Failed(problem=result.body())
            if isinstance(result, Problem)
            else schemas.Classified(
                image=_image_info(result),
                predictions=best(result.logits, classifier.card.labels, top_k),
            )
        )
        written.append(to_json(one))  # all at once would hold the GIL for 60 ms
    head = to_json({"model": model_name(classifier)}).removesuffix(b"}")
    body = b"".join([head, b',"results":[', b",".join(written), b"]}"])
    return InPieces(body, media_type="application/json")


def _image_info(result: Classified) -> schemas.ImageInfo:
    picture = result.picture
    return schemas.ImageInfo(format=picture.format, width=picture.width, height=picture.height)
