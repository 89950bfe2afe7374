"""The threads that wait for decoders: what else they do, and what nobody waits for any more."""

import asyncio
import math
import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from app.admission import Admission
from app.classifier import Classifier
from app.decoders import Decoders
from app.entry import Entry
from app.images import Picture
from app.latency import LatencyTable
from app.metrics import Metrics
from app.runtime import CPU
from app.settings import Settings
from tests.conftest import Serve
from tests.fakes import FakeEngine, make_image


def _classifier(engine: FakeEngine | None = None, max_batch: int = 16) -> Classifier:
    """Return one with a single thread, on the running loop."""
    settings = Settings(decode_threads=1, max_batch=max_batch)
    latency = LatencyTable(settings.max_batch, settings.decode_threads)
    return Classifier(
        engine or FakeEngine(), settings, latency, Admission(settings, latency), Metrics()
    )


def test_work_that_nobody_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    """Work given up before its turn is not done, and the thread goes on."""
    done: list[str] = []

    async def run() -> None:
        classifier = _classifier()
        turn = threading.Event()
        tasks = [
            asyncio.create_task(classifier.in_decoder(work, math.inf))
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


@pytest.mark.parametrize(
    ("provider", "threads", "images"),
    [(CPU, 1, 3), (CPU, 2, 1), ("CUDAExecutionProvider", 1, 1)],
    ids=["cpu", "a core without decoder", "gpu"],
)
def test_batch_while_images_wait_for_a_decoder(
    monkeypatch: pytest.MonkeyPatch, provider: str, threads: int, images: int
) -> None:
    """An engine on the CPU leaves the cores to decoders that have work; a GPU takes nothing."""
    decode = Decoders.decode

    inferred = threading.Event()
    # The second image comes late, or where it is not waited for, when the first is done.
    waits = iter([0.0, 5.0 if images == 1 else 0.1, 0.0, 0.0])

    def late(self: Decoders, upload: bytes) -> Picture:
        inferred.wait(next(waits))
        return decode(self, upload)

    def note(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        inferred.set()
        return logits

    monkeypatch.setattr(Decoders, "decode", late)
    monkeypatch.setattr("app.batcher.GATHER_S", 10.0)
    engine = FakeEngine(provider=provider, threads=threads, fault=note)

    async def run() -> None:
        classifier = _classifier(engine, max_batch=3)
        await classifier.classify([make_image()] * 4, time.monotonic() + 20)
        await classifier.close()

    asyncio.run(run())
    assert engine.batches[0] == images


def test_pictures_behind_an_engine_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images that nobody waits for any more, no picture stays in the queue."""
    inferring, go_on = threading.Event(), threading.Event()
    engine = FakeEngine()

    def hang(*_: object) -> NDArray[np.float32]:
        inferring.set()
        go_on.wait(20)
        return np.zeros((1, 3), np.float32)

    monkeypatch.setattr(engine, "infer", hang)
    decoded = []
    done = threading.Semaphore(0)
    decode = Decoders.decode

    def noted(self: Decoders, upload: bytes) -> Picture:
        picture = decode(self, upload)
        decoded.append(weakref.ref(picture.patches))
        done.release()
        return picture

    monkeypatch.setattr(Decoders, "decode", noted)

    async def run() -> None:
        classifier = _classifier(engine)
        entries = [classifier.submit(make_image(), "")]
        assert await asyncio.to_thread(inferring.wait, 20)
        entries += [classifier.submit(make_image(), "") for _ in range(8)]
        for _ in entries:
            assert await asyncio.to_thread(done.acquire, timeout=20)
        await classifier.in_decoder(lambda: None, math.inf)  # the last one is queued, too
        assert all(ref() is not None for ref in decoded)
        shape = entries[1].picture.patches.shape
        for entry in entries[1:]:
            entry.release()
        assert {entry.picture.patches.shape for entry in entries} == {shape}  # may yet be stacked
        kept = [ref() is not None for ref in decoded]
        go_on.set()
        await entries[0].future
        await classifier.close()
        assert kept == [True] + 8 * [False]

    asyncio.run(run())


def test_picture_that_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given up while it is decoded never reaches the queue."""
    put: list[Entry] = []
    monkeypatch.setattr("app.batcher.Batcher.put", lambda _, entry: put.append(entry))
    decode = Decoders.decode
    entries: list[Entry] = []

    def given_up(self: Decoders, upload: bytes) -> Picture:
        picture = decode(self, upload)
        entries[0].release()
        return picture

    async def run() -> None:
        classifier = _classifier()
        with monkeypatch.context() as patch:
            patch.setattr(Decoders, "decode", given_up)
            # Cancelled from a thread here, which the futures of the loop would not like elsewhere.
            entries.append(classifier.submit(make_image(), ""))
            await classifier.in_decoder(lambda: None, math.inf)
        assert put == []
        await classifier.close()

    asyncio.run(run())


def test_work_that_fails() -> None:
    """What work raises is raised where it was asked for, and the thread goes on."""

    async def run() -> None:
        classifier = _classifier()
        with pytest.raises(ZeroDivisionError):
            await classifier.in_decoder(lambda: 1 // 0, math.inf)
        assert await classifier.in_decoder(lambda: "next", math.inf) == "next"
        await classifier.close()

    asyncio.run(run())


def test_upload_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload given up before its turn is let go at once, and not decoded."""
    decoded: list[bytes] = []
    monkeypatch.setattr(Decoders, "decode", lambda _, upload: decoded.append(upload))

    async def run() -> None:
        classifier = _classifier()
        turn = threading.Event()
        task = asyncio.create_task(classifier.in_decoder(turn.wait, math.inf))
        await asyncio.sleep(0)  # it is queued
        entry = classifier.submit(b"given up", "")
        entry.release()
        assert not entry.upload, "it is still held for its turn"
        turn.set()
        await task
        await classifier.close()

    asyncio.run(run())
    assert decoded == []


def test_bug_beside_a_decoder(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug outside of what anybody waits for is logged, and the thread goes on."""
    monkeypatch.setattr(LatencyTable, "observe_decode", lambda *_: 1 // 0)

    async def run() -> None:
        classifier = _classifier()
        await classifier.submit(b"no image", "").future
        async with asyncio.timeout(10):
            assert await classifier.in_decoder(lambda: "next", math.inf) == "next"
        await classifier.close()

    asyncio.run(run())
    assert "a bug beside a decoder" in caplog.text


def test_outcomes_of_images(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics tell a bug of ours from what was wrong with an image."""
    client = serve()
    assert client.post("/classify", content=make_image()).status_code == 200
    assert client.post("/classify", content=b"no image").status_code == 415
    monkeypatch.setattr(Decoders, "decode", lambda *_: 1 // 0)
    assert client.post("/classify", content=make_image()).status_code == 500
    told = client.get("/metrics").text
    for outcome in ("ok", "unsupported-format", "bug"):
        assert f'mixer_images_total{{outcome="{outcome}"}} 1.0' in told


def test_spare_work_that_nobody_waits_for() -> None:
    """Of an explanation whose client has gone, only what is in the engine is inferred."""
    begun, turn = threading.Event(), threading.Event()

    def hold(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        begun.set()
        assert turn.wait(10)
        return logits

    engine = FakeEngine(fault=hold)
    pictures = [Picture("PNG", 8, 8, np.zeros((4, 48), np.uint8))] * 100

    async def run() -> None:
        classifier = _classifier(engine)
        deadline = time.monotonic() + 10
        task = asyncio.create_task(classifier.infer_spare(pictures, deadline))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        await asyncio.wait([task])
        turn.set()
        await classifier.infer_spare(pictures[:1], deadline)  # the last in line
        await classifier.close()

    asyncio.run(run())
    assert len(engine.batches) == 2


def test_dead_spare_work_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of an explanation is let go, even if there is never a moment to spare."""
    monkeypatch.setattr(
        Decoders, "decode", lambda *_: Picture("PNG", 8, 8, np.zeros((4, 48), np.uint8))
    )
    begun, turns = threading.Semaphore(0), threading.Semaphore(0)

    def hold(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        begun.release()
        assert turns.acquire(timeout=10)
        return logits

    async def run() -> None:
        classifier = _classifier(FakeEngine(fault=hold))
        deadline = time.monotonic() + 20

        async def ask() -> asyncio.Task[object]:
            task = asyncio.create_task(classifier.classify([b"image"], deadline))
            await asyncio.sleep(0)
            await classifier.in_decoder(lambda: None, math.inf)  # it is decoded
            return task

        tasks = [await ask()]
        assert await asyncio.to_thread(begun.acquire, timeout=10)
        tasks.append(await ask())  # one is in the engine, one waits
        spare = Picture("PNG", 8, 8, np.zeros((4, 48), np.uint8))
        held = weakref.ref(spare.patches)
        explaining = asyncio.create_task(classifier.infer_spare([spare], deadline))
        await asyncio.sleep(0)  # it is queued behind them
        del spare
        turns.release()
        assert await asyncio.to_thread(begun.acquire, timeout=10)
        tasks.append(await ask())  # the second is in the engine, what is spare has been put aside
        explaining.cancel()
        await asyncio.wait([explaining])
        del explaining
        assert held() is None
        turns.release()
        assert await asyncio.to_thread(begun.acquire, timeout=10)
        assert not classifier._batcher._spare
        turns.release()
        await asyncio.gather(*tasks)
        await classifier.close()

    asyncio.run(run())


def _wait_until_gone(held: Sequence[weakref.ref[object]]) -> None:
    give_up = time.monotonic() + 10
    while any(ref() is not None for ref in held):  # the threads may still be about it
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_idle_threads_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the threads did last is let go when it is done, not when the next comes."""
    held: list[weakref.ref[object]] = []

    def decode(*_: object) -> Picture:
        picture = Picture("PNG", 8, 8, np.zeros((4, 48), np.uint8))
        held.append(weakref.ref(picture.patches))
        return picture

    monkeypatch.setattr(Decoders, "decode", decode)

    async def run() -> None:
        classifier = _classifier(FakeEngine(threads=4))
        await classifier.classify([make_image()] * 16, time.monotonic() + 10)
        upload = np.zeros(4)
        held.append(weakref.ref(upload))
        await classifier.in_decoder(partial(len, upload), math.inf)
        del upload
        await asyncio.to_thread(_wait_until_gone, held)
        await classifier.close()

    asyncio.run(run())
    assert len(held) == 17
