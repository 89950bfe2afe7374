"""`POST /classify` and `/classify/batch`, through HTTP."""

import asyncio
import gzip
import json
import re
from typing import Any

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.predictions import softmax
from app.settings import Settings
from tests.conftest import Serve
from tests.fakes import FakeEngine, encode, make_card, make_image
from tests.processes import Server

RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)
JPEG = {"Content-Type": "image/jpeg"}


def problem(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """Check that `answer` is a problem of `status` and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    foreign = {"error"} if answer.url.path == "/" or answer.url.path.startswith("/v2") else set()
    assert set(body) == {"type", "title", "status", "detail"} | foreign
    assert body["status"] == status
    return body


def in_flight(client: TestClient) -> list[float]:
    """Return how many requests, bytes of bodies and images the service says it holds."""
    told = client.get("/metrics").text
    names = ("requests_in_flight", "body_bytes_in_flight", "queue_depth")
    return [float(told.partition(f"\nmixer_{name} ")[2].split()[0]) for name in names]


def labels(answer: httpx2.Response) -> list[str]:
    """Return the predicted labels, best first."""
    assert answer.status_code == 200, answer.text
    return [p["label"] for p in answer.json()["predictions"]]


def test_form_and_raw_agree(client: TestClient) -> None:
    """A multipart field and a raw body of the same image get the same answer."""
    image = make_image(GREEN)
    form = client.post("/classify", files={"file": image})
    raw = client.post("/classify", content=image, headers={"Content-Type": "image/png"})
    octets = client.post(
        "/classify", content=image, headers={"Content-Type": "application/octet-stream"}
    )
    untyped = client.post("/classify", content=image)
    assert form.status_code == 200, form.text
    assert form.json() == raw.json() == octets.json() == untyped.json()


@pytest.mark.parametrize(("fields", "status"), [(30, 200), (64, 200), (70, 400)])
def test_fields_beside_the_image(client: TestClient, fields: int, status: int) -> None:
    """A form may have 64 fields beside its image, but not 70."""
    texts = {f"note {number}": "x" * 20 for number in range(fields)}
    answer = client.post("/classify", files={"file": make_image()}, data=texts)
    assert answer.status_code == status, answer.text


def test_answer_shape(client: TestClient) -> None:
    """The answer names model and image, and its scores are softmax probabilities, best first."""
    answer = client.post("/classify", content=make_image(BLUE), headers=JPEG).json()
    assert answer["model"] == {"name": "fake", "version": "0" * 12}
    assert answer["image"] == {"format": "PNG", "width": 16, "height": 16}
    assert [p["label"] for p in answer["predictions"]] == ["blue", "red", "green"]
    assert [p["index"] for p in answer["predictions"]] == [2, 0, 1]
    scores = [p["score"] for p in answer["predictions"]]
    assert sum(scores) == pytest.approx(1)
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(1 / (1 + 2 * np.exp(-25)), rel=1e-6)


@pytest.mark.parametrize(("top_k", "count"), [(None, 3), (1, 1), (2, 2), (3, 3)])
def test_top_k(client: TestClient, top_k: int | None, count: int) -> None:
    """`top_k` labels come back, by default five or all of a model with fewer."""
    query = {} if top_k is None else {"top_k": top_k}
    answer = client.post("/classify", params=query, content=make_image(GREEN), headers=JPEG)
    assert labels(answer)[0] == "green"
    assert len(labels(answer)) == count


def test_top_k_default_is_five(serve: Serve) -> None:
    """A model with more than five classes answers with five labels by default."""
    engine = FakeEngine(
        card=make_card(labels=tuple("abcdefg")), fault=lambda x: np.tile(x, 3)[:, :7]
    )
    answer = serve(engine).post("/classify", content=make_image(RED), headers=JPEG)
    assert labels(answer) == ["a", "d", "g", "b", "c"]


@pytest.mark.parametrize("top_k", ["0", "-1", "4", "x", "1.5", "", "99999999999999999999"])
def test_bad_top_k(client: TestClient, top_k: str) -> None:
    """A `top_k` outside 1 to the number of classes is a 422 problem that names it."""
    answer = client.post(f"/classify?top_k={top_k}", content=make_image(), headers=JPEG)
    assert "top_k" in problem(answer, 422)["detail"]
    answer = client.post(f"/classify/batch?top_k={top_k}", files=[("files", make_image())])
    assert "top_k" in problem(answer, 422)["detail"]


def test_batch_order_and_bad_neighbour(client: TestClient) -> None:
    """Each image of a batch gets its own result in order, and a bad one fails alone."""
    images = [make_image(RED), b"not an image", make_image(GREEN), make_image(BLUE)[:60]]
    answer = client.post("/classify/batch?top_k=1", files=[("files", i) for i in images])
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert results[0]["predictions"][0]["label"] == "red"
    assert results[1]["problem"]["status"] == 415
    assert results[2]["predictions"][0]["label"] == "green"
    assert results[3]["problem"]["status"] == 422
    assert answer.json()["model"]["name"] == "fake"


def test_batch_larger_than_max_batch_is_split(serve: Serve) -> None:
    """A request with more images than one batch is answered whole, in several batches."""
    engine = FakeEngine(seconds=0.01)
    client = serve(engine, max_batch=4)
    engine.batches.clear()
    colors = [(i * 20, 100, 0) for i in range(11)]
    answer = client.post("/classify/batch", files=[("files", make_image(c)) for c in colors])
    assert len(answer.json()["results"]) == 11
    assert sum(engine.batches) == 11
    assert max(engine.batches) <= 4


def test_each_concurrent_request_gets_its_own_answer() -> None:
    """Ten thousand concurrent requests, each of another color, get each their own answer."""
    count = 10_000
    colors = [(n % 100, n // 100, 100) for n in range(count)]
    engine = FakeEngine()
    app = create_app(
        Settings(
            queue_size=count,
            max_requests=count,
            max_batch=64,
            queue_budget_ms=3_600_000,
            request_timeout_ms=3_600_000,
        ),
        engine,
    )

    async def run() -> list[httpx2.Response]:
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(
                transport=httpx2.ASGITransport(app), base_url="http://test", timeout=300
            ) as client,
        ):
            engine.batches.clear()
            return await asyncio.gather(
                *(client.post("/classify", content=encode_bmp(c), headers=JPEG) for c in colors)
            )

    answers = asyncio.run(run())
    for color, answer in zip(colors, answers, strict=True):
        expected = softmax((np.array(color) / 10).astype(np.float32))
        assert answer.status_code == 200, answer.text
        scores = {p["index"]: p["score"] for p in answer.json()["predictions"]}
        assert [scores[i] for i in range(3)] == pytest.approx(expected, abs=1e-5)
    assert sum(engine.batches) == count
    assert max(engine.batches) > 1


def encode_bmp(color: tuple[int, int, int]) -> bytes:
    """Return a tiny image file of one color; BMP, as it is the quickest to make."""
    return make_image(color, "BMP", side=8)


def broken(_: object) -> Any:
    """Fail as an engine does."""
    raise RuntimeError("CUDA error 700 in secret place")


def test_predictions_of_an_answer(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer holds so many predictions at most, however small the images are."""
    monkeypatch.setattr("app.routes.classify.MAX_PREDICTIONS", 6)
    files = [("files", make_image())] * 3
    assert client.post("/classify/batch?top_k=2", files=files).status_code == 200
    answer = client.post("/classify/batch?top_k=3", files=files)
    problem(answer, 422)
    assert answer.json()["detail"] == (
        "3 predictions for each of 3 images are more than the 6 that an answer may hold."
    )


class TestErrors:
    """Every error is a problem."""

    def test_empty(self, client: TestClient) -> None:
        """A request without an image is a 400 problem, in whichever way it is empty."""
        problem(client.post("/classify"), 400)
        problem(client.post("/classify", headers=JPEG), 400)
        problem(client.post("/classify", files={"file": b""}), 400)
        problem(client.post("/classify/batch"), 415)

    def test_empty_image_of_a_batch(self, client: TestClient) -> None:
        """An empty file among others fails alone, as it would by itself."""
        files = [("files", make_image()), ("files", b""), ("files", make_image())]
        answer = client.post("/classify/batch", files=files)
        assert answer.status_code == 200
        first, empty, last = answer.json()["results"]
        assert empty["problem"]["status"] == 400
        assert first["predictions"] == last["predictions"]

    def test_malformed_form(self, client: TestClient) -> None:
        """A form without the field, the boundary or its end is a 400 problem that says so."""
        image = make_image()
        wrong = client.post("/classify", files={"picture": image})
        assert "'file'" in problem(wrong, 400)["detail"]
        twice = client.post("/classify", files=[("file", image), ("file", image)])
        assert "/classify/batch" in problem(twice, 400)["detail"]
        form = {"Content-Type": "multipart/form-data"}
        assert (
            "boundary"
            in problem(client.post("/classify", content=b"x", headers=form), 400)["detail"]
        )
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        part = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + image + b"\r\n--b"
        cut = client.post("/classify", content=part + b"\r\n", headers=form)
        assert "ends before" in problem(cut, 400)["detail"]
        assert client.post("/classify", content=part + b"--\r\n", headers=form).status_code == 200
        nameless = client.post("/classify", content=part + b"\r\n\r\nx\r\n--b--\r\n", headers=form)
        assert nameless.status_code == 200, nameless.text  # a part, but no second 'file'
        junk = client.post("/classify", content=b"junk", headers=form)
        assert "cannot be read" in problem(junk, 400)["detail"]

    def test_headers_of_a_part_in_any_case(self, client: TestClient) -> None:
        """The names of a part's headers count in any case (RFC 9110, section 5.1)."""
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        for name in (b"content-disposition", b"CONTENT-DISPOSITION"):
            part = b"--b\r\n" + name + b': form-data; name="file"\r\n\r\n' + make_image()
            answer = client.post("/classify", content=part + b"\r\n--b--\r\n", headers=form)
            assert answer.status_code == 200, answer.text

    def test_body_over_limit(self, serve: Serve) -> None:
        """A body over the limit is a 413 problem, with or without a declared length."""
        client = serve(max_upload_bytes=2000)
        answer = client.post("/classify", content=b"x" * 2001, headers=JPEG)
        assert "2000 bytes" in problem(answer, 413)["detail"]
        assert answer.headers["connection"] == "close"
        problem(client.post("/classify", content=iter([b"x" * 1500] * 2), headers=JPEG), 413)
        problem(client.post("/classify/batch", files=[("files", b"x" * 2000)]), 413)
        problem(client.post("/classify", content=b"x" * 2000, headers=JPEG), 415)

    def test_pixels_over_limit(self, serve: Serve) -> None:
        """An image whose header declares more pixels than the limit is a 413 problem."""
        client = serve(max_pixels=255)
        answer = client.post("/classify", content=make_image(side=16), headers=JPEG)
        assert "16 x 16" in problem(answer, 413)["detail"]
        assert client.post("/classify", content=make_image(side=15)).status_code == 200

    def test_foreign_formats(self, client: TestClient) -> None:
        """Formats and media types outside the allowed ones are 415 problems."""
        for file_format in ("TIFF", "ICO", "PPM"):
            image = make_image(file_format=file_format)
            problem(client.post("/classify", content=image, headers=JPEG), 415)
        problem(client.post("/classify", content=b"hello", headers=JPEG), 415)
        for media_type in ("text/plain", "application/x-www-form-urlencoded", "application/pdf"):
            answer = client.post(
                "/classify", content=make_image(), headers={"Content-Type": media_type}
            )
            assert "image/*" in problem(answer, 415)["detail"]
        raw = client.post("/classify/batch", content=make_image(), headers=JPEG)
        assert "'files'" in problem(raw, 415)["detail"]

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
    def test_truncated(self, client: TestClient, file_format: str) -> None:
        """A truncated file of an allowed format is a 422 problem, wherever it was cut."""
        whole = make_image(file_format=file_format, side=64)
        assert client.post("/classify", content=whole).status_code == 200
        for size in (16, len(whole) // 2, len(whole) * 3 // 4):
            problem(client.post("/classify", content=whole[:size]), 422)

    def test_unknown_route_and_method(self, client: TestClient) -> None:
        """Unknown paths and methods are 404 and 405 problems, the latter with Allow."""
        problem(client.get("/nowhere"), 404)
        answer = client.get("/classify")
        problem(answer, 405)
        assert answer.headers["allow"] == "POST"
        for path, methods in (
            ("/", "GET, HEAD, POST"),
            ("/livez", "GET, HEAD"),
            ("/v2", "GET, HEAD"),
        ):
            assert client.put(path).headers["allow"] == methods
        problem(client.put("/openapi.json"), 405)

    def test_other_spellings_lead_nowhere(self, client: TestClient) -> None:
        """A path with one slash more is not found: a redirect would have the image sent twice."""
        problem(client.post("/classify/", content=make_image(), follow_redirects=False), 404)

    def test_head(self, live: Server) -> None:
        """HEAD answers wherever GET does, with the same headers and no body."""
        for path in ("/", "/livez", "/model", "/metrics", "/docs", "/static/page.js", "/v2"):
            got, head = httpx2.get(f"{live.url}{path}"), httpx2.head(f"{live.url}{path}")
            assert head.status_code == got.status_code == 200, path
            assert head.headers["content-type"] == got.headers["content-type"]
            assert head.content == b""
        assert httpx2.head(f"{live.url}/classify").status_code == 405

    @pytest.mark.parametrize("path", ["/classify", "/explain", "/", "/v2/models/fake/infer"])
    def test_coded_body(self, client: TestClient, path: str) -> None:
        """A body with a Content-Encoding is a 415 problem that says what is taken instead."""
        packed = gzip.compress(make_image())
        answer = client.post(path, content=packed, headers={**JPEG, "Content-Encoding": "gzip"})
        assert "without Content-Encoding" in problem(answer, 415)["detail"]
        assert answer.headers["accept-encoding"] == "identity"

    def test_body_that_is_not_coded(self, client: TestClient) -> None:
        """`Content-Encoding: identity`, in any case, says that a body is as it is."""
        for coding in ("identity", "Identity"):
            headers = {**JPEG, "Content-Encoding": coding}
            answer = client.post("/classify", content=make_image(), headers=headers)
            assert answer.status_code == 200, answer.text

    def test_coded_body_past_the_framework(self, live: Server) -> None:
        """So it is on the way that the usual request takes."""
        packed = gzip.compress(make_image())
        headers = {**JPEG, "Content-Encoding": "gzip"}
        answer = httpx2.post(f"{live.url}/classify", content=packed, headers=headers)
        assert "without Content-Encoding" in problem(answer, 415)["detail"]
        assert httpx2.post(f"{live.url}/classify", content=make_image()).status_code == 200

    def test_queue_full(self, serve: Serve) -> None:
        """A request that finds no room is a 429 problem with Retry-After; the next one passes."""
        engine = FakeEngine()
        client = serve(engine, queue_size=4)
        engine.seconds = 0.5
        images = [("files", make_image())] * 3

        async def run() -> list[httpx2.Response]:
            async with httpx2.AsyncClient(
                transport=httpx2.ASGITransport(client.app), base_url="http://test"
            ) as other:
                return list(
                    await asyncio.gather(
                        *(other.post("/classify/batch", files=images) for _ in range(2))
                    )
                )

        assert client.portal is not None
        answers = sorted(client.portal.call(run), key=lambda answer: answer.status_code)
        assert answers[0].status_code == 200
        problem(answers[1], 429)
        assert int(answers[1].headers["retry-after"]) >= 1
        assert client.post("/classify", content=make_image()).status_code == 200

    def test_more_images_than_the_queue(self, serve: Serve) -> None:
        """A request with more images than the queue can ever hold is a 413 problem."""
        images = [("files", make_image())] * 5
        answer = serve(queue_size=4).post("/classify/batch", files=images)
        assert "at most 4" in problem(answer, 413)["detail"]

    def test_engine_that_raises(self, serve: Serve) -> None:
        """If the engine raises, that request gets a 500 problem and the next one passes."""
        engine = FakeEngine()
        client = serve(engine)
        engine.fault = broken
        body = problem(client.post("/classify", content=make_image()), 500)
        assert "secret" not in body["detail"]
        engine.fault = None
        assert client.post("/classify", content=make_image()).status_code == 200

    def test_failure_beside_the_engine(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever fails around the engine costs its batch alone, and so do too few logits."""
        client = serve(engine := FakeEngine())
        with monkeypatch.context() as patch:
            patch.setattr("app.batcher.np.isfinite", broken)
            problem(client.post("/classify", content=make_image()), 500)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "cut", broken)
            problem(client.post("/classify", content=make_image()), 500)
        engine.fault = lambda logits: logits[:0]
        problem(client.post("/classify", content=make_image()), 500)
        engine.fault = None
        assert client.post("/classify", content=make_image()).status_code == 200

    def test_logits_that_are_not_finite(self, serve: Serve) -> None:
        """NaN logits are a 500 problem for their image only."""

        def poison(logits: Any) -> Any:
            return np.where(logits[:, :1] > 20, np.nan, logits)

        engine = FakeEngine()
        client = serve(engine)
        engine.fault = poison
        problem(client.post("/classify", content=make_image(RED)), 500)
        files = [("files", make_image(c)) for c in (RED, GREEN)]
        results = client.post("/classify/batch", files=files).json()["results"]
        assert results[0]["problem"]["status"] == 500
        assert results[1]["predictions"][0]["label"] == "green"

    def test_bug(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        """An error nobody foresaw is a 500 problem that tells the client nothing of the inside."""
        client = serve()
        monkeypatch.setattr("app.decoder_link.DecoderLink.decode", lambda *_: 1 / 0)
        body = problem(client.post("/classify", content=make_image()), 500)
        assert "zero" not in body["detail"]
        assert in_flight(client) == [0, 0, 0]

    @pytest.mark.parametrize("path", ["/classify", "/classify/batch"])
    def test_nothing_is_left_in_flight(self, client: TestClient, path: str) -> None:
        """A problem over a body that is already here gives all of its bytes back."""
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        problem(client.post(path, content=b"--b\r\n", headers=form), 400)
        assert in_flight(client) == [0, 0, 0]

    def test_deadline_of_the_setting(self, serve: Serve) -> None:
        """A client that asks for more time than the setting allows does not get it."""
        client = serve(FakeEngine(seconds=0.2), max_batch=1, request_timeout_ms=100)
        headers = {"X-Request-Timeout-Ms": "10000"}
        problem(client.post("/classify", content=make_image(), headers=headers), 504)


def test_health_and_model(client: TestClient) -> None:
    """The health endpoints answer GET and HEAD, and /model shows card and provider."""
    for path, status in (("/livez", "live"), ("/readyz", "ready")):
        assert client.get(path).json() == {"status": status}
        assert client.head(path).status_code == 200
    card = client.get("/model").json()
    assert card["execution_provider"] == "FakeExecutionProvider"
    assert card["labels"] == ["red", "green", "blue"]
    assert "golden" not in str(card)


def test_openapi(client: TestClient) -> None:
    """The OpenAPI document describes both ways to upload and resolves all its references."""
    document = client.get("/openapi.json").json()
    content = document["paths"]["/classify"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "image/*", "application/octet-stream"} <= set(content)
    references = re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', json.dumps(document))
    assert "ProblemBody" in references
    assert set(references) <= set(document["components"]["schemas"])


def test_openapi_names_the_headers(client: TestClient) -> None:
    """Each route that classifies names the deadline's header, and shows what a refusal carries."""
    paths = client.get("/openapi.json").json()["paths"]
    posts = [operations["post"] for operations in paths.values() if "post" in operations]
    assert len(posts) == 6
    for operation in posts:
        assert "X-Request-Timeout-Ms" in operation["responses"]["504"]["description"]
        assert "Retry-After" in operation["responses"]["429"]["headers"]


def test_exif_turn_over_http(client: TestClient) -> None:
    """The answer reports the size as stored."""
    from PIL import Image

    image = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    answer = client.post("/classify", content=encode(image, "JPEG", exif=exif))
    assert answer.json()["image"] == {"format": "JPEG", "width": 20, "height": 10}
