"""`POST /explain`: which patches of an image speak for its label."""

import re
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app import schemas
from app.answers import InPieces
from app.documents import EXAMPLE_IMAGE, ImageDocument
from app.errors import InvalidParameter
from app.routes.classify import json_response, model_name, read_upload
from app.routes.openapi import BYTES, CLASSIFY_STATUSES, image_body, problems
from app.schemas import Prediction
from app.service import Service
from app.uploads import JSON, unless_gone

router = APIRouter(tags=["classify"])

_QUALITY = re.compile(r"q=([01](?:\.\d{0,3})?)")
PNG = "image/png"
Index = Annotated[
    int | None, Query(ge=0, description="the label to explain, by its index (default: the best)")
]


@router.post(
    "/explain",
    response_model=schemas.Explained,
    responses={
        200: {"content": {PNG: {"schema": BYTES}}},
        **problems(*CLASSIFY_STATUSES),
    },
    openapi_extra={"requestBody": image_body(ImageDocument, {"image": EXAMPLE_IMAGE})},
)
async def explain(request: Request, index: Index = None) -> Response:
    """Show which cells of the image matter for a label, by hiding one after the other.

    JSON, or with `Accept: image/png` the model's view with what did not matter darkened. It runs in
    the engine's spare time, one at a time, and is refused with 429 while the service is busy.
    """
    service: Service = request.app.state.service
    explainer, settings = service.explainer, service.settings
    with service.admission.body() as budget:
        upload, deadline = await read_upload(request, settings, budget)
        classes = len(service.classifier.card.labels)
        if index is not None and index >= classes:
            raise InvalidParameter(f"index is {index}; it must be from 0 to {classes - 1}.")
        with explainer.only_one(service.admission.images):
            found = await unless_gone(request, explainer.explain(upload, deadline, index))
            if _wants_picture(request.headers.getlist("accept")):
                picture = await unless_gone(request, explainer.overlay(upload, found, deadline))
                return InPieces(picture, media_type=PNG)
    card = service.classifier.card
    return json_response(
        schemas.Explained(
            model=model_name(service.classifier),
            prediction=Prediction(
                label=card.labels[found.index], index=found.index, score=found.score
            ),
            cell_pixels=found.cell_pixels,
            importance=[[round(value, 6) for value in row] for row in found.importance.tolist()],
        )
    )


def _wants_picture(accept: list[str]) -> bool:
    """Return whether `Accept` names PNG, and JSON no higher (RFC 9110, 12.5.1)."""
    qualities = {}
    for one in ",".join(accept).lower().split(","):
        media_type, *parameters = (part.strip() for part in one.split(";"))
        found = [_QUALITY.fullmatch(parameter) for parameter in parameters]
        qualities[media_type] = min((float(q[1]) for q in found if q), default=1.0)
    return 0 < qualities.get(PNG, 0) >= qualities.get(JSON, 0)
