"""--otlp: spans of requests over HTTP and gRPC, and nothing of it without the flag."""

from __future__ import annotations

import base64
import contextlib
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ffl_deploy.bundle import Bundle
from ffl_deploy.errors import UsageError
from serve.command import parse_arguments
from serve.server import tracing
from serve.server.rpc import messages
from serve.server.settings import ModelSpec, Settings

ROOT = Path(__file__).parents[3]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
Spans = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def running(
    two_bundles: tuple[Bundle, Bundle], start_server: Any, exporter: InMemorySpanExporter
) -> Iterator[Any]:
    models = (ModelSpec("fused", two_bundles[0].folder),)
    settings = Settings(models, demo=False, grpc_port=0, access_log=True, otlp="http://localhost:4318")
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracing, "exporter_to", lambda endpoint: exporter)
            server = stack.enter_context(start_server(settings))
        yield server


@pytest.fixture
def spans(running: Any, exporter: InMemorySpanExporter) -> Spans:
    """`spans(root) -> [the span of this name, those inside of it]` of the one request of the test."""
    exporter.clear()

    def found(root: str) -> list[Any]:
        deadline = time.monotonic() + 60  # a request is traced once it has been answered
        while True:
            running.service.traces._provider.force_flush()
            done = exporter.get_finished_spans()
            if roots := [span for span in done if span.name == root]:
                break
            assert time.monotonic() < deadline, [span.name for span in done]
            time.sleep(0.01)
        (one,) = roots
        inside = [span for span in done if span is not one]
        assert all(span.parent.span_id == one.context.span_id for span in inside)
        assert all(span.context.trace_id == one.context.trace_id for span in inside)
        assert all(one.start_time <= span.start_time <= span.end_time <= one.end_time for span in inside)
        return [one, *sorted(inside, key=lambda span: span.start_time)]

    return found


def body_of(photos: list[bytes], id: str = "") -> dict[str, Any]:
    data = [base64.b64encode(photo).decode() for photo in photos]
    return {
        "id": id,
        "inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [len(data)], "data": data}],
    }


