"""The application: the one place where the parts are wired together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
from fastapi import FastAPI

from app.classifier import Classifier
from app.engine import Engine
from app.routes import classify, health, model, problems
from app.settings import Settings


def create_app(settings: Settings, engine: Engine) -> FastAPI:
    """Return the service around an engine whose golden sample has passed."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(warm_up, engine, settings.max_batch)
        app.state.classifier = Classifier(engine, settings)
        app.state.ready = True
        yield
        app.state.ready = False
        await app.state.classifier.close()

    app = FastAPI(
        title="Mixer Serve",
        summary="Classifies images with a trained MLP-Mixer.",
        version="0.1.0",
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.ready = False
    for routes in (classify, health, model):
        app.include_router(routes.router)
    problems.answer_errors(app)
    return app


def warm_up(engine: Engine, max_batch: int) -> None:
    """Run every doubling of the batch size once, so that no request pays for a first time."""
    preprocessing = engine.card.preprocessing
    batch = 1
    while batch < max_batch * 2:
        shape = (min(batch, max_batch), preprocessing.tokens, preprocessing.patch_bytes)
        engine.run(np.zeros(shape, np.uint8))
        batch *= 2
