"""OpenTelemetry: a span for each request where a provider is given, and nothing at all elsewhere."""

from __future__ import annotations

import http.server
import sys
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from model.tokenizer import Tokenizer
from server.app import create_app
from server.settings import UsageError, load_settings
from server.telemetry import flush_spans, make_tracer_provider
from tests.server.conftest import client_for, make_settings
from tests.server.fake_engine import FakeEngine, Plan, says

pytestmark = pytest.mark.anyio


class Recorder:
    def __init__(self, engine: FakeEngine) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.app = create_app(make_settings(), engine, None, Tokenizer.bytes(), provider)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()


async def test_a_request_has_one_span_and_none_of_its_text(engine: FakeEngine) -> None:
    engine.script = says("answer")
    recorder = Recorder(engine)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "authorization": "Bearer secret-key"}
    async with client_for(recorder.app) as client:
        answer = await client.post("/generate", json={"prompt": "question", "stream": True}, headers=headers)
    assert answer.text.endswith("data: [DONE]\n\n")
    [span] = recorder.spans
    assert (span.name, span.kind) == ("POST /generate", SpanKind.SERVER)
    assert span.attributes is not None
    assert span.attributes["http.route"] == "/generate"
    assert span.attributes["http.response.status_code"] == 200
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace, parent)
    whole = span.to_json()
    assert not [word for word in ("question", "answer", "secret-key") if word in whole]


async def test_a_fault_marks_its_span(engine: FakeEngine) -> None:
    engine.script = lambda prompt, params: Plan([[97]], fail_after=0)
    recorder = Recorder(engine)
    async with client_for(recorder.app) as client:
        await client.post("/generate", json={"prompt": "a"})
        await client.post("/generate", json={"prompt": ""})
        await client.post("/generate", json={"top_p": 2})
    failed, _, refused = recorder.spans
    assert failed.status.status_code is StatusCode.ERROR
    assert refused.status.status_code is StatusCode.UNSET
    assert refused.attributes is not None
    assert refused.attributes["http.response.status_code"] == 422
    assert not refused.events


async def test_probes_and_scrapes_have_none(engine: FakeEngine) -> None:
    recorder = Recorder(engine)
    async with client_for(recorder.app) as client:
        for path in ("/health", "/ready", "/metrics", "/stats"):
            assert (await client.get(path)).status_code == 200
        await client.get("/info")
    assert [span.name for span in recorder.spans] == ["GET /info"]


async def test_without_a_provider_nothing_is_recorded(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by a provider of the whole process, which some library may have set."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    app = create_app(make_settings(), engine, None, Tokenizer.bytes())
    async with client_for(app) as client:
        assert (await client.post("/generate", json={"prompt": "a"})).status_code == 200
    assert exporter.get_finished_spans() == ()


class Collector(http.server.BaseHTTPRequestHandler):
    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.received.append((self.path, body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An address that takes OTLP, and what it got: paths and bodies."""
    received: list[tuple[str, bytes]] = []
    handler = type("Handler", (Collector,), {"received": received})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", received
        finally:
            server.shutdown()
            thread.join()


async def test_spans_reach_a_collector_before_the_end(
    engine: FakeEngine, collector: tuple[str, list[tuple[str, bytes]]]
) -> None:
    url, received = collector
    provider = make_tracer_provider(url + "/")
    app = create_app(make_settings(), engine, None, Tokenizer.bytes(), provider)
    async with client_for(app) as client:
        await client.get("/version")
    await flush_spans(provider)
    [(path, body)] = received
    assert path == "/v1/traces"
    [resource] = ExportTraceServiceRequest.FromString(body).resource_spans
    assert {item.key: item.value.string_value for item in resource.resource.attributes}["service.name"] == "quill"
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["GET /version"]


async def test_off_is_off_and_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_tracer_provider(None) is None
    await flush_spans(None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UsageError, match=r"needs the extra otel: pip install 'quill\[otel\]'"):
        make_tracer_provider("http://127.0.0.1:4318")


@pytest.mark.parametrize("value", ["localhost:4318", "ftp://host", "http://", "http://host/path?x=1"])
def test_an_address_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="--otlp-endpoint"):
        load_settings(["--otlp-endpoint", value])
    assert load_settings(["--otlp-endpoint", "https://host:4318/base"]).otlp_endpoint == "https://host:4318/base"
