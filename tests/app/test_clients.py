"""Clients that exist already: Hugging Face's, Triton's, and those with nothing but JSON."""

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from starlette.testclient import TestClient

from app.documents import _READER
from app.predictions import softmax
from tests.app.test_classify import problem
from tests.conftest import Serve
from tests.fakes import FakeEngine, encode, make_image
from tests.processes import Server

GREEN = make_image((0, 250, 0))
TEXT = base64.b64encode(GREEN).decode()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Return a file with a colorful picture."""
    pixels = np.random.default_rng(7).integers(0, 255, (40, 60, 3), np.uint8)
    file = tmp_path / "photo.png"
    Image.fromarray(pixels).save(file)
    return file


def classify(live: Server, data: bytes, top_k: int = 10) -> dict[str, float]:
    """Return the score of each label as `/classify` gives it."""
    answer = httpx2.post(f"{live.url}/classify?top_k={top_k}", content=data)
    return {p["label"]: p["score"] for p in answer.json()["predictions"]}


class TestBase64:
    """JSON with base64 on `/classify`."""

    def test_agrees_with_raw(self, client: TestClient) -> None:
        """An image in base64 gets the answer of its raw bytes, as a data URL and in lines, too."""
        raw = client.post("/classify?top_k=2", content=GREEN).json()
        lines = base64.encodebytes(GREEN).decode()
        for text in (TEXT, f"data:image/png;base64,{TEXT}", lines):
            assert client.post("/classify?top_k=2", json={"image": text}).json() == raw

    @pytest.mark.parametrize(
        ("body", "status", "word"),
        [
            ("", 400, "empty"),
            ("{", 400, "not JSON"),
            ("[" * 5000, 400, "not JSON"),
            ("[]", 422, "body"),
            ("{}", 422, "image"),
            ('{"image": 1}', 422, "base64"),
            ('{"image": null}', 422, "base64"),
            ('{"image": "*"}', 422, "base64"),
            ('{"image": "data:image/png;base64"}', 422, "without data"),
            ('{"image": ""}', 400, "empty"),
            ('{"image": "aGVsbG8="}', 415, "JPEG"),
        ],
    )
    def test_problems(self, client: TestClient, body: str, status: int, word: str) -> None:
        """What is no JSON, no base64 or no image is a problem that says which."""
        headers = {"Content-Type": "application/json"}
        for path in ("/classify", "/"):
            text = body if path == "/classify" else body.replace("image", "inputs")
            word_here = word if path == "/classify" else word.replace("image", "inputs")
            answer = client.post(path, content=text, headers=headers)
            assert word_here in problem(answer, status)["detail"]

    def test_in_slices(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        """A text that is decoded in slices is an image as ever, and has padding at its end only."""
        raw = client.post("/classify", content=GREEN).json()
        monkeypatch.setattr("app.documents._BASE64_LETTERS", 8)
        for text in (TEXT, base64.encodebytes(GREEN).decode()):
            assert client.post("/classify", json={"image": text}).json() == raw
        for inside in ("aGVsbG8=", "aA=="):  # at the end of a slice, and before
            answer = client.post("/classify", json={"image": inside + TEXT})
            assert "not base64" in problem(answer, 422)["detail"]

    @pytest.mark.parametrize("path", ["/classify", "/", "/v2/models/fake/infer"])
    def test_behind_another_document(self, client: TestClient, path: str) -> None:
        """A document that has to wait for others' is answered by its deadline."""
        others_are_done = threading.Event()
        other = _READER.submit(others_are_done.wait, 20)
        headers = {"X-Request-Timeout-Ms": "200"}
        start = time.monotonic()
        answer = client.post(path, json={"image": TEXT, "inputs": TEXT}, headers=headers)
        assert time.monotonic() - start < 10
        others_are_done.set()
        assert problem(answer, 504)["title"] == "Deadline exceeded"
        assert other.result()


