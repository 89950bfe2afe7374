"""Batches: shares side by side, and the next batch before the last one is done."""

import asyncio
import gc
import math
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.testclient import TestClient

from app.batch import Batch
from app.batcher import GATHER_S, Batcher, _settle
from app.engine import OnnxEngine
from app.entry import Entry
from app.errors import InferenceFailed
from app.images import Picture
from app.latency import LatencyTable
from app.metrics import Metrics
from app.pulse import FAILURES_UNTIL_NOT_READY
from app.settings import EMBEDDED_MODEL
from app.shares import Share
from tests.conftest import Serve
from tests.fakes import FakeEngine, make_image

COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


class HeldEngine(FakeEngine):
    """Keeps the first share until all other images have been inferred."""

    def __init__(self, images: int) -> None:
        super().__init__(threads=2)
        self.left = images
        self.is_first = True
        self.others_done = threading.Event()

    def infer(self, patches: NDArray[np.uint8], share: Share) -> NDArray[np.float32]:
        """Return the logits, those of the first share last of all."""
        is_first, self.is_first = self.is_first, False
        self.left -= len(patches)
        if is_first and not self.others_done.wait(20):
            raise TimeoutError("the others waited for this share")
        if self.left == 0:
            self.others_done.set()
        return super().infer(patches, share)


def test_no_batch_waits_for_the_last_share_of_another(serve: Serve) -> None:
    """While one share is still inferred, the other thread works off batch after batch."""
    images = [make_image(COLORS[number % 3]) for number in range(9)]
    client = serve(HeldEngine(len(images)), max_batch=2)
    answer = client.post("/classify/batch", files=[("files", image) for image in images])
    best = [result["predictions"][0]["label"] for result in answer.json()["results"]]
    assert best == ["red", "green", "blue"] * 3


