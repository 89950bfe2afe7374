"""`POST /`: image classification as clients of Hugging Face's inference API ask for it.

https://huggingface.co/docs/inference-providers/tasks/image-classification: raw bytes without
parameters, JSON with base64 where there are some.
"""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field
from typing_extensions import TypedDict

from app.answers import Extent, Steps, put_together
from app.documents import (
    EXAMPLE_IMAGE,
    HuggingFaceDocument,
    HuggingFaceParameters,
    read_document,
)
from app.errors import Problem
from app.predictions import best
from app.routes.classify import json_response
from app.routes.openapi import CLASSIFY_STATUSES, image_body, problems
from app.schemas import DEFAULT_TOP_K
from app.service import Service
from app.uploads import JSON, media_type_of, read_image, unless_gone

router = APIRouter(tags=["clients"])

_EXAMPLE = {
    "inputs": EXAMPLE_IMAGE,
    "parameters": {"top_k": 3, "function_to_apply": "softmax"},
}


class LabelScore(TypedDict):
    """One label, best first."""

    label: Annotated[str, Field(examples=["cat"])]
    score: Annotated[float, Field(examples=[0.93])]


@router.post(
    "/",
    response_model=list[LabelScore],
    responses=problems(*CLASSIFY_STATUSES),
    openapi_extra={"requestBody": image_body(HuggingFaceDocument, _EXAMPLE)},
)
async def classify(request: Request) -> Response:
    """Classify one image as `huggingface_hub.InferenceClient.image_classification` asks for it.

    A `top_k` above the model's classes means all of them, as at Hugging Face.
    """
    service: Service = request.app.state.service
    classifier, settings = service.classifier, service.settings
    parameters = HuggingFaceParameters()
    with service.admission.body() as budget:
        if media_type_of(request) == JSON:
            document, deadline = await read_document(request, settings, budget, HuggingFaceDocument)
            upload, parameters = document.inputs, document.parameters or parameters
        else:
            upload, deadline = await read_image(request, settings, budget)
        labels = classifier.card.labels
        top_k = min(parameters.top_k or DEFAULT_TOP_K, len(labels))
        extent = Extent(1, len(labels), predictions=top_k)
        with service.admission.answering(extent.images, extent.seconds, deadline) as took:
            [result] = await unless_gone(request, classifier.classify([upload], deadline))
            if isinstance(result, Problem):
                raise result
            logits, function = result.logits, parameters.function_to_apply or "softmax"

            def steps() -> Steps[Response]:
                yield
                predictions = best(logits, labels, top_k, function)
                return json_response(
                    [LabelScore(label=p["label"], score=p["score"]) for p in predictions]
                )

            return await put_together(request, deadline, extent, took, steps())