class TestHuggingFace:
    """`huggingface_hub.InferenceClient` on `POST /`."""

    def test_photo_by_path(self, live: Server, photo: Path) -> None:
        """A client that knows only the address gets the five best labels of a photo."""
        answer = InferenceClient(live.url).image_classification(photo)
        scores = classify(live, photo.read_bytes())
        assert len(answer) == 5
        assert answer[0].score == max(scores.values())
        assert {one.label: one.score for one in answer}.items() <= scores.items()

    def test_photo_as_bytes(self, live: Server, photo: Path) -> None:
        """Bytes do as well as paths."""
        by_path = InferenceClient(live.url).image_classification(photo)
        assert InferenceClient(live.url).image_classification(photo.read_bytes()) == by_path

    def test_top_k(self, live: Server, photo: Path) -> None:
        """`top_k` is honoured; more than the model's classes means all of them."""
        client = InferenceClient(live.url)
        assert len(client.image_classification(photo, top_k=2)) == 2
        assert len(client.image_classification(photo, top_k=1000)) == 10

    def test_function_to_apply(self, serve: Serve) -> None:
        """Scores are softmax, sigmoid or the logits themselves."""
        client = serve()
        logits = np.array([0, 25, 0], np.float32)

        def scores(function: str | None) -> list[float]:
            parameters = {"function_to_apply": function, "top_k": 3}
            answer = client.post("/", json={"inputs": TEXT, "parameters": parameters})
            assert [one["label"] for one in answer.json()] == ["green", "red", "blue"]
            return [one["score"] for one in answer.json()]

        assert scores("none") == pytest.approx([25, 0, 0])
        assert scores("sigmoid") == pytest.approx([1 / (1 + np.exp(-25)), 0.5, 0.5])
        assert scores("softmax") == pytest.approx(softmax(logits)[[1, 0, 2]])
        assert scores(None) == scores("softmax")

    def test_forms_of_the_live_client(self, live: Server, photo: Path) -> None:
        """The client's own `function_to_apply` reaches the service."""
        client = InferenceClient(live.url)
        [best] = client.image_classification(photo, function_to_apply="none", top_k=1)
        [sure] = client.image_classification(photo, function_to_apply="softmax", top_k=1)
        assert best.label == sure.label
        assert best.score != sure.score

    def test_problem(self, live: Server) -> None:
        """What is no image reaches the client as an error of its own with our words in it."""
        with pytest.raises(HfHubHTTPError, match="not a JPEG"):
            InferenceClient(live.url).image_classification(b"hello")

    @pytest.mark.parametrize(
        "parameters", [{"top_k": 0}, {"top_k": "x"}, {"function_to_apply": "tanh"}, 3]
    )
    def test_bad_parameters(self, client: TestClient, parameters: Any) -> None:
        """A parameter out of range is a 422 problem that names it."""
        answer = client.post("/", json={"inputs": TEXT, "parameters": parameters})
        assert "parameters" in problem(answer, 422)["detail"]