def test_probes_with_several_threads(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that has failed too often is probed, whichever of its threads saw the failure."""
    monkeypatch.setattr("app.batcher.PROBE_PERIOD_S", 0.05)
    engine = FakeEngine(threads=2, fault=lambda logits: logits[:0])
    client = serve(engine)
    for _ in range(FAILURES_UNTIL_NOT_READY):
        assert client.post("/classify", content=make_image()).status_code == 500
    assert client.post("/classify", content=make_image()).status_code == 503
    engine.fault = None
    wait_for(client, "/readyz", 200)
    assert client.post("/classify", content=make_image()).status_code == 200


def test_engine_that_hangs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """An inference without end fails readiness, then liveness, until it does end."""
    ahead = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead)
    monkeypatch.setattr("app.pulse.time", clock)
    engine = HungEngine()
    client = serve(engine)

    def health() -> tuple[int, int]:
        return client.get("/readyz").status_code, client.get("/livez").status_code

    try:
        late = {"X-Request-Timeout-Ms": "1000"}
        assert client.post("/classify", content=make_image(), headers=late).status_code == 504
        assert health() == (200, 200)
        # Half a minute fails the one, a minute the other, and 10 s less do not.
        for seconds, ready, live in (
            (20, 200, 200),
            (30, 503, 200),
            (50, 503, 200),
            (60, 503, 503),
        ):
            ahead = seconds
            assert health() == (ready, live)
    finally:
        engine.end.set()
    wait_for(client, "/livez", 200)
    assert client.post("/classify", content=make_image()).status_code == 200
    ahead += 100  # an engine that has nothing to do does not hang
    assert health() == (200, 200)


class HungEngine(FakeEngine):
    """Infers nothing until `end` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.end = threading.Event()

    def infer(self, patches: NDArray[np.uint8], share: Share) -> NDArray[np.float32]:
        """Return the logits, in the end."""
        assert self.end.wait(20)
        return super().infer(patches, share)


def wait_for(client: TestClient, path: str, status: int) -> None:
    """Wait until `path` is answered with `status`."""
    give_up = time.monotonic() + 10
    while client.get(path).status_code != status:
        assert time.monotonic() < give_up, f"{path} is never {status}"
        time.sleep(0.01)


def test_image_that_has_no_logits(serve: Serve) -> None:
    """A client whose image gives NaN again and again has its 500s, and others their service."""
    white = np.float32(25.5)
    engine = FakeEngine(fault=lambda logits: np.where(logits == white, np.float32("nan"), logits))
    client = serve(engine)
    for _ in range(2 * FAILURES_UNTIL_NOT_READY):
        assert client.post("/classify", content=make_image((255, 255, 255))).status_code == 500
        assert client.get("/readyz").status_code == 200
    assert client.post("/classify", content=make_image((9, 9, 9))).status_code == 200


@pytest.fixture
def entries() -> Iterator[list[Entry]]:
    """Return seven entries, each of whose pictures is all of its own number."""
    loop = asyncio.new_event_loop()
    found = []
    for number in range(7):
        entry = Entry(b"", loop.create_future())
        entry.picture = Picture("PNG", 8, 8, np.full((4, 48), number, np.uint8))
        found.append(entry)
    yield found
    loop.close()


class HeldBatches(FakeEngine):
    """Keeps its first batches until the end; of those of two images the first has no logits."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads=threads)
        self.begun = threading.Semaphore(0)
        self.turn = threading.Event()

    def run(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the logits when it is time."""
        logits = super().run(patches)
        if len(patches) == 2:
            logits[0] = np.nan
        self.begun.release()
        assert self.turn.wait(20)
        return logits

    async def close_over(self, entries: list[Entry], max_batch: int) -> Batcher:
        """Close a batcher whose threads have each an image, while the others are queued."""
        batcher = Batcher(self, max_batch, LatencyTable(max_batch, 1), Metrics())
        for number, entry in enumerate(entries):
            batcher.put(entry)
            assert number >= self.threads or self.begun.acquire(timeout=10)
        closing = threading.Thread(target=batcher.close, daemon=True)
        closing.start()
        closing.join(0.1)  # by now it has asked them to end
        self.turn.set()
        closing.join(10)
        assert not closing.is_alive(), "a thread never ended"
        await asyncio.sleep(0)  # what they have handed over
        return batcher


@pytest.fixture
def engine() -> FakeEngine:
    """Return an engine that is as quick as can be."""
    return FakeEngine()


@contextmanager
def batching(engine: FakeEngine, coming: int) -> Iterator[Batcher]:
    """Batch three images at a time while `coming` more seem to wait for the cores."""
    loop = asyncio.new_event_loop()

    async def start() -> Batcher:
        return Batcher(engine, 3, LatencyTable(3, 1), Metrics(), lambda: coming)

    batcher = loop.run_until_complete(start())
    try:
        yield batcher
    finally:
        batcher.close()
        loop.close()


def wait_until_inferred(engine: FakeEngine, images: int) -> None:
    """Wait until so many images have been inferred."""
    give_up = time.monotonic() + 30  # beyond the 10 s for which a batch may gather
    while sum(engine.batches) < images:
        assert time.monotonic() < give_up
        time.sleep(0.001)


def test_batch_gathers_what_is_coming(
    entries: list[Entry], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While enough images wait for the cores to fill a batch, it waits for them."""
    monkeypatch.setattr("app.batcher.GATHER_S", 10.0)
    with batching(engine, coming=2) as batcher:
        for entry in entries[:3]:
            batcher.put(entry)
            time.sleep(0.02)
        wait_until_inferred(engine, 3)
    assert engine.batches == [3]


def test_batch_does_not_wait_for_too_few(
    entries: list[Entry], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that what is coming would not fill goes at once."""
    monkeypatch.setattr("app.batcher.GATHER_S", math.inf)
    with batching(engine, coming=1) as batcher:
        batcher.put(entries[0])
        wait_until_inferred(engine, 1)
    assert engine.batches == [1]


def test_image_given_up_while_its_batch_gathers(
    entries: list[Entry], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that nobody waits for any more leaves the batch that gathers."""
    monkeypatch.setattr("app.batcher.GATHER_S", 10.0)
    with batching(engine, coming=2) as batcher:
        batcher.put(entries[0])
        time.sleep(0.02)
        entries[0].release()
        batcher.put(entries[1])
        batcher.put(entries[2])
        wait_until_inferred(engine, 2)
    assert engine.batches == [2]


def test_batch_does_not_gather_for_ever(entries: list[Entry], engine: FakeEngine) -> None:
    """Decoders that hang over what is coming hold up what is decoded for a moment only."""
    with batching(engine, coming=100) as batcher:
        start = time.monotonic()
        batcher.put(entries[0])
        wait_until_inferred(engine, 1)
        assert time.monotonic() - start >= GATHER_S


def test_shares_in_any_order(entries: list[Entry]) -> None:
    """Each image gets its own logits, whichever share is inferred first."""
    batch = Batch(entries, [Share(3), Share(2), Share(2)])
    assert [batch.infer(number, FakeEngine()) for number in (2, 0, 1)] == [False, False, True]
    assert batch.logits()[:, 0].tolist() == pytest.approx([number / 10 for number in range(7)])


def test_one_share_that_fails(entries: list[Entry]) -> None:
    """A batch one of whose shares failed has no logits, and is done with its last share."""
    batch = Batch(entries, [Share(4), Share(3)])
    broken = FakeEngine(fault=lambda logits: logits[:0])
    assert not batch.infer(0, broken)
    assert batch.infer(1, FakeEngine())
    with pytest.raises(RuntimeError, match="0 logits for 4 images"):
        batch.logits()


def test_failed_batch_goes_at_once(entries: list[Entry]) -> None:
    """A batch that failed is gone with its last user, pictures and all, without the collector."""
    batch = Batch(entries, [Share(7)])
    batch.infer(0, FakeEngine(fault=lambda logits: logits[:0]))
    gc.disable()
    try:
        with suppress(RuntimeError):
            batch.logits()
        left = weakref.ref(batch)
        del batch
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("logits", [np.zeros((2, 3), np.float32), None])
def test_given_up_beside_wanted(entries: list[Entry], logits: NDArray[np.float32] | None) -> None:
    """An image that nobody waits for any more costs its neighbour nothing, nor its problem."""
    given_up, wanted = entries[:2]
    given_up.release()
    _settle([given_up, wanted], logits)
    assert isinstance(wanted.future.result(), InferenceFailed if logits is None else np.ndarray)


def test_logits_are_held_singly(entries: list[Entry]) -> None:
    """Whoever keeps the logits of an image keeps none of its batch's other images."""
    _settle(entries[:2], np.zeros((2, 3), np.float32))
    logits = entries[0].future.result()
    assert isinstance(logits, np.ndarray)
    assert logits.base is None


def test_bad_images_are_not_a_bad_engine(entries: list[Entry]) -> None:
    """However many batches hold an image whose logits are not finite, the others show it works."""
    engine = HeldBatches(threads=1)
    batcher = asyncio.run(engine.close_over(entries, max_batch=2))
    assert engine.batches == [1, 2, 2, 2]
    assert batcher.pulse.failures == 0


@pytest.mark.parametrize("max_batch", [1, 2, 16])
def test_close_answers_what_is_queued(entries: list[Entry], max_batch: int) -> None:
    """What is queued when it ends is answered first, and every thread of the engine ends."""
    asyncio.run(HeldBatches(threads=2).close_over(entries, max_batch))
    assert all(entry.future.done() for entry in entries)


@pytest.mark.parametrize("is_small", [True, False])
def test_shares_are_the_whole_batch(monkeypatch: pytest.MonkeyPatch, is_small: bool) -> None:
    """Shares hold all images and none is empty; of a small model none is left to all threads."""
    if not is_small:
        monkeypatch.setattr("app.engine._SMALL", 0)
    engine = OnnxEngine(EMBEDDED_MODEL, "cpu", 3)
    for images in range(1, 33):
        shares = engine.cut(images)
        assert sum(share.images for share in shares) == images
        assert min(share.images for share in shares) > 0
        left = [share.images for share in shares if share.is_wide]
        assert left == ([images % 3] if images % 3 and not is_small else [])
