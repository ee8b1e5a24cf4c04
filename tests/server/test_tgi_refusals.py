"""What TGI's routes refuse, in TGI's error shape."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling_params import SamplingParams
from server.schemas.tgi import TgiParameters
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine, Plan, Script, says
from tests.server.tgi_clients import events, post

pytestmark = pytest.mark.anyio
CANARY = "xyzzy-canary-7c1f"


def check_error(response: httpx.Response, status: int, error_type: str) -> str:
    """TGI's error shape, with nothing more in it."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == error_type
    assert CANARY not in response.text
    assert len(response.content) < 1024
    return str(body["error"])


_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0}, "temperature"), ({"temperature": -1}, "temperature"), ({"temperature": 2.5}, "temperature"),
    ({"temperature": CANARY}, "temperature"), ({"temperature": True}, "temperature"), ({"top_k": 0}, "top_k"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.0}, "top_p"), ({"typical_p": 0.5}, "typical_p"), ({"top_k": 2.5}, "top_k"),
    ({"typical_p": 1.0}, "typical_p"), ({"repetition_penalty": 0}, "repetition_penalty"), ({"seed": -1}, "seed"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"), ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"seed": 2**63}, "seed"), ({"stop": [""]}, "stop"), ({"stop": CANARY}, "stop"), ({"stop": ["a"] * 17}, "stop"),
    ({"top_n_tokens": 21}, "top_n_tokens"), ({"top_n_tokens": -1}, "top_n_tokens"), ({"truncate": 0}, "truncate"),
    ({"truncate": 256}, "truncate"), ({"watermark": True}, "watermark"), ({"adapter_id": CANARY}, "adapter_id"),
    ({"grammar": {"type": "regex", "value": f"({CANARY}"}}, "grammar"), ({"grammar": CANARY}, "grammar"),
    ({"grammar": {"type": "lark", "value": CANARY}}, "grammar"), ({"grammar": {"type": "json"}}, "grammar"),
    ({"grammar": {"type": "json", "value": {"type": CANARY}}}, "grammar"),
    ({"grammar": {"type": "json_schema", "value": {CANARY: {}}}}, "grammar"),
    ({"best_of": 0}, "best_of"), ({"best_of": 17, "do_sample": True}, "best_of"), ({"best_of": 2}, "best_of"),
    ({"do_sample": 1}, "do_sample"), ({"details": "yes"}, "details"), ({"max_new_tokens": 254}, "max_new_tokens 254"),
    ({"max_new_tokns": 5}, "did you mean max_new_tokens?"), ({CANARY: 1}, "the fields are best_of"),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "named"), _REFUSED)
async def test_wrong_parameters_are_named(parameters: dict[str, Any], named: str) -> None:
    response, engine = await post(says("x"), {"inputs": "abc", "parameters": parameters})
    assert named in check_error(response, 422, "validation")
    assert not engine.submitted


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b'{"inputs": ""}', "inputs"), (b'{"inputs": 5}', "inputs"), (b'{"inputs": null}', "inputs"),
        (b'{"inputs": ["a", "b"]}', "inputs"), (b'{"inputs": "a", "parameters": []}', "parameters"),
        (b'{"inputs": "a", "parameters": {"temperature": NaN}}', "temperature"), (b'{"inputs": "a", "x": 1}', "known"),
        (b'{"inputs": "a", "parameters": {"temperature": 1e999}}', "temperature"), (b'{"inputs": "\\ud800"}', "JSON"),
        (b'{"inputs": "a", "parameters": {"top_k": 1' + b"0" * 400 + b"}}", "top_k"),
        (b'{"inputs": "a", "stream": 1}', "stream"), (b'{"inputs": "a", "options": "b"}', "options"),
        (b'{"inputs": "' + b"a" * 256 + b'"}', "256 tokens"), (b'{"inputs": "a", "parameters": "b"}', "parameters"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_wrong_bodies_are_refused_before_a_stream_begins(path: str, raw: bytes, named: str) -> None:
    engine = FakeEngine(says("x"))
    async with client_for(make_app(engine)) as client:
        response = await client.post(path, content=raw, headers={"content-type": "application/json"})
    if b"\\ud800" in raw and path == "/generate":  # no JSON at all, so nobody's body
        assert response.status_code == 422
        return
    assert named in check_error(response, 422, "validation")


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'{"prompt": "a"}', b"[" * 50_000, b'{"inputs"', b"\xff"])
async def test_what_is_no_body_of_tgi(path: str, raw: bytes) -> None:
    async with client_for(make_app(FakeEngine())) as client:
        response = await client.post(path, content=raw, headers={"content-type": "application/json"})
        check_error(response, 422, "validation")
        plain = await client.post(path, content=b'{"inputs": "a"}', headers={"content-type": "text/plain"})
        assert "Content-Type" in check_error(plain, 422, "validation")


