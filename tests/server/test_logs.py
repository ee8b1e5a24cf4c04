"""Log lines: JSON or text, with a request's id, and never with what a client sent."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from server.engine.client import AsyncEngine
from server.engine.config import EngineConfig
from server.logs import JsonFormatter, TextFormatter, setup_logging
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine, Plan, says

pytestmark = pytest.mark.anyio


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What a server at the level debug logs as JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    # The client in these tests logs too, and would tell its own address.
    handler.addFilter(lambda record: not record.name.startswith("httpx"))
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(before)


def entries(stream: io.StringIO) -> list[dict[str, object]]:
    return [entry for entry in map(json.loads, stream.getvalue().splitlines()) if entry["logger"] == "server.access"]


async def test_a_request_is_one_line_with_the_id_that_its_client_got(engine: FakeEngine, lines: io.StringIO) -> None:
    async with client_for(make_app(engine)) as client:
        answer = await client.post("/generate", json={"prompt": "a", "max_tokens": 2})
    [entry] = entries(lines)
    assert entry["request_id"] == answer.headers["x-request-id"]
    assert (entry["level"], entry["message"], entry["method"]) == ("info", "request", "POST")
    assert (entry["route"], entry["status"]) == ("/generate", 200)
    assert isinstance(entry["duration_ms"], float)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(entry["time"]))
    assert "client_request_id" not in entry


async def test_a_clients_own_id_stands_beside_ours(engine: FakeEngine, lines: io.StringIO) -> None:
    async with client_for(make_app(engine)) as client:
        await client.get("/info", headers={"x-request-id": "mine-7"})
        await client.get("/info", headers={"x-request-id": "has a space"})
    first, second = entries(lines)
    assert first["client_request_id"] == "mine-7"
    assert str(first["request_id"]).startswith("req-")
    assert "client_request_id" not in second


async def test_probes_are_quiet(engine: FakeEngine, lines: io.StringIO) -> None:
    async with client_for(make_app(engine)) as client:
        for path in ("/health", "/ready", "/metrics", "/stats", "/info"):
            await client.get(path)
    assert [(entry["route"], entry["level"]) for entry in entries(lines)] == [
        ("/health", "debug"),
        ("/ready", "debug"),
        ("/metrics", "debug"),
        ("/stats", "debug"),
        ("/info", "info"),
    ]


SECRETS = ("hush-prompt", "hush-answer", "hush-stop", "hush-key", "hush-header", "hush-path", "hush-query")


async def test_nothing_that_was_sent_or_generated_is_logged(engine: FakeEngine, lines: io.StringIO) -> None:
    engine.script = says("hush-answer")
    bodies: list[dict[str, object]] = [
        {"prompt": "hush-prompt", "stop": "hush-stop"},
        {"prompt": "hush-prompt", "stream": True},
        {"prompt": "hush-prompt", "temperature": 9},
        {"prompt": "hush-prompt", "hush-header": 1},
        {"inputs": "hush-prompt", "parameters": {"details": True}},
    ]
    headers = {"authorization": "Bearer hush-key", "x-custom": "hush-header"}
    async with client_for(make_app(engine, ["hush-key"]), headers=headers) as client:
        for body in bodies:
            await client.post("/generate?q=hush-query", json=body)
            await client.post("/v1/completions", json=body)
        await client.post("/score", json={"texts": ["hush-prompt"]})
        await client.get("/hush-path", headers={"authorization": "Bearer hush-header"})
    assert len(entries(lines)) == 2 * len(bodies) + 2
    assert not [secret for secret in SECRETS if secret in lines.getvalue()]


async def test_a_fault_of_ours_has_its_trace_and_the_requests_id(
    engine: FakeEngine, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(engine)
    monkeypatch.setattr(app.state.services.metrics, "render", lambda: 1 / 0)
    async with client_for(app) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 500
    [fault] = [entry for entry in map(json.loads, lines.getvalue().splitlines()) if entry["level"] == "error"]
    assert fault["request_id"] == answer.headers["x-request-id"]
    assert "ZeroDivisionError" in fault["exception"]
    assert "ZeroDivisionError" not in answer.text


async def test_a_failed_request_is_logged_with_its_status(engine: FakeEngine, lines: io.StringIO) -> None:
    engine.script = lambda prompt, params: Plan([[97]], fail_after=0)
    async with client_for(make_app(engine)) as client:
        await client.post("/generate", json={"prompt": "a"})
    assert [entry["status"] for entry in entries(lines)] == [503]


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("server.access", logging.INFO, "file.py", 1, message, (), None)
    made.__dict__.update(fields)
    made.created = 1_700_000_000.25
    return made


def test_the_two_forms_tell_the_same() -> None:
    one = record("two\nlines", request_id="req-1", status=200, duration_ms=1.5, password="no field of ours")
    as_json = JsonFormatter().format(one)
    assert "\n" not in as_json
    assert json.loads(as_json) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "server.access",
        "message": "two\nlines",
        "request_id": "req-1",
        "status": 200,
        "duration_ms": 1.5,
    }
    text = TextFormatter().format(record("request", request_id="req-1", status=200))
    assert text == "2023-11-14T22:13:20.250Z INFO    request request_id=req-1 status=200"


@pytest.mark.parametrize("form", ["json", "text"])
def test_setup_sends_all_loggers_to_stderr_and_quietens_the_http_library(form: str) -> None:
    program = (
        f"import logging; from server.logs import setup_logging; setup_logging('info', {form!r});"
        "logging.getLogger('server.engine').info('ours'); logging.getLogger('uvicorn.error').info('chatter');"
        "logging.getLogger('other').debug('too fine')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert (json.loads(line)["message"] == "ours") if form == "json" else line.endswith("ours")


def test_the_engines_process_logs_in_the_servers_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are those of setup_logging, which refuses others."""
    started: list[list[str]] = []
    monkeypatch.setattr("server.engine.client.subprocess.Popen", lambda command, **options: started.append(command))
    engine = AsyncEngine(EngineConfig("folder", "test"), 1, log_level="error", log_format="json")
    engine._launch().close()
    assert started[0][-2:] == ["error", "json"]
    with pytest.raises(ValueError, match="LOUD"):
        setup_logging("loud", "json")


async def test_info_is_logged_by_its_route(client: httpx.AsyncClient, lines: io.StringIO) -> None:
    await client.get("/v1/models/some-name")
    assert [(entry["route"], entry["status"]) for entry in entries(lines)] == [("/v1/models/{model:path}", 404)]
