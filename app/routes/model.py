"""`GET /model`: the model card, and the execution provider really in use."""

from fastapi import APIRouter, Request, Response

from app.answers import InPieces
from app.model_card import ModelCard
from app.routes.openapi import problems
from app.schemas import ModelInfo
from app.service import Service

router = APIRouter(tags=["model"])


@router.get("/model", response_model=ModelInfo, responses=problems(401))
async def model(request: Request) -> Response:
    """Show what is served and where it runs."""
    service: Service = request.app.state.service
    return InPieces(service.model_info, media_type="application/json", is_shared=True)


def model_info(card: ModelCard, provider: str) -> bytes:
    """Return the answer of `GET /model`, 4 MB of a model with 100,000 labels."""
    return ModelInfo(**card.model_dump(), execution_provider=provider).model_dump_json().encode()