class TestTritonClient:
    """`tritonclient.http` on `/v2`."""

    @pytest.fixture
    def triton(self, live: Server) -> Any:
        """Return Triton's client, or skip."""
        http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
        client = http.InferenceServerClient(live.url.removeprefix("http://"))
        yield client
        client.close()

    def test_health_and_metadata(self, live: Server, triton: Any) -> None:
        """Server and model are live, ready and described."""
        assert triton.is_server_live()
        assert triton.is_server_ready()
        assert triton.is_model_ready("mixer-cifar10")
        assert "binary_tensor_data" in triton.get_server_metadata()["extensions"]
        found = triton.get_model_metadata("mixer-cifar10")
        version = httpx2.get(f"{live.url}/model").json()["version"]
        assert found["versions"] == [version]
        assert triton.is_model_ready("mixer-cifar10", version)
        assert found["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]

    def test_binary(self, live: Server, triton: Any, photo: Path) -> None:
        """Encoded images in binary come back as labels, indices and scores in binary."""
        import tritonclient.http as http

        images = [photo.read_bytes(), encode(Image.new("RGB", (50, 40), "navy"), "JPEG")]
        tensor = http.InferInput("image", [2], "BYTES")
        tensor.set_data_from_numpy(np.array(images, object))
        answer = triton.infer("mixer-cifar10", [tensor], request_id="7", parameters={"top_k": 3})
        assert answer.get_response()["id"] == "7"
        labels, scores = answer.as_numpy("label"), answer.as_numpy("score")
        assert labels.shape == scores.shape == answer.as_numpy("index").shape == (2, 3)
        for row, image in enumerate(images):
            expected = classify(live, image, 3)
            found = {label.decode(): score for label, score in zip(labels[row], scores[row])}  # noqa: B905 - same shape, as asserted
            assert found == pytest.approx(expected, rel=1e-6)

    def test_probabilities_and_classification(self, triton: Any, photo: Path) -> None:
        """All probabilities come on demand, and Triton's classification extension as text."""
        import tritonclient.http as http

        tensor = http.InferInput("image", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[photo.read_bytes()]], object))
        wanted = [
            http.InferRequestedOutput("probabilities", binary_data=False),
        ]
        answer = triton.infer("mixer-cifar10", [tensor], outputs=wanted)
        probabilities = answer.as_numpy("probabilities")
        assert probabilities.shape == (1, 10)
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)
        wanted = [http.InferRequestedOutput("probabilities", class_count=2)]
        answer = triton.infer("mixer-cifar10", [tensor], outputs=wanted)
        score, index, label = answer.as_numpy("probabilities")[0, 0].decode().split(":")
        assert float(score) == pytest.approx(probabilities.max(), abs=1e-5)
        assert int(index) == probabilities.argmax()
        assert label

    def test_json(self, triton: Any, live: Server, photo: Path) -> None:
        """Images as base64 in JSON do as well."""
        import tritonclient.http as http

        tensor = http.InferInput("image", [1], "BYTES")
        text = np.array([base64.b64encode(photo.read_bytes()).decode()], object)
        tensor.set_data_from_numpy(text, binary_data=False)
        wanted = [http.InferRequestedOutput("label", binary_data=False)]
        answer = triton.infer("mixer-cifar10", [tensor], outputs=wanted)
        best = max(classify(live, photo.read_bytes()).items(), key=lambda pair: pair[1])[0]
        assert answer.as_numpy("label")[0, 0] == best

    def test_errors(self, triton: Any) -> None:
        """Errors reach the client in our words."""
        import tritonclient.http as http
        from tritonclient.utils import InferenceServerException

        tensor = http.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([b"hello"], object))
        with pytest.raises(InferenceServerException, match="not a JPEG"):
            triton.infer("mixer-cifar10", [tensor])
        with pytest.raises(InferenceServerException, match="The model here is"):
            triton.infer("resnet", [tensor])
        assert not triton.is_model_ready("resnet")


