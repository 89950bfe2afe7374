"""`GET /livez` and `GET /readyz`: is the process well, may the balancer send it requests."""

from fastapi import APIRouter, Request

from app.errors import NotReady
from app.schemas import Status

router = APIRouter(tags=["health"])


@router.head("/livez", include_in_schema=False)
@router.get("/livez")
async def livez() -> Status:
    """Tell the orchestrator that this process need not be replaced."""
    return Status(status="live")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(request: Request) -> Status:
    """Tell the balancer to send requests: golden sample passed, warm-up done, not draining."""
    if not request.app.state.ready:
        raise NotReady("Not ready yet, or draining.")
    return Status(status="ready")
