"""`POST /explain`: which patches speak for the label."""

import asyncio
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import SimpleNamespace
from unittest.mock import Mock

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from starlette.testclient import TestClient

from app.batcher import Batcher
from app.entry import Entry
from app.explain import Explanation, _heat
from app.images import Picture
from app.service import Service
from tests.app.test_classify import problem
from tests.conftest import Serve
from tests.fakes import FakeEngine, encode, make_card, make_image
from tests.processes import Server

# The fake model's patches are 4 × 4 pixels and its logits the mean color: on a green image with
# one red corner, that corner alone speaks for red.
SIDE = 8


def corner() -> bytes:
    """Return a green image whose upper right patch is red."""
    image = Image.new("RGB", (SIDE, SIDE), (0, 200, 0))
    image.paste((250, 0, 0), (4, 0, 8, 4))
    return encode(image)


def explain(client: TestClient, image: bytes, **query: int) -> httpx2.Response:
    """Ask why `image` is what it is."""
    return client.post("/explain", content=image, params=query)


def service(client: TestClient) -> Service:
    """Return the service behind a client."""
    found: Service = client.app.state.service  # type: ignore[attr-defined] # starlette types any ASGI app
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, for half a minute at most."""
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_grid_points_at_the_patch(client: TestClient) -> None:
    """Hiding the only patch that shows a label costs most, hiding the others gains."""
    answer = explain(client, corner(), index=0)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["prediction"]["label"] == "red"
    assert found["cell_pixels"] == 4
    grid = np.array(found["importance"])
    assert grid.shape == (2, 2)
    assert grid.argmax() == 1
    assert grid[0, 1] > 0 > max(grid[0, 0], grid[1, 0], grid[1, 1])


def test_hidden_is_the_mean_color(client: TestClient) -> None:
    """What a cell costs is what the label loses when the cell shows the image's mean color."""
    pixels = np.zeros((2, 2, 3))
    pixels[:] = (0, 200, 0)
    pixels[0, 1] = (250, 0, 0)
    hidden = pixels.copy()
    hidden[0, 1] = pixels.mean(axis=(0, 1)).round()

    def log_probability(cells: "np.typing.NDArray[np.float64]") -> float:
        logits = cells.mean(axis=(0, 1)) / 10
        return float(logits[0] - np.log(np.exp(logits).sum()))

    lost = log_probability(pixels) - log_probability(hidden)
    found = explain(client, corner(), index=0).json()["importance"]
    assert found[0][1] == pytest.approx(lost, abs=1e-4)


def test_best_label_is_explained_by_default(client: TestClient) -> None:
    """Without an index the best label is explained, with the score that `/classify` gives it."""
    found = explain(client, corner()).json()
    [best] = client.post("/classify?top_k=1", content=corner()).json()["predictions"]
    assert found["prediction"] == best
    assert found["importance"][0][1] < 0


def test_png(client: TestClient) -> None:
    """With `Accept: image/png` the model's view comes back, bright where it matters."""
    answer = client.post("/explain?index=0", content=corner(), headers={"Accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    image = Image.open(io.BytesIO(answer.content)).convert("RGB")
    assert image.width == image.height >= 448
    third, far = image.width // 6, image.width - image.width // 6
    assert image.getpixel((far, third)) == pytest.approx((250, 0, 0), abs=12)
    green = image.getpixel((third, far))
    assert isinstance(green, tuple)
    assert green[1] < 100  # darkened, and drained of its color


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("text/html, IMAGE/PNG;q=0.5", "image/png"),
        ("image/png;q=0, application/json", "application/json"),
        ("image/png, application/json", "image/png"),
        ("image/png;q=0.5, application/json;q=0.9", "application/json"),
        ("image/png, application/json;q=0.9", "image/png"),
        ("application/json;q=0.5, image/png;q=0.9", "image/png"),
        ("image/*", "application/json"),
        ("*/*", "application/json"),
    ],
)
def test_accept(client: TestClient, accept: str, media_type: str) -> None:
    """The picture comes where Accept names PNG, and JSON no higher, else JSON."""
    answer = client.post("/explain", content=corner(), headers={"Accept": accept})
    assert answer.headers["content-type"] == media_type