class TestInferenceProtocol:
    """`/v2` on the wire."""

    URL = "/v2/models/fake/infer"

    def body(self, **changes: Any) -> dict[str, Any]:
        """Return a request for one image."""
        tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [TEXT]}
        return {"inputs": [{**tensor, **changes}]}

    def test_json(self, client: TestClient) -> None:
        """JSON in, JSON out, in the shapes of the protocol."""
        answer = client.post(self.URL, json={**self.body(), "id": "a", "parameters": {"top_k": 2}})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["model_name"] == "fake"
        assert found["id"] == "a"
        assert found["outputs"][0] == {
            "name": "label",
            "datatype": "BYTES",
            "shape": [1, 2],
            "data": ["green", "red"],
        }
        assert [output["name"] for output in found["outputs"]] == ["label", "index", "score"]

    def test_form_of_named_outputs(self, client: TestClient) -> None:
        """The request's `binary_data_output` holds for outputs that say nothing of their form."""
        outputs = [{"name": "label"}, {"name": "score", "parameters": {"binary_data": False}}]
        asked = {**self.body(), "outputs": outputs, "parameters": {"binary_data_output": True}}
        answer = client.post(self.URL, json=asked)
        length = int(answer.headers["inference-header-content-length"])
        label, score = json.loads(answer.content[:length])["outputs"]
        assert label["parameters"]["binary_data_size"] == len(answer.content) - length
        assert len(score["data"]) == 3

    def test_parameters_of_null_are_none(self, client: TestClient) -> None:
        """Parameters that are null, as MLServer's client writes them, are as if not there."""
        body = self.body()
        [tensor] = body["inputs"]
        asked = {
            **body,
            "parameters": None,
            "inputs": [{**tensor, "parameters": None}],
            "outputs": [{"name": "label", "parameters": None}],
        }
        answer = client.post(self.URL, json=asked)
        assert answer.status_code == 200
        assert [output["name"] for output in answer.json()["outputs"]] == ["label"]

    def test_outputs_of_different_lengths(self, client: TestClient) -> None:
        """Each output has as many values as it was asked for, and of its datatype's size."""
        forms: list[dict[str, int]] = [{"classification": 1}, {"classification": 9}, {}]
        outputs: list[dict[str, Any]] = [
            {"name": "probabilities", "parameters": form} for form in forms
        ]
        binary = {"name": "probabilities", "parameters": {"binary_data": True}}
        asked = {**self.body(), "outputs": [*outputs, binary], "parameters": {"top_k": 2}}
        answer = client.post(self.URL, json=asked)
        length = int(answer.headers["inference-header-content-length"])
        best, *rest = json.loads(answer.content[:length])["outputs"]
        assert [one["shape"] for one in [best, *rest]] == [[1, 1], [1, 3], [1, 3], [1, 3]]
        every = np.frombuffer(answer.content[length:], "<f4")
        assert every.tolist() == pytest.approx(rest[1]["data"])
        assert best["data"] == [f"{every.max():f}:1:green"]
        outputs = [{"name": "label"}, {"name": "index"}, {"name": "score"}, outputs[1]]
        answer = client.post(self.URL, json={**asked, "outputs": outputs})
        assert [one["shape"][1] for one in answer.json()["outputs"]] == [2, 2, 2, 3]

    @pytest.mark.parametrize("value", ["no", 1, None])
    def test_binary_is_true_or_false(self, client: TestClient, value: object) -> None:
        """What says whether an output is binary is true or false, or a 422 problem names it."""
        outputs = [{"name": "label", "parameters": {"binary_data": value}}]
        for asked, name in (
            ({"outputs": outputs}, "binary_data must"),
            ({"parameters": {"binary_data_output": value}}, "binary_data_output must"),
        ):
            answer = client.post(self.URL, json={**self.body(), **asked})
            assert name in answer.json()["detail"]
            assert answer.status_code == 422

    def test_bad_image_is_named(self, client: TestClient) -> None:
        """Of several images the one that cannot be decoded is named by its place."""
        bad = base64.b64encode(b"no image").decode()
        answer = client.post(self.URL, json=self.body(shape=[2], data=[TEXT, bad]))
        assert answer.json()["detail"].startswith("Of element 1 of 'image': The upload is not")
        alone = client.post(self.URL, json=self.body(data=[bad]))
        assert alone.json()["detail"].startswith("The upload is not")
        assert answer.status_code == 415

    @pytest.mark.parametrize("count", [True, 0, "2"])
    def test_classification_is_a_number(self, client: TestClient, count: object) -> None:
        """A `classification` that is no positive whole number is a 422 problem."""
        outputs = [{"name": "probabilities", "parameters": {"classification": count}}]
        answer = client.post(self.URL, json={**self.body(), "outputs": outputs})
        assert "classification" in answer.json()["detail"]
        assert answer.status_code == 422

    def test_rows_as_lists(self, client: TestClient) -> None:
        """A tensor may be written as nested lists."""
        answer = client.post(self.URL, json=self.body(shape=[2, 1], data=[[TEXT], [TEXT]]))
        assert answer.json()["outputs"][0]["shape"] == [2, 3]

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"name": "picture"}, "name"),
            ({"datatype": "FP32"}, "datatype"),
            ({"shape": [2]}, "shape"),
            ({"shape": [-1]}, "shape"),
            ({"shape": [-1, -1]}, "shape"),
            ({"data": []}, "empty"),
            ({"data": ["*"]}, "base64"),
            ({"data": ["\u00e9"]}, "base64"),
            ({"data": None, "parameters": {"binary_data_size": 3}}, "binary_data_size"),
        ],
    )
    def test_malformed(self, client: TestClient, changes: dict[str, Any], word: str) -> None:
        """A request outside the protocol is a 422 problem that names what is wrong."""
        answer = client.post(self.URL, json=self.body(**changes))
        assert answer.status_code == 422, answer.text
        assert word in answer.json()["detail"]
        assert answer.json()["error"] == answer.json()["detail"]

    def test_outputs_without_end(self, client: TestClient) -> None:
        """More outputs than there are names are refused: each costs what an answer costs."""
        asked = self.body() | {"outputs": [{"name": "label"}] * 5}
        answer = client.post(self.URL, json=asked)
        assert answer.status_code == 422, answer.text
        assert "outputs" in answer.json()["detail"]

    def test_values_without_end(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        """All values of all images together are bounded, whichever outputs they are of."""
        monkeypatch.setattr("app.routes.classify.MAX_PREDICTIONS", 6)
        every = [{"name": name} for name in ("label", "index", "score", "probabilities")]
        best = {"name": "probabilities", "parameters": {"classification": 2}}
        for outputs, status in ((every[:2], 200), (every[:3], 422), ([*every[:1], best], 200)):
            asked = self.body() | {"outputs": outputs}
            assert client.post(self.URL, json=asked).status_code == status
        for outputs, status in ((every[3:], 200), ([*every[:2], every[3]], 422)):
            asked = self.body() | {"outputs": outputs}
            assert client.post(self.URL, json=asked).status_code == status

    def test_long_id(self, client: TestClient) -> None:
        """The ID that is answered as it came is no longer than one needs to be."""
        answer = client.post(self.URL, json=self.body() | {"id": "A" * 1024})
        assert answer.json()["id"] == "A" * 1024
        answer = client.post(self.URL, json=self.body() | {"id": "A" * 1025})
        assert answer.status_code == 422
        assert len(answer.content) < 1000

    @pytest.mark.parametrize("tail", [b"\x05\x00\x00\x00abc", b"\x05\x00"])
    def test_cut_off_binary(self, client: TestClient, tail: bytes) -> None:
        """A binary tensor that ends early is a 422 problem."""
        import json

        head = self.body(data=None, parameters={"binary_data_size": len(tail)})
        text = json.dumps(head).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        answer = client.post(self.URL, content=text + tail, headers=headers)
        assert answer.status_code == 422
        assert "cut off" in answer.json()["detail"]

    def test_images_without_end(self, client: TestClient) -> None:
        """A binary tensor of more images than the queue holds is a 413 problem, read no further."""
        import json

        tail = bytes(4) * 100_000
        head = self.body(data=None, shape=[100_000], parameters={"binary_data_size": len(tail)})
        text = json.dumps(head).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        answer = client.post(self.URL, content=text + tail, headers=headers)
        assert answer.status_code == 413
        assert "more than" in answer.json()["detail"]

    @pytest.mark.parametrize("length", ["x", "99999", "-1"])
    def test_bad_json_length(self, client: TestClient, length: str) -> None:
        """A length that is no number up to the body's size is a 422 problem."""
        headers = {"Inference-Header-Content-Length": length}
        answer = client.post(self.URL, json=self.body(), headers=headers)
        assert answer.status_code == 422
        assert "Inference-Header-Content-Length" in answer.json()["detail"]

    @pytest.mark.parametrize("failures", [0, 3, 6])
    def test_not_ready(self, serve: Serve, failures: int) -> None:
        """Readiness is that of `/readyz`, for server and model, and liveness that of `/livez`."""
        client = serve(FakeEngine())
        service = client.app.state.service  # type: ignore[attr-defined] # starlette types any ASGI app
        if failures:
            service.classifier._decoders.failures = failures
        else:
            service.draining = True
        live = 503 if failures == 6 else 200
        for path in ("/livez", "/v2/health/live"):
            assert client.get(path).status_code == live
        for path in ("/readyz", "/v2/health/ready", "/v2/models/fake/ready"):
            assert client.get(path).status_code == 503

    def test_health_is_open(self, serve: Serve, tmp_path: Path) -> None:
        """Probes of the protocol need no key, the rest does."""
        keys = tmp_path / "keys"
        keys.write_text("secret\n")
        client = serve(api_keys_file=keys)
        assert client.get("/v2/health/ready").status_code == 200
        assert client.get("/v2/models/fake").status_code == 401
        assert "error" in client.post(self.URL, json=self.body()).json()
