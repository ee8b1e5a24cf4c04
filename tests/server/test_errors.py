"""The error table, the shape of every error, and bodies made to break the server."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from server.app import create_app
from tests.server.conftest import client_for, make_app, make_settings
from tests.server.fake_engine import FakeEngine, says
from tests.server.hostile_bodies import BODIES, CANARY

pytestmark = pytest.mark.anyio
JSON = {"content-type": "application/json"}


def check_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The one error shape, with nothing more in it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"code", "message", "param", "request_id"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["request_id"].startswith("req-")
    assert len(response.content) <= 4096
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return error


async def test_401_without_or_with_a_wrong_key(engine: FakeEngine) -> None:
    async with client_for(make_app(engine, keys=["correct-horse"])) as client:
        for headers in ({}, {"authorization": "Bearer wrong-horse"}, {"authorization": "Basic correct-horse"}):
            response = await client.post("/generate", json={"prompt": "a"}, headers=headers)
            check_error(response, 401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer correct-horse"}
        assert (await client.post("/generate", json={"prompt": "a"}, headers=right)).status_code == 200


async def test_404_unknown_model_and_route(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={"prompt": "a", "model": CANARY})
    check_error(response, 404, "model_not_found", "model")
    assert CANARY not in response.text
    check_error(await client.get(f"/{CANARY}"), 404, "not_found")
    check_error(await client.post("/generate/", json={"prompt": "a"}), 404, "not_found")


async def test_405_names_the_method(client: httpx.AsyncClient) -> None:
    response = await client.get("/generate")
    check_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


async def test_413_declared_and_chunked(engine: FakeEngine) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 1000

    async with client_for(make_app(engine, max_body_size=10_000)) as client:
        check_error(await client.post("/generate", content=b" " * 10_001, headers=JSON), 413, "body_too_large")
        check_error(await client.post("/generate", content=chunks(), headers=JSON), 413, "body_too_large")
        declared = JSON | {"content-length": str(2 << 30)}
        check_error(await client.post("/generate", content=b"{}", headers=declared), 413, "body_too_large")
        fits = b'{"prompt": "a"}'.ljust(10_000)
        assert (await client.post("/generate", content=fits, headers=JSON)).status_code == 200


async def test_422_names_the_field_and_the_rule(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={"prompt": "a", "temperature": 3})
    error = check_error(response, 422, "invalid_request", "temperature")
    assert error["message"] == "temperature must be a number from 0 to 2; 0 is greedy"
    check_error(await client.post("/generate", json={}), 422, "invalid_request", "prompt")
    error = check_error(await client.post("/generate", json={"prompt": "a", "temprature": 1}), 422, "unknown_field")
    assert "did you mean temperature?" in error["message"]
    check_error(await client.post("/generate", content=b"{", headers=JSON), 422, "invalid_json")


async def test_422_context_names_both_numbers(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={"prompt": "a" * 200, "max_tokens": 57})
    error = check_error(response, 422, "context_length_exceeded", "max_tokens")
    for number in ("200", "57", "256", "at most 56"):
        assert number in error["message"]
    response = await client.post("/generate", json={"prompt": "a" * 256, "max_tokens": None})
    check_error(response, 422, "context_length_exceeded", "prompt")
    assert (await client.post("/generate", json={"prompt": "a" * 200, "max_tokens": 56})).status_code == 200


async def test_422_unless_json_is_declared(client: httpx.AsyncClient) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json-patch+json", ""):
        response = await client.post("/generate", content=b'{"prompt": "a"}', headers={"content-type": kind})
        check_error(response, 422, "invalid_request")
    declared = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await client.post("/generate", content=b'{"prompt": "a"}', headers=declared)).status_code == 200


async def test_422_characters_that_the_tokenizer_does_not_know(engine: FakeEngine) -> None:
    app = create_app(make_settings(), engine, tokenizer=Tokenizer.characters("abc"))
    async with client_for(app) as client:
        for prompt in ("abz", "é" * 3_000):
            response = await client.post("/generate", json={"prompt": prompt})
            check_error(response, 422, "invalid_request", "prompt")
            assert "é" not in response.text


async def test_429_when_the_queue_is_full(engine: FakeEngine) -> None:
    engine.queue_limit = 2
    async with client_for(make_app(engine)) as client:
        for stream in (False, True):
            response = await client.post("/generate", json={"prompt": "a", "n": 3, "stream": stream})
            check_error(response, 429, "queue_full")
            assert response.headers["retry-after"] == "7"
    assert engine.submitted == []


async def test_429_when_the_deadline_cannot_be_met(engine: FakeEngine) -> None:
    engine.script = says("ab", delay=0.05)
    async with client_for(make_app(engine)) as client:
        for _ in range(2):
            await client.post("/generate", json={"prompt": "a"})
        hurry = {"prompt": "a", "deadline_ms": 20}
        assert (await client.post("/generate", json=hurry)).status_code == 200
        engine.set_stats(num_waiting=5)
        check_error(await client.post("/generate", json=hurry), 429, "deadline_unreachable")
        assert (await client.post("/generate", json={"prompt": "a", "deadline_ms": 60_000})).status_code == 200
        metrics = (await client.get("/metrics")).text
    assert 'vllm:admission_rejections_total{engine="0",model_name="tiny",reason="deadline_unreachable"} 1.0' in metrics
    assert engine.submitted[-1].deadline is not None


async def test_503_loading_draining_dead(engine: FakeEngine) -> None:
    app = make_app(engine)
    async with client_for(app) as client:
        body = {"prompt": "a", "stream": True}
        app.state.services.lifecycle.draining = True
        check_error(await client.post("/generate", json=body), 503, "draining")
        app.state.services.lifecycle.draining = False
        engine.kill()
        check_error(await client.post("/generate", json=body), 503, "engine_down")
    async with client_for(make_app(FakeEngine(state="loading"))) as client:
        check_error(await client.post("/generate", json=body), 503, "loading")
        check_error(await client.get("/info"), 503, "loading")
    async with client_for(create_app(make_settings(), FakeEngine())) as client:
        check_error(await client.post("/generate", json=body), 503, "loading")


async def test_a_fault_of_ours_is_a_plain_500(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError(f"{CANARY} /secret/path 0x7f")

    engine.submit = broken  # type: ignore[method-assign,assignment]
    async with client_for(make_app(engine)) as client:
        response = await client.post("/generate", json={"prompt": "a"})
    error = check_error(response, 500, "internal_error")
    assert CANARY not in response.text
    assert response.headers["x-request-id"] == error["request_id"]
    assert any(getattr(record, "request_id", None) == error["request_id"] for record in caplog.records)


@pytest.fixture(scope="module")
def hostile_app() -> FastAPI:
    return make_app(FakeEngine())


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
async def test_hostile_bodies(body: bytes, hostile_app: FastAPI) -> None:
    async with client_for(hostile_app) as client:
        response = await client.post("/generate", content=body, headers=JSON)
    assert response.status_code == 422, response.text
    assert len(response.content) <= 4096
    assert CANARY not in response.text
    assert not re.search(r"0x[0-9a-f]|Traceback|/\w+/\w+|\.py", response.text)
    assert hostile_app.state.services.engine.submitted == []


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    ["prompt", "model", "max_tokens", "temperature", "top_k", "stop", "logit_bias", "seed", "n", "stream", "echo", "x"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(FIELDS, JSON_VALUES, max_size=4))
def test_any_json_is_answered_or_refused(fields: dict[str, Any], engine: FakeEngine) -> None:
    app = make_app(engine)

    async def check() -> None:
        async with client_for(app) as client:
            content = json.dumps({"prompt": "a", **fields}).encode()
            response = await client.post("/generate", content=content, headers=JSON)
        assert response.status_code in (200, 404, 422)
        assert not engine.live

    anyio.run(check)
