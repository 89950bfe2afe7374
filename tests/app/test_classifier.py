"""The threads that wait for decoders: what else they do, and what nobody waits for any more."""

import asyncio
import threading

import pytest

from app.admission import Admission
from app.classifier import Classifier
from app.latency import LatencyTable
from app.metrics import Metrics
from app.settings import Settings
from tests.fakes import FakeEngine


def _classifier() -> Classifier:
    """Return one with a single thread, on the running loop."""
    settings = Settings(decode_threads=1)
    latency = LatencyTable(settings.max_batch, settings.decode_threads)
    return Classifier(FakeEngine(), settings, latency, Admission(settings, latency), Metrics())


def test_work_that_nobody_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    """Work given up before its turn is not done, and the thread goes on."""
    done: list[str] = []

    async def run() -> None:
        classifier = _classifier()
        turn = threading.Event()
        tasks = [
            asyncio.create_task(classifier.in_decoder(work))
            for work in (turn.wait, lambda: done.append("given up"), lambda: done.append("wanted"))
        ]
        await asyncio.sleep(0)  # they are queued
        tasks[1].cancel()
        await asyncio.sleep(0)
        turn.set()
        await tasks[0]
        await tasks[2]
        await classifier.close()

    asyncio.run(run())
    assert done == ["wanted"]
    assert caplog.text == ""


def test_work_that_fails() -> None:
    """What work raises is raised where it was asked for, and the thread goes on."""

    async def run() -> None:
        classifier = _classifier()
        with pytest.raises(ZeroDivisionError):
            await classifier.in_decoder(lambda: 1 // 0)
        assert await classifier.in_decoder(lambda: "next") == "next"
        await classifier.close()

    asyncio.run(run())
