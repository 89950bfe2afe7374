"""What an operator sees: metrics, request IDs, timing headers, log lines."""

import asyncio
import json
import logging
import re
import time
from importlib.metadata import version
from pathlib import Path

import httpx2
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from app.logs import JsonFormatter
from app.metrics import Metrics
from app.trace import new_trace
from tests.conftest import Serve
from tests.fakes import FakeEngine, make_image
from tests.live import log_lines
from tests.processes import Server, serving

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def scrape(client: TestClient) -> dict[str, float]:
    """Return each sample as `name{label=value,…}` without the `mixer_` in front."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        sample.name.removeprefix("mixer_")
        + "".join(f"[{name}={sample.labels[name]}]" for name in sorted(sample.labels)): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def durations(answer: httpx2.Response) -> dict[str, float]:
    """Return the stages of `Server-Timing` in milliseconds."""
    pairs = re.findall(r"(\w+);dur=([0-9.]+)", answer.headers["server-timing"])
    return {name: float(value) for name, value in pairs}


class TestMetrics:
    """`GET /metrics`."""

    def test_requests_by_route_and_outcome(self, client: TestClient) -> None:
        """Requests count under their route, status and kind of problem."""
        client.post("/classify", content=make_image())
        client.post("/classify", content=b"hello")
        client.get("/classify")
        client.get("/nowhere/photo.jpg")
        client.get("/openapi.json")
        found = scrape(client)
        assert found["requests_total[outcome=ok][route=/classify][status=200]"] == 1
        assert found["requests_total[outcome=unsupported-format][route=/classify][status=415]"] == 1
        assert found["requests_total[outcome=method-not-allowed][route=/classify][status=405]"] == 1
        assert found["requests_total[outcome=not-found][route=unmatched][status=404]"] == 1
        assert found["requests_total[outcome=ok][route=/openapi.json][status=200]"] == 1
        assert not any("photo.jpg" in name for name in found)
        assert found["request_seconds_count[route=/classify]"] == 3

    def test_many_scrapes_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever asks at once gets the same text, and whoever asks later gets a later one."""
        renderings: list[bytes] = []

        def counted(registry: CollectorRegistry) -> bytes:
            renderings.append(generate_latest(registry))
            return renderings[-1]

        monkeypatch.setattr("app.metrics.generate_latest", counted)

        async def run() -> None:
            measures = Metrics()
            for number in range(3):
                measures.refuse("/classify", "429", "queue-full", "requests")
                texts = await asyncio.gather(*(measures.scrape() for _ in range(100)))
                assert set(texts) == {renderings[number]}
                assert f'reason="requests"}} {number + 1}.0'.encode() in texts[0]

        asyncio.run(run())
        assert len(renderings) == 3

    def test_visits_of_the_page(self, client: TestClient) -> None:
        """Who opens the page does not count among those who classify at the same address."""
        client.get("/")
        client.post("/", content=make_image())
        found = scrape(client)
        assert found["requests_total[outcome=ok][route=page][status=200]"] == 1
        assert found["requests_total[outcome=ok][route=/][status=200]"] == 1

    def test_questions_before_a_page_asks(self, serve: Serve) -> None:
        """A browser's preflight does not count among those who classify."""
        client = serve(FakeEngine(), cors_origins="https://shop.example")
        asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
        assert client.options("/classify", headers=asked).status_code == 200
        assert client.options("/classify").status_code == 405
        found = scrape(client)
        assert found["requests_total[outcome=ok][route=preflight][status=200]"] == 1
        assert found["requests_total[outcome=method-not-allowed][route=/classify][status=405]"] == 1

    def test_explanations_are_no_load(self, serve: Serve) -> None:
        """An explanation counts as one image, and its many inferences as no batches."""
        client = serve(FakeEngine())
        assert client.post("/explain", content=make_image()).status_code == 200
        found = scrape(client)
        assert found["images_total[outcome=ok]"] == 1
        assert found["batch_images_sum"] == found["inference_seconds_count"] == 1

    def test_images_and_batches(self, serve: Serve) -> None:
        """Stages are counted for each image, batches and inferences for each batch."""
        client = serve(FakeEngine(seconds=0.2), max_batch=2)
        files = [("files", make_image())] * 5 + [("files", b"hello")]
        client.post("/classify/batch", files=files)
        found = scrape(client)
        assert found["images_total[outcome=ok]"] == 5
        assert found["images_total[outcome=unsupported-format]"] == 1
        assert found["decode_seconds_count"] == found["queue_seconds_count"] == 5
        assert found["batch_images_sum"] == 5
        batches = found["batch_images_count"]
        assert 3 <= batches == found["inference_seconds_count"] == found["batch_seconds_count"]
        assert found["inference_seconds_sum"] >= 0.2 * batches
        assert found["queue_seconds_sum"] >= 0.2
        assert found["received_bytes_total"] > 5 * len(make_image())

    def test_prediction_beside_what_came(self, serve: Serve) -> None:
        """The time predicted at the door is measured beside the time it took."""
        client = serve(FakeEngine(seconds=0.05))
        client.post("/classify", content=make_image())
        found = scrape(client)
        predicted, actual = found["predicted_seconds_sum"], found["actual_seconds_sum"]
        assert predicted >= 0.05  # and more by what the machine took to wake the engine's thread
        assert 0.05 <= actual <= found["request_seconds_sum[route=/classify]"]
        assert found["actual_to_predicted_ratio_sum"] == pytest.approx(actual / predicted)
        assert found["actual_to_predicted_ratio_count"] == 1

    def test_refusals_by_reason(self, serve: Serve, tmp_path: Path) -> None:
        """Refusals count under the limit that refused them."""
        engine = FakeEngine()
        client = serve(engine, queue_size=2, max_bytes_in_flight=1024)
        engine.seconds = 0.3
        client.post("/classify", content=b"x" * 1025)
        client.post("/classify/batch", files=[("files", make_image())] * 3)
        late = {"X-Request-Timeout-Ms": "1"}
        client.post("/classify", content=make_image(), headers=late)
        found = scrape(client)
        assert found["refusals_total[reason=bytes]"] == 1
        assert found["refusals_total[reason=too-many-images]"] == 1
        assert found["refusals_total[reason=deadline-exceeded]"] == 1
        keys = tmp_path / "keys"
        keys.write_text("secret\n")
        client = serve(api_keys_file=keys)
        client.post("/classify", content=make_image())
        assert scrape(client)["refusals_total[reason=unauthorized]"] == 1

    def test_state(self, client: TestClient) -> None:
        """What is in flight is read at the scrape, and the model is named."""
        found = scrape(client)
        assert found["ready"] == 1
        assert found["requests_in_flight"] == found["queue_depth"] == 0
        assert found["body_bytes_in_flight"] == 0
        [info] = [name for name in found if name.startswith("model_info")]
        assert "[name=fake]" in info
        assert "[provider=FakeExecutionProvider]" in info
        assert f"[service={version('mixer-serve')}]" in info

    def test_first_values(self, client: TestClient) -> None:
        """What happens in a usual outage is shown as 0 before it does: a rise from 0 is seen."""
        found = scrape(client)
        for name in (
            "requests_total[outcome=queue-full][route=/classify][status=429]",
            "requests_total[outcome=inference-failed][route=/classify/batch][status=500]",
            "refusals_total[reason=queue-budget]",
            "images_total[outcome=inference-failed]",
        ):
            assert found[name] == 0


