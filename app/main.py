"""The application: the one place where the parts are wired together."""

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from app.access import REQUEST_ID_HEADER, Access
from app.admission import Admission
from app.classifier import Classifier
from app.door import Door, Origins
from app.engine import Engine
from app.explain import Explainer
from app.keys import KEY_SCHEMES, ApiKeys
from app.latency import LatencyTable, batches_at_once, warm_up
from app.logs import STANDARD_ERROR
from app.metrics import Metrics
from app.routes import (
    classify,
    explain,
    health,
    hugging_face,
    inference_protocol,
    metrics,
    model,
    pages,
    problems,
)
from app.service import Service
from app.settings import Settings
from app.spans import exporter
from app.tensors import JSON_LENGTH_HEADER
from app.uploads import TIMEOUT_HEADER

logger = logging.getLogger(__name__)

# After the last answer, for a batch that nobody waits for to end.
CLOSE_S = 3.0


def create_app(settings: Settings, engine: Engine) -> FastAPI:
    """Return the service around an engine whose golden sample has passed.

    Raises:
        StartupError: the file of API keys, or the collector of spans, cannot be used.
    """
    keys = None if settings.api_keys_file is None else ApiKeys(settings.api_keys_file)

    measures = Metrics()
    spans = exporter()
    # Before the port is open: who is accepted is answered, and a balancer asks others until then.
    latency = LatencyTable(
        settings.max_batch, settings.decode_threads, batches_at_once(engine, settings.max_batch)
    )
    logger.info("warming up with batches of up to %d", settings.max_batch)  # it may take minutes
    warm_up(engine, settings.max_batch, latency)
    if latency.service_s(1) * 1000 > settings.request_timeout_ms:
        logger.warning(
            "one image takes %.0f ms here, MIXER_REQUEST_TIMEOUT_MS=%d: most will be refused (504)",
            latency.service_s(1) * 1000,
            settings.request_timeout_ms,
        )
    measures.show_model(engine.card, engine.provider, version("mixer-serve"))
    described = model.model_info(engine.card, engine.provider)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # What is there now stays: to look through it again would stop every thread for 40 ms.
        gc.collect()
        gc.freeze()
        admission = Admission(settings, latency)
        classifier = Classifier(engine, settings, latency, admission, measures)
        explainer = Explainer(classifier, settings, latency)
        app.state.service = Service(
            settings, admission, classifier, explainer, measures, keys, spans, described
        )
        yield
        app.state.service.draining = True
        try:
            async with asyncio.timeout(CLOSE_S):
                await classifier.close()
        except TimeoutError:
            # Every request has its answer; to wait for that thread would end with a SIGKILL.
            logger.error("the engine or a decoder is stuck: ending without it")  # noqa: TRY400 - nothing to trace
            os._exit(1)
        if spans is not None:
            await asyncio.to_thread(spans.close, CLOSE_S)

    app = FastAPI(
        title="Mixer Serve",
        summary="Classifies images with a trained MLP-Mixer.",
        version=version("mixer-serve"),
        lifespan=lifespan,
        openapi_url=None,  # pages.py serves all three, and renders the first once
        docs_url=None,  # without a foreign host
        redoc_url=None,
        redirect_slashes=False,  # behind TLS it would send image and key once more, in the clear
        # The framework's own would look for a provider on every request; ours is in spans.py.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    _show_states(measures, app)
    guarded = [m.router for m in (classify, explain, hugging_face, inference_protocol, model)]
    for router in guarded:
        # The door asks for the key; this shows it in the document, and makes /docs ask for it.
        app.include_router(router, dependencies=[] if keys is None else KEY_SCHEMES)
    routers = [*guarded, health.router, inference_protocol.probes, metrics.router, pages.router]
    for router in routers[len(guarded) :]:
        app.include_router(router)
    routes = [route for router in routers for route in router.routes]
    problems.answer_errors(app, routes)
    app.add_middleware(Door, keys=keys)
    if settings.cors_origins:
        # Outside the door: a browser's preflight carries no key.
        app.add_middleware(
            Origins,
            allow_origins=[origin.strip() for origin in settings.cors_origins.split(",")],
            allow_methods=["GET", "POST"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "X-API-Key",
                REQUEST_ID_HEADER,
                TIMEOUT_HEADER,
                "traceparent",
                "tracestate",
                JSON_LENGTH_HEADER,
            ],
            expose_headers=["Retry-After", REQUEST_ID_HEADER, "Server-Timing", JSON_LENGTH_HEADER],
        )
    # Outside of everything: refusals and bugs have an ID and a log line, too.
    app.add_middleware(
        Access,
        metrics=measures,
        routes=routes,
        spans=spans,
    )
    return app


def _show_states(metrics: Metrics, app: FastAPI) -> None:
    """Let each scrape read what is in flight."""

    def service() -> Service:
        found: Service = app.state.service
        return found

    for name, text, read in (
        ("requests_in_flight", "Requests being served", lambda: service().admission.requests),
        ("body_bytes_in_flight", "Bytes of bodies held", lambda: service().admission.body_bytes),
        ("queue_depth", "Images admitted, not yet answered", lambda: service().admission.images),
        ("log_lines_lost", "Lines that standard error did not take", lambda: STANDARD_ERROR.lost),
        ("ready", "1 while a balancer may send requests", lambda: service().is_ready),
    ):
        metrics.show_state(name, text, read)