def test_inferences_are_bounded(serve: Serve) -> None:
    """A fine grid is hidden in larger cells, so that one explanation costs at most 256 images."""
    engine = FakeEngine(card=make_card(image_size=4 * 40))
    client = serve(engine)
    engine.batches.clear()
    found = explain(client, make_image(side=160)).json()
    assert len(found["importance"]) == 14
    assert found["cell_pixels"] == 12
    assert sum(engine.batches) == 14 * 14 + 1


def test_slow_engine_gets_larger_cells(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an inference is slow, fewer and larger cells keep the explanation in its budget."""
    # What is measured as the service starts takes 0.2 s each, whatever it really takes.
    clock = SimpleNamespace(perf_counter=count(step=0.2).__next__, monotonic=time.monotonic)
    monkeypatch.setattr("app.latency.time", clock)
    client = serve(FakeEngine(card=make_card(image_size=4 * 12)), max_batch=1)
    found = explain(client, make_image(side=48)).json()
    assert len(found["importance"]) == 3


def test_bad_index(client: TestClient) -> None:
    """An index outside the model's labels is a 422 problem."""
    for index in (3, -1):
        assert "index" in problem(explain(client, corner(), index=index), 422)["detail"]


def test_bad_image(client: TestClient) -> None:
    """A bad upload is the same problem as on `/classify`, and in nobody's way afterwards."""
    problem(explain(client, b"hello"), 415)
    problem(explain(client, b""), 400)
    assert explain(client, corner()).status_code == 200


def test_one_at_a_time_and_last_in_line(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second explanation is refused with 429, while requests overtake the first."""
    engine = FakeEngine(card=make_card(image_size=4 * 12))
    client = serve(engine, max_batch=4)
    queued, begun, turns = (threading.Semaphore(0) for _ in range(3))
    best: list[int] = []  # label of each batch's first image
    put = Batcher.put

    def noted(self: Batcher, entry: Entry) -> None:
        put(self, entry)
        if not entry.is_spare:
            queued.release()

    def hold(logits: NDArray[np.float32]) -> NDArray[np.float32]:
        best.append(int(logits[0].argmax()))
        begun.release()
        assert turns.acquire(timeout=20)
        return logits

    monkeypatch.setattr(Batcher, "put", noted)
    engine.fault = hold
    image = make_image((0, 255, 0), side=48)
    red = make_image(side=48)

    async def run() -> tuple[httpx2.Response, httpx2.Response, httpx2.Response]:
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(client.app), base_url="http://test"
        ) as other:
            first = asyncio.create_task(other.post("/explain", content=image))
            turns.release()
            for step in (queued, begun, begun):  # it is classified, then some of it is hidden
                assert await asyncio.to_thread(step.acquire, timeout=20)
            second = await other.post("/explain", content=image)
            asked = asyncio.create_task(other.post("/classify", content=red))
            assert await asyncio.to_thread(queued.acquire, timeout=20)
            turns.release(2)  # for what is under way, and for what overtakes the rest
            passing = await asked
            assert not first.done()
            turns.release(1000)
            return await first, second, passing

    assert client.portal is not None
    try:
        explained, second, passing = client.portal.call(run)
    finally:
        turns.release(1000)  # else the end waits for batch after batch
    assert explained.status_code == passing.status_code == 200
    assert "retry-after" in second.headers
    problem(second, 429)
    assert best[:4] == [1, 1, 0, 1]
    assert explain(client, image).status_code == 200


def test_refused_while_requests_wait(serve: Serve) -> None:
    """A service whose queue is long has no time to explain: 429."""
    engine = FakeEngine(seconds=0.1)
    client = serve(engine, max_batch=1, queue_budget_ms=60_000)
    answered = threading.Event()
    engine.fault = lambda logits: logits if answered.wait(20) else logits[:0]

    async def run() -> httpx2.Response:
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(client.app), base_url="http://test"
        ) as other:
            waiting = [
                asyncio.create_task(other.post("/classify", content=make_image())) for _ in range(5)
            ]
            admission = service(client).admission
            await asyncio.to_thread(wait_until, lambda: admission.images == len(waiting))
            answer = await other.post("/explain", content=corner())
            answered.set()
            await asyncio.gather(*waiting)
            return answer

    assert client.portal is not None
    problem(client.portal.call(run), 429)


def test_deadline(serve: Serve) -> None:
    """An explanation that finds no spare time before its deadline is a 504 problem."""
    engine = FakeEngine(card=make_card(image_size=4 * 12))
    client = serve(engine, max_batch=1)
    engine.seconds = 0.05
    answer = client.post(
        "/explain", content=make_image(side=48), headers={"X-Request-Timeout-Ms": "400"}
    )
    problem(answer, 504)
    engine.seconds = 0
    assert client.post("/classify", content=make_image()).status_code == 200


def test_overlay_that_is_not_drawn_in_time(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An explanation whose picture is not drawn before its deadline is a 504 problem."""
    drawn = threading.Event()
    monkeypatch.setattr("app.explain._overlay", lambda *_: drawn.wait(20) and b"")
    headers = {"Accept": "image/png", "X-Request-Timeout-Ms": "2000"}
    answer = client.post("/explain", content=corner(), headers=headers)
    problem(explain(client, corner()), 429)  # a thread still draws
    drawn.set()
    assert "not drawn in time" in problem(answer, 504)["detail"]


def test_overlay_without_a_process(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """An explanation for whose picture no process can be had is a 503, as an image is."""
    client = serve()
    monkeypatch.setattr("app.decoder_link.nursery", Mock(side_effect=BlockingIOError))
    answer = client.post("/explain", content=corner(), headers={"Accept": "image/png"})
    problem(answer, 503)


def test_overlay_is_counted_and_alone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a picture is drawn its image is counted, and another explanation gets 429."""
    drawing, drawn = threading.Event(), threading.Event()

    def draw(*_: object) -> bytes:
        drawing.set()
        return b"picture" if drawn.wait(20) else b""

    monkeypatch.setattr("app.explain._overlay", draw)
    client = serve(FakeEngine(), decode_threads=2)
    headers = {"Accept": "image/png"}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/explain", content=corner(), headers=headers)
        assert drawing.wait(20)
        assert "mixer_queue_depth 1.0" in client.get("/metrics").text
        refused = explain(client, corner())
        problem(refused, 429)
        assert refused.headers["retry-after"] == "2"  # what an explanation may take
        drawn.set()
        assert asked.result().content == b"picture"
    assert "mixer_queue_depth 0.0" in client.get("/metrics").text


def test_embedded_model(live: Server) -> None:
    """The embedded model explains a picture in cells of whole patches, larger where it is slow."""
    pixels = np.random.default_rng(7).integers(0, 255, (40, 60, 3), np.uint8)
    answer = httpx2.post(f"{live.url}/explain", content=encode(Image.fromarray(pixels)), timeout=30)
    found = answer.json()
    assert found["cell_pixels"] in range(4, 33, 4)
    side = -(-32 // found["cell_pixels"])
    assert np.array(found["importance"]).shape == (side, side)


def test_brightness() -> None:
    """A cell is as bright as it would matter uncut; noise, and what speaks against, is dark."""

    def heat(importance: list[list[float]]) -> list[list[int]]:
        picture = Picture("PNG", 1, 1, np.zeros((1, 1), np.uint8))
        found = Explanation(picture, 0, 1.0, np.array(importance), cell_pixels=64)
        bright = _heat(found, image_size=160)  # two and a half cells
        return [[round(cell) for cell in row] for row in bright]

    assert heat([[0.8, 0.8, 0.4], [0.2, 0.8, 0.4], [0.4, 0.4, 0.2]]) == [
        [255, 255, 255],
        [128, 255, 255],
        [255, 255, 255],
    ]
    assert max(map(max, heat([[0.0001] * 3] * 3))) < 60
    assert max(map(max, heat([[-1.3] * 3, [0.002] * 3, [-1.0] * 3]))) < 20