class TestRequestId:
    """`X-Request-ID` on every answer."""

    def test_taken(self, client: TestClient) -> None:
        """A client's ID comes back on answers of every kind."""
        name = {"X-Request-ID": "order-17/a"}
        for answer in (
            client.get("/livez", headers=name),
            client.post("/classify", content=make_image(), headers=name),
            client.post("/classify", content=b"hello", headers=name),
            client.get("/nowhere", headers=name),
        ):
            assert answer.headers["x-request-id"] == "order-17/a"

    @pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, 'a"b'])
    def test_made(self, client: TestClient, given: str | None) -> None:
        """Without an ID, or with one that no log takes as it is, each answer gets its own."""
        headers = {} if given is None else {"X-Request-ID": given}
        made = [client.get("/livez", headers=headers).headers["x-request-id"] for _ in range(2)]
        assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made)
        assert made[0] != made[1]

    def test_bug(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bug answers with the ID and the security headers, and tells nothing of itself."""
        client = serve()
        monkeypatch.setattr("app.decoder_link.DecoderLink.decode", lambda *_: 1 / 0)
        answer = client.post("/classify", content=make_image(), headers={"X-Request-ID": "bug-1"})
        assert answer.status_code == 500
        assert answer.headers["x-request-id"] == "bug-1"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.json()["type"].endswith(":internal-server-error")
        assert "division" not in answer.text
        assert "error" not in answer.json()

    def test_bug_for_foreign_clients(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bug's answer has the member that Hugging Face's clients show."""
        client = serve()
        monkeypatch.setattr("app.decoder_link.DecoderLink.decode", lambda *_: 1 / 0)
        answer = client.post("/", content=make_image())
        assert answer.status_code == 500
        assert answer.json()["error"] == answer.json()["detail"]

    def test_below_the_application(self, live: Server) -> None:
        """What is not HTTP at all is answered with an ID, and counted."""
        import socket

        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"NONSENSE\r\n\r\n")
            answer = connection.makefile("rb").read().decode()
        assert answer.startswith("HTTP/1.1 400")
        assert "\r\ndate: " in answer  # RFC 9110, 6.6.1
        [request_id] = re.findall(r"x-request-id: ([0-9a-f]{32})\r\n", answer)
        assert log_lines(live, request_id)[0]["status"] == 400
        text = httpx2.get(f"{live.url}/metrics").text
        assert 'mixer_requests_total{outcome="bad-request",route="unparsed",status="400"}' in text
        assert 'seconds_count{route="unparsed"}' not in text  # nobody knows when it began


