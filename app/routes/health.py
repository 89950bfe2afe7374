"""`GET /livez` and `GET /readyz`: is the process well, may the balancer send it requests."""

import logging

from fastapi import APIRouter, Request

from app.errors import NotReady
from app.routes.openapi import problems
from app.schemas import Status
from app.service import Service

router = APIRouter(tags=["health"])
logger = logging.getLogger(__name__)

_FAILS = (logging.ERROR, "not ready: the engine or the decoders have failed too often")
_WORKS_AGAIN = (logging.WARNING, "ready again: the engine and the decoders work")


@router.get("/livez", responses=problems(503))
async def livez(request: Request) -> Status:
    """Tell the orchestrator that this process need not be replaced."""
    service: Service = request.app.state.service
    if not service.classifier.is_live:
        raise NotReady("The engine or the decoders fail lastingly; replace this process.")
    return Status(status="live")


@router.get("/readyz", responses=problems(503))
async def readyz(request: Request) -> Status:
    """Tell the balancer to send requests: golden sample passed, warm-up done, not draining."""
    service: Service = request.app.state.service
    if service.draining:
        raise NotReady("Draining: this replica is about to stop.")
    is_working = service.classifier.is_ready
    if is_working != service.was_working:
        service.was_working = is_working
        logger.log(*(_WORKS_AGAIN if is_working else _FAILS))
    if not is_working:
        raise NotReady("The engine or the decoders have failed too often.")
    return Status(status="ready")
