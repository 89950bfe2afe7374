"""`GET /metrics`: what Prometheus scrapes."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from app.answers import InPieces
from app.service import Service

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"example": "mixer_queue_depth 0.0\n"}}}},
)
async def metrics(request: Request) -> Response:
    """Show the metrics in Prometheus' text format; open like the probes, it holds no secrets."""
    service: Service = request.app.state.service
    text = await service.metrics.scrape()
    return InPieces(text, media_type=CONTENT_TYPE_PLAIN_0_0_4, is_shared=True)