class TestTiming:
    """`Server-Timing` and `traceparent`."""

    def test_stages(self, serve: Serve) -> None:
        """An answer tells the time of each stage, and they fit into the total."""
        answer = serve(FakeEngine(seconds=0.05)).post("/classify", content=make_image())
        found = durations(answer)
        assert set(found) == {"decode", "queue", "infer", "total"}
        assert 50 <= found["infer"] <= found["total"]
        assert found["decode"] + found["queue"] + found["infer"] <= found["total"] + 0.02

    def test_waiting_shows_as_queue(self, serve: Serve) -> None:
        """Images that wait for the engine show it as queue time."""
        client = serve(FakeEngine(seconds=0.2), max_batch=1, queue_budget_ms=60_000)
        answer = client.post("/classify/batch", files=[("files", make_image())] * 4)
        # The last one waits for three others, less what its own decoding takes longer than theirs.
        assert durations(answer)["queue"] >= 200

    def test_other_answers_have_a_total(self, client: TestClient) -> None:
        """Answers without an inference tell their total."""
        assert set(durations(client.get("/livez"))) == {"total"}
        assert set(durations(client.get("/nowhere"))) == {"total"}

    def test_traceparent_is_passed_on(self, client: TestClient) -> None:
        """The caller's trace goes on: same trace ID and sampling, a span of ours."""
        found = client.get("/livez", headers={"traceparent": PARENT}).headers["traceparent"]
        assert found.startswith(PARENT[:36])
        assert found.endswith("-01")
        assert found[36:52] != PARENT[36:52]

    @pytest.mark.parametrize(
        "given", ["", "hello", PARENT.upper(), "ff" + PARENT[2:], "00-" + "0" * 32 + PARENT[35:]]
    )
    def test_malformed_traceparent(self, client: TestClient, given: str) -> None:
        """A malformed traceparent counts as none."""
        assert "traceparent" not in client.get("/livez", headers={"traceparent": given}).headers


class TestLog:
    """One line per request."""

    def test_one_json_line(self, live: Server) -> None:
        """A request is one JSON line with its ID, route, status and times, and nothing private."""
        answer = httpx2.post(
            f"{live.url}/classify?top_k=1&api_key=hush",
            files={"file": ("holiday.png", make_image())},
            headers={"X-Request-ID": "log-1", "traceparent": PARENT, "X-API-Key": "hush"},
        )
        assert answer.status_code == 200
        [line] = log_lines(live, "log-1")
        assert line["route"] == "/classify"
        assert line["method"] == "POST"
        assert line["status"] == 200
        assert line["trace_id"] == PARENT[3:35]
        assert line["total_ms"] >= line["decode_ms"] + line["queue_ms"] + line["infer_ms"] - 0.03
        text = live.log.read_text()
        assert "holiday" not in text
        assert "hush" not in text

    def test_error_has_the_same_id(self, live: Server) -> None:
        """A problem's line carries its kind under the ID that the client saw."""
        answer = httpx2.post(f"{live.url}/classify", content=b"hello")
        [line] = log_lines(live, answer.headers["x-request-id"])
        assert line["status"] == 415
        assert line["outcome"] == "unsupported-format"

    def test_unknown_path_is_not_logged(self, live: Server) -> None:
        """A path that is none of ours might be a file's name, so it stays out of the log."""
        answer = httpx2.get(f"{live.url}/my-face.jpg")
        [line] = log_lines(live, answer.headers["x-request-id"])
        assert line["route"] == "unmatched"
        assert "my-face" not in live.log.read_text()

    def test_text(self, tmp_path: Path) -> None:
        """`--log-format text` writes the same line for people."""
        with serving(tmp_path / "log", "--log-format", "text") as server:
            httpx2.get(f"{server.url}/livez", headers={"X-Request-ID": "text-1"})
            give_up = time.monotonic() + 10
            while "text-1" not in (text := server.log.read_text()) and time.monotonic() < give_up:
                time.sleep(0.02)
        assert re.search(
            r"^\d\d:\d\d:\d\d INFO +request .*route=/livez status=200 .*id=text-1$",
            text,
            re.MULTILINE,
        )


@pytest.mark.parametrize(
    ("created", "time"),
    [
        (1.005, "1970-01-01T00:00:01.005+00:00"),
        (1.9996, "1970-01-01T00:00:02.000+00:00"),
    ],
)
def test_time_of_a_line(created: float, time: str) -> None:
    """A line's time is that of its record, to the nearest millisecond."""
    record = logging.makeLogRecord({"created": created, "msg": "here"})
    assert json.loads(JsonFormatter().format(record))["time"] == time


@pytest.mark.parametrize(
    ("status", "count"), [(200, 1), (500, 1), (408, 1), (504, 1), (429, 0), (413, 0), (503, 0)]
)
def test_what_took_time_is_timed(status: int, count: int) -> None:
    """What was refused at once does not make the service look fast; what ran out of time counts."""
    metrics = Metrics()
    metrics.finish_request(new_trace(), "/classify", status, 0.5)
    text = asyncio.run(metrics.scrape()).decode()
    assert text.count('mixer_request_seconds_count{route="/classify"} 1.0') == count
    assert text.count("mixer_request_seconds_count{") == count