def test_an_inference_is_a_span_with_what_decoding_waiting_and_running_took(
    running: Any, spans: Spans, photo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ffl.serve")
    headers = {"x-request-id": "mine", "traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    url, before = f"{running.url}/v2/models/fused/infer", time.time_ns()
    assert httpx.post(url, json=body_of([photo(1), photo(2)], "b1"), headers=headers).status_code == 200
    root, *inside = spans("POST /v2/models/{model}/infer")
    assert [span.name for span in inside] == ["read", "decode", "queue", "run"]
    assert [span.attributes.get("ffl.images") for span in inside] == [None, 2, 2, 2]

    # the client's trace goes on
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.context.trace_state.get("vendor") == "1"
    assert root.kind.name == "SERVER"
    assert before <= root.start_time <= root.end_time <= time.time_ns()
    assert dict(root.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v2/models/{model}/infer",
        "url.path": "/v2/models/fused/infer",
        "http.response.status_code": 200,
        "client.address": "127.0.0.1",
        "ffl.request_id": "mine",
        "ffl.model": "fused",
        "ffl.id": "b1",
    }
    assert root.resource.attributes["service.name"] == "ffl-serve"
    (line,) = [record for record in caplog.records if getattr(record, "request_id", "") == "mine"]
    assert line.trace_id == TRACE


def test_over_grpc_the_same(running: Any, spans: Spans) -> None:
    asked = messages.message("ModelInferRequest")(model_name="fused", id="call-1")
    asked.inputs.add(name="images", datatype="UINT8", shape=[3, 32, 32, 3])
    asked.raw_input_contents.append(bytes(3 * 32 * 32 * 3))
    with grpc.insecure_channel(f"127.0.0.1:{running.service.grpc_port}") as channel:
        ask = channel.unary_unary(f"/{messages.INFERENCE}/ModelInfer")
        ask(asked.SerializeToString(), metadata=(("traceparent", f"00-{TRACE}-{PARENT}-01"),))
    root, *inside = spans("inference.GRPCInferenceService/ModelInfer")
    assert [span.name for span in inside] == ["read", "queue", "run"]
    assert f"{root.context.trace_id:032x}" == TRACE
    assert root.attributes["rpc.grpc.status_code"] == 0
    assert root.attributes["rpc.method"] == "ModelInfer"
    assert root.attributes["ffl.id"] == "call-1"
    assert root.status.is_ok


@pytest.mark.parametrize(
    "parent",
    [
        "", "nonsense", f"00-{TRACE}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01",
        "x" * 9000,
    ],
    ids=["none", "nonsense", "short", "zeros", "version", "long"],
)  # fmt: skip
def test_what_is_no_traceparent_begins_a_trace(running: Any, spans: Spans, parent: str) -> None:
    httpx.get(f"{running.url}/v2", headers={"traceparent": parent, "tracestate": "a=1," * 2000})
    (root,) = spans("GET /v2")
    assert root.parent is None
    assert f"{root.context.trace_id:032x}" != TRACE


def test_a_trace_that_is_not_sampled_has_no_spans(running: Any, spans: Spans) -> None:
    httpx.get(f"{running.url}/v2", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    httpx.post(f"{running.url}/v2/repository/index")
    (root,) = spans("POST /v2")  # and no other
    assert f"{root.context.trace_id:032x}" != TRACE


def test_probes_and_metrics_have_no_spans_and_refusals_are_no_faults(
    running: Any, spans: Spans, exporter: InMemorySpanExporter
) -> None:
    httpx.get(f"{running.url}/v2/health/live")
    httpx.get(f"{running.url}/metrics")
    assert httpx.post(f"{running.url}/v2/models/fused/infer", content=b"{").status_code == 400
    root, *inside = spans("POST /v2/models/{model}/infer")
    assert [span.name for span in inside] == ["read"]
    assert root.attributes["http.response.status_code"] == 400
    assert root.status.status_code.name == "UNSET"
    assert [span.name for span in exporter.get_finished_spans() if span.parent is None] == [root.name]


def test_a_photograph_that_is_classified(running: Any, spans: Spans, photo: Any) -> None:
    httpx.post(f"{running.url}/classify", files=[("file", ("a.jpg", photo(1))), ("file", ("b.jpg", b"no"))])
    _, *inside = spans("POST /classify")
    assert sorted(span.name for span in inside) == ["decode", "decode", "queue", "read", "run"]


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes what OTLP sends."""

    found: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.found.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("path", ["", "/", "/v1/traces", "/tenant"])
def test_a_collector_gets_them_and_what_is_left_at_the_end(
    two_bundles: tuple[Bundle, Bundle], start_server: Any, path: str
) -> None:
    kind = type("Own", (Collector,), {"found": []})
    with http.server.HTTPServer(("127.0.0.1", 0), kind) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{collector.server_port}{path}"
        models = (ModelSpec("fused", two_bundles[0].folder),)
        with start_server(Settings(models, demo=False, otlp=endpoint)) as running:
            httpx.get(f"{running.url}/v2")
        collector.shutdown()
        thread.join()
    ((where, body),) = kind.found
    assert where == {"/tenant": "/tenant/v1/traces"}.get(path, "/v1/traces")
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert [span.name for span in resource.scope_spans[0].spans] == ["GET /v2"]


def test_a_collector_that_is_away_costs_no_request(
    two_bundles: tuple[Bundle, Bundle], start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "TIMEOUT_SECONDS", 0.2)
    models = (ModelSpec("fused", two_bundles[0].folder),)
    with start_server(Settings(models, demo=False, otlp="http://127.0.0.1:9")) as running:
        for _ in range(20):
            assert httpx.get(f"{running.url}/v2").status_code == 200
        traces = running.service.traces
    assert traces is not None


def test_without_the_flag_neither_sdk_nor_exporter_is_imported(two_bundles: tuple[Bundle, Bundle]) -> None:
    """FastAPI imports the API, which does nothing by itself, where it is installed."""
    script = (
        "import sys; from serve.command import parse_arguments; from serve.app import create_app;"
        "app = create_app(parse_arguments(sys.argv[1:])); assert app.state.service.traces is None;"
        "parts = ('opentelemetry.sdk', 'opentelemetry.exporter');"
        "print([name for name in sys.modules if name.startswith(parts)])"
    )
    command = [sys.executable, "-c", script, str(two_bundles[0].folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_flag_takes_an_address_and_says_what_is_missing(
    two_bundles: tuple[Bundle, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = str(two_bundles[0].folder)
    assert parse_arguments([bundle]).otlp is None
    assert parse_arguments([bundle, "--otlp", "http://localhost:4318"]).otlp == "http://localhost:4318"
    for text in ("localhost:4318", "grpc://localhost:4317", "http://", "nonsense"):
        with pytest.raises(UsageError, match="is no address of a collector"):
            parse_arguments([bundle, "--otlp", text])
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(UsageError, match=r"OTLP exporter is not installed; run: .*\[otel\].*--otlp out"):
        parse_arguments([bundle, "--otlp", "http://localhost:4318"])
