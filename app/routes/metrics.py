"""`GET /metrics`: what Prometheus scrapes."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"example": "mixer_queue_depth 0.0\n"}}}},
)
async def metrics(request: Request) -> Response:
    """Show the metrics in Prometheus' text format; open like the probes, it holds no secrets."""
    return Response(request.app.state.service.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