async def test_a_stream_refuses_what_it_cannot_give() -> None:
    for parameters in ({"best_of": 2, "do_sample": True}, {"decoder_input_details": True}):
        response, _ = await post(says("x"), {"inputs": "a", "parameters": parameters}, "/generate_stream")
        assert next(iter(parameters)) in check_error(response, 422, "validation")


async def test_an_overloaded_a_loading_and_a_broken_engine() -> None:
    response, _ = await post(says("x"), {"inputs": "a"}, queue_limit=0)
    check_error(response, 429, "overloaded")
    assert response.headers["retry-after"] == "7"
    loading, _ = await post(says("x"), {"inputs": "a"}, state="loading")
    check_error(loading, 503, "loading")
    assert int(loading.headers["retry-after"]) >= 1

    def fails(prompt: list[int], params: SamplingParams) -> Plan:
        return Plan([[97], [98]], fail_after=1, delay=0.005)

    broken, _ = await post(fails, {"inputs": "a"})
    message = check_error(broken, 424, "generation")
    parts = events((await post(fails, {"inputs": "a"}, "/generate_stream"))[0])
    assert parts[0]["token"]["text"] == "a"
    assert parts[1:] == [{"error": message, "error_type": "generation"}]
    unknown, _ = await post(says("x"), {"inputs": "a", "model": CANARY})
    check_error(unknown, 404, "model_not_found")


async def test_a_fault_of_ours_has_tgi_s_shape_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr("server.tgi_request.make_prompt", broken)
    response, _ = await post(says("x"), {"inputs": "a"})
    check_error(response, 500, "internal_error")


async def test_a_key_is_asked_for_on_every_route() -> None:
    async with client_for(make_app(FakeEngine(), keys=["correct-horse"])) as client:
        for path in ("/", "/generate", "/generate_stream", "/tokenize", "/detokenize"):
            assert (await client.post(path, json={"inputs": "a"})).status_code == 401


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
_SENSIBLE = st.sampled_from([0, 1, 2, 0.5, True, False, None, "a", ["a"], [], {"type": "regex", "value": "a"}])
_PARAMETERS = st.dictionaries(st.sampled_from(sorted(TgiParameters.model_fields)), _SENSIBLE | _JSON, max_size=6)


def test_any_parameters_are_answered_or_refused() -> None:
    with asyncio.Runner() as runner:
        client = client_for(make_app(FakeEngine(says("hello world"))))

        @settings(max_examples=300, deadline=None)
        @given(_PARAMETERS | _JSON, st.sampled_from(["/", "/generate", "/generate_stream"]), st.booleans())
        def check(parameters: Any, path: str, stream: bool) -> None:
            raw = json.dumps({"inputs": CANARY, "parameters": parameters, "stream": stream})  # NaN and all
            response = runner.run(client.post(path, content=raw, headers={"content-type": "application/json"}))
            if response.status_code == 200:
                assert "generated_text" in response.text
            else:
                check_error(response, 422, "validation")

        check()
        runner.run(client.aclose())


def endless(taken: asyncio.Event) -> Script:
    """Takes seconds, and tells when it was begun."""

    def script(prompt: list[int], params: SamplingParams) -> Plan:
        taken.set()
        return Plan([[97]] * params.max_tokens, delay=0.05)

    return script


async def test_a_client_that_leaves_frees_its_request() -> None:
    for path in ("/generate", "/generate_stream"):
        taken = asyncio.Event()
        engine = FakeEngine(endless(taken))
        app = make_app(engine)
        body = json.dumps({"inputs": "a"}).encode()
        incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        sent: list[Any] = []

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
            "headers": headers, "query_string": b"", "root_path": "", "scheme": "http", "server": ("localhost", 80),
        }  # fmt: skip
        task = asyncio.create_task(app(scope, incoming.get, send))
        await asyncio.wait_for(taken.wait(), 5)
        incoming.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(task, 5)
        assert not engine.live
        assert engine.submitted[0].aborted
