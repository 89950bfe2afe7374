"""`/v2…`: the Open Inference Protocol, so that the container is a KServe predictor as it stands.

Encoded images go in as the BYTES tensor `image`; out come the best labels with index and score,
or all probabilities. https://github.com/kserve/open-inference-protocol
"""

from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response

from app.answers import Extent, InPieces, put_together
from app.classifier import Classifier
from app.documents import EXAMPLE_IMAGE, read_alone
from app.errors import NoSuchModel, Problem
from app.routes.classify import check_predictions, checked_top_k
from app.routes.health import livez, readyz
from app.routes.openapi import BYTES, CLASSIFY_STATUSES, json_content, problems
from app.service import Service
from app.tensors import (
    IMAGE,
    INDEX,
    JSON_LENGTH_HEADER,
    LABEL,
    PROBABILITIES,
    SCORE,
    InferRequest,
    positive,
    read_request,
    values_each,
    write_response,
)
from app.uploads import unless_gone

router = APIRouter(prefix="/v2", tags=["clients"])
probes = APIRouter(prefix="/v2", tags=["clients"])  # which come without a key

_EXAMPLE = {
    "id": "1",
    "inputs": [{"name": IMAGE, "shape": [1], "datatype": "BYTES", "data": [EXAMPLE_IMAGE]}],
    "parameters": {"top_k": 3},
}

_ANSWER = {
    "model_name": "mixer-cifar10",
    "model_version": "1f0c2d3e4a5b",
    "id": "1",
    "outputs": [{"name": LABEL, "datatype": "BYTES", "shape": [1, 1], "data": ["cat"]}],
}
_BINARY = {
    "application/octet-stream": {
        "schema": BYTES,
        "example": f"(JSON of as many bytes as {JSON_LENGTH_HEADER} says, then the tensors)",
    }
}
_INFER: dict[str, Any] = {
    "response_class": Response,
    "responses": {
        200: {"content": {"application/json": {"example": _ANSWER}} | _BINARY},
        **problems(404, *CLASSIFY_STATUSES),
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {"application/json": json_content(InferRequest, _EXAMPLE)} | _BINARY,
        }
    },
}


@router.get("", responses=problems(401))
async def server(request: Request) -> dict[str, Any]:
    """Show what serves, and which extensions of the protocol it knows."""
    return {
        "name": "mixer-serve",
        "version": request.app.version,
        "extensions": ["binary_tensor_data", "classification"],
    }


@probes.get("/health/live", responses=problems(503))
async def live(request: Request) -> dict[str, bool]:
    """Say whether this process need not be replaced, as `/livez` does."""
    await livez(request)
    return {"live": True}


@probes.get("/health/ready", responses=problems(503))
async def ready(request: Request) -> dict[str, bool]:
    """Say whether a balancer may send requests, as `/readyz` does."""
    await readyz(request)
    return {"ready": True}


@router.get("/models/{name}", responses=problems(401, 404, 422))
@router.get("/models/{name}/versions/{version}", responses=problems(401, 404, 422))
async def model(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Show the model's inputs and outputs."""
    card = _classifier(request, name, version).card
    return {
        "name": card.name,
        "versions": [card.version],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": IMAGE, "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": LABEL, "datatype": "BYTES", "shape": [-1, -1]},
            {"name": INDEX, "datatype": "INT64", "shape": [-1, -1]},
            {"name": SCORE, "datatype": "FP32", "shape": [-1, -1]},
            {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, len(card.labels)]},
        ],
    }


@router.get("/models/{name}/ready", responses=problems(401, 404, 422, 503))
@router.get("/models/{name}/versions/{version}/ready", responses=problems(401, 404, 422, 503))
async def model_ready(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Say whether the model answers."""
    card = _classifier(request, name, version).card
    await ready(request)
    return {"name": card.name, "ready": True}


@router.post("/models/{name}/infer", **_INFER)
@router.post("/models/{name}/versions/{version}/infer", **_INFER)
async def infer(request: Request, name: str, version: str | None = None) -> Response:
    """Classify the images of the BYTES tensor `image`, in JSON as base64 or in binary.

    In binary the body is JSON and then the tensors; `Inference-Header-Content-Length` has the bytes
    of the JSON, in an answer as well.

    The parameter `top_k` says how many labels; one bad image fails the request, since the protocol
    knows no answer for a part of it.
    """
    classifier = _classifier(request, name, version)
    service: Service = request.app.state.service
    parse = partial(
        read_request,
        json_length=request.headers.get(JSON_LENGTH_HEADER),
        max_images=service.settings.queue_size,
    )
    with service.admission.body() as budget:
        (asked, images), deadline = await read_alone(request, service.settings, budget, parse)
        top_k = checked_top_k(_top_k(asked), classifier)
        classes = len(classifier.card.labels)
        each = sum(values_each(output, classes, top_k) for output in asked.wanted)
        check_predictions(len(images), each)
        extent = Extent(len(images), classes, values=each)
        with service.admission.answering(extent.images, extent.seconds, deadline) as took:
            results = await unless_gone(request, classifier.classify(images, deadline))
            logits = []
            for number, result in enumerate(results):
                if isinstance(result, Problem):
                    if len(images) > 1 and result.status < HTTPStatus.INTERNAL_SERVER_ERROR:
                        result.detail = f"Of element {number} of 'image': {result.detail}"
                    raise result
                logits.append(result.logits)
            card = classifier.card
            head = {"model_name": card.name, "model_version": card.version, "id": asked.id}
            steps = write_response(
                {name: value for name, value in head.items() if value is not None},
                asked.wanted,
                logits,
                card.labels,
                top_k,
            )
            answer, json_length = await put_together(request, deadline, extent, took, steps)
    if json_length is None:
        return InPieces(answer, media_type="application/json")
    return InPieces(
        answer,
        media_type="application/octet-stream",
        headers={JSON_LENGTH_HEADER: str(json_length)},
    )


def _classifier(request: Request, name: str, version: str | None) -> Classifier:
    """Return the classifier, if the client names its model."""
    classifier: Classifier = request.app.state.service.classifier
    card = classifier.card
    if name != card.name or version not in (None, card.version):
        raise NoSuchModel(f"The model here is {card.name}, version {card.version}.")
    return classifier


def _top_k(asked: InferRequest) -> int | None:
    top_k = asked.parameters.get("top_k")
    return None if top_k is None else positive(top_k, "top_k")
