"""`GET /model`: the model card, and the execution provider really in use."""

from fastapi import APIRouter, Request

from app.routes.openapi import problems
from app.schemas import ModelInfo

router = APIRouter(tags=["model"])


@router.get("/model", responses=problems(401))
async def model(request: Request) -> ModelInfo:
    """Show what is served and where it runs."""
    classifier = request.app.state.service.classifier
    return ModelInfo(**classifier.card.model_dump(), execution_provider=classifier.provider)
