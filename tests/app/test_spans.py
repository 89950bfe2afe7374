"""Spans in a collector, through the extra `otel`."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx2
import pytest

from app.spans import Spans, exporter
from app.trace import new_trace
from tests.fakes import make_image
from tests.faults.load import dial, post
from tests.live import log_lines
from tests.processes import run_serve, serving

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.trace import StatusCode

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return the spans, with their resource, that arrive at a collector of our own."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            message = ExportTraceServiceRequest.FromString(body)
            for one in message.resource_spans:
                for scope in one.scope_spans:
                    spans.extend((span, one.resource) for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield spans
    server.shutdown()
    thread.join()
    server.server_close()


def wait_for(spans: list[Any], name: str) -> Any:
    """Return span and resource of `name` once it has arrived."""
    for _ in range(200):
        for span, resource in list(spans):
            if span.name == name:
                return span, resource
        threading.Event().wait(0.05)
    raise AssertionError(f"no span {name} among {[span.name for span, _ in spans]}")


def test_request_and_its_stages(collector: list[Any], tmp_path: Path) -> None:
    """A request is a span below its caller's, its stages are spans below it, in their order."""
    with serving(tmp_path / "log") as server:
        httpx2.post(
            f"{server.url}/classify",
            content=make_image(),
            headers={"traceparent": f"{PARENT}1", "X-Request-ID": "traced"},
        )
        span, resource = wait_for(collector, "POST /classify")
        names = ("queue for a decoder", "decode", "queue for the engine", "infer")
        stages = [wait_for(collector, name)[0] for name in names]
        [line] = log_lines(server, "traced")
    assert span.trace_id.hex() == line["trace_id"] == PARENT[3:35]
    assert span.span_id.hex() == line["span_id"]
    assert span.parent_span_id.hex() == PARENT[36:52]
    values = {one.key: one.value for one in span.attributes}
    assert values["http.response.status_code"].int_value == 200
    assert values["mixer.request_id"].string_value == "traced"
    about = {one.key: one.value.string_value for one in resource.attributes}
    assert about["service.name"] == "mixer-serve"
    assert all(stage.parent_span_id == span.span_id for stage in stages)
    times = [t for stage in stages for t in (stage.start_time_unix_nano, stage.end_time_unix_nano)]
    assert [span.start_time_unix_nano, *times, span.end_time_unix_nano] == sorted(
        [span.start_time_unix_nano, *times, span.end_time_unix_nano]
    )


def test_caller_that_does_not_sample(collector: list[Any], tmp_path: Path) -> None:
    """A caller whose trace is not sampled gets no spans; one without a trace does."""
    with serving(tmp_path / "log") as server:
        httpx2.get(f"{server.url}/model", headers={"traceparent": f"{PARENT}0"})
        httpx2.get(f"{server.url}/livez")
        wait_for(collector, "GET /livez")
    assert "GET /model" not in [span.name for span, _ in collector]


@pytest.mark.parametrize(
    ("sampler", "exported"),
    [
        ("parentbased_always_on", {"sampled", "nobody's"}),
        ("parentbased_always_off", {"sampled"}),
        ("always_on", {"sampled", "not sampled", "nobody's"}),
        ("always_off", set()),
    ],
)
def test_sampler(sampler: str, exported: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenTelemetry's sampler decides, with what the caller has decided before it."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    made = exporter()
    assert made is not None
    made.close(1)
    processor = Mock()
    vars(made)["_processor"] = processor
    parents = {"sampled": f"{PARENT}1", "not sampled": f"{PARENT}0", "nobody's": ""}
    for name, parent in parents.items():
        made.export(new_trace("", parent), "GET", name, 200)
    spans = [call.args[0] for call in processor.on_end.call_args_list]
    assert {span.attributes["http.route"] for span in spans} == exported


def test_no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where OpenTelemetry's variables say that nothing is to be exported, nothing is."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert exporter() is None


def test_refusal_at_the_door(collector: list[Any], tmp_path: Path) -> None:
    """A request that is refused as it comes is a span, too."""
    with (
        serving(tmp_path / "log", "--max-requests", "1") as server,
        dial(server.url) as first,
        dial(server.url) as second,
    ):
        for client in (first, second):  # of which one is refused
            client.sendall(post(b"").replace(b"Length: 0", b"Length: 9"))
        span, _ = wait_for(collector, "POST /classify")
    values = {one.key: one.value for one in span.attributes}
    assert values["http.response.status_code"].int_value == 429


def test_without_a_collector(tmp_path: Path) -> None:
    """Without a collector's address no line of the log names a trace."""
    with serving(tmp_path / "log") as server:
        httpx2.get(f"{server.url}/livez", headers={"X-Request-ID": "plain"})
        assert "trace_id" not in log_lines(server, "plain")[0]


@pytest.mark.parametrize(("status", "is_error"), [(200, False), (422, False), (504, True)])
def test_errors_are_marked(status: int, is_error: bool) -> None:
    """The span of a 5xx answer has the status ERROR, by which collectors find it."""
    processor = Mock()
    Spans(processor, Mock(), Mock()).export(new_trace(), "POST", "/classify", status)
    [[span]] = [call.args for call in processor.on_end.call_args_list]
    assert (span.status.status_code is StatusCode.ERROR) is is_error


def test_collector_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    """A collector that takes nothing holds up the end for no longer than it may."""
    hang = threading.Event()
    spans = Spans(Mock(shutdown=hang.wait), Mock(), Mock())
    begun = time.monotonic()
    spans.close(0.1)
    hang.set()
    assert time.monotonic() < begun + 5
    assert "spans are lost" in caplog.text


@pytest.mark.parametrize(
    "name",
    ["BSP_MAX_QUEUE_SIZE", "SPAN_ATTRIBUTE_COUNT_LIMIT", "SPAN_EVENT_COUNT_LIMIT"],
)
def test_bad_variable(name: str, collector: list[Any]) -> None:
    """A variable that OpenTelemetry does not take stops start-up with one line."""
    done = run_serve(**{f"OTEL_{name}": "-1"})
    assert done.returncode == 1
    assert "OTEL" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not collector


def test_address_without_a_scheme() -> None:
    """A collector's address to which no span would ever go stops start-up, named with its value."""
    done = run_serve(OTEL_EXPORTER_OTLP_ENDPOINT="collector:4318")
    assert done.returncode == 1
    assert "OTEL_EXPORTER_OTLP_ENDPOINT=collector:4318: it must be a URL" in done.stderr


def test_address_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of traces goes before the one for everything, which may be for gRPC."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "HTTP://127.0.0.1:9/v1/traces")
    spans = exporter()
    assert spans is not None
    spans.close(1)
