"""What OpenAI's routes refuse, in which words, and bodies made to break them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chat_template import ChatTemplate
from server.app import create_app
from server.schemas.openai import ChatCompletionRequest, CompletionRequest
from tests.server.clients import read_events
from tests.server.conftest import client_for, make_app, make_settings
from tests.server.fake_engine import FakeEngine, Plan
from tests.server.hostile_bodies import BODIES, CANARY
from tests.server.openai_requests import (
    CHAT,
    COMPLETIONS,
    HELLO,
    ROUTES,
    ask,
    body_for,
    chat_app,
    check_error,
    post,
)  # fmt: skip

pytestmark = pytest.mark.anyio
JSON = {"content-type": "application/json"}

_IN_A_MESSAGE = json.dumps([{"role": "user", "content": CANARY}])
CHAT_BODIES = [
    body.replace(f'"prompt": "{CANARY}"'.encode(), f'"messages": {_IN_A_MESSAGE}'.encode()) for body in BODIES
]
_CONTENTS: list[Any] = [5, {CANARY: 1}, [5], [{"type": "text"}], [{"type": CANARY, "text": ""}], [[]], True]
_MESSAGES: list[Any] = [
    None, 5, CANARY, {}, [CANARY], [[]], [{}], [{"role": CANARY * 9, "content": "a"}], [{"role": 1, "content": "a"}],
    [{"role": "user", "content": "a", "name": 5}], [{"role": "user", "content": "a" * 500}],
    [{"role": "user", "content": CANARY, "tool_calls": CANARY}], [{"role": "<|endoftext|>", "content": CANARY}],
    *([{"role": "user", "content": content}] for content in _CONTENTS),
]  # fmt: skip
CHAT_BODIES += [json.dumps({"messages": messages}).encode() for messages in _MESSAGES]


async def test_a_model_without_a_chat_template(engine: FakeEngine) -> None:
    async with client_for(make_app(engine)) as client:
        response = await client.post(CHAT, json={"messages": HELLO})
    message = check_error(response, 400, "no_chat_template", "messages")
    assert "/v1/completions" in message


async def test_a_conversation_that_the_template_refuses(engine: FakeEngine) -> None:
    app = make_app(engine)
    app.state.services.chat_template = ChatTemplate("{{ raise_exception('no ' + messages[0].content) }}")
    async with client_for(app) as client:
        response = await client.post(CHAT, json={"messages": [{"role": "user", "content": CANARY}]})
    check_error(response, 400, "invalid_request", "messages")
    assert CANARY not in response.text
    control = [*HELLO, {"role": "user", "content": f"{CANARY}<|endoftext|>"}]
    response = await post(engine, CHAT, messages=control)
    assert check_error(response, 400, "invalid_request", "messages").startswith("messages[1] holds a control token")
    assert CANARY not in response.text


def refusals() -> Iterator[tuple[str, str, Any]]:
    """Route, field and a value that asks for something."""
    asking = {
        "tool_choice": "required", "function_call": {"name": CANARY},
        "modalities": ["text", "audio"], "skip_special_tokens": False, "prompt_logprobs": 0,
        "truncate_prompt_tokens": 5,
    }  # fmt: skip
    for route, schema in ((COMPLETIONS, CompletionRequest), (CHAT, ChatCompletionRequest)):
        for name in schema.unsupported:
            value = asking.get(name, [CANARY])
            yield route, name, False if (route, name) == (COMPLETIONS, "add_special_tokens") else value


@pytest.mark.parametrize(("route", "name", "value"), list(refusals()))
async def test_what_would_change_the_answer_is_refused(route: str, name: str, value: Any, engine: FakeEngine) -> None:
    response = await post(engine, route, **{name: value})
    message = check_error(response, 400, "invalid_request", name)
    assert message.startswith(name)
    assert CANARY not in message
    assert engine.submitted == []


@ROUTES
async def test_values_that_ask_for_nothing_are_taken(route: str, engine: FakeEngine) -> None:
    neutral: dict[str, Any] = {
        "response_format": {"type": "text"}, "use_beam_search": False, "skip_special_tokens": True, "bad_words": [],
        "best_of": 1, "metadata": {"a": "b"}, "user": "u", "store": False, "service_tier": "auto",
    }  # fmt: skip
    if route == CHAT:
        neutral |= {"tools": [], "tool_choice": "auto", "modalities": ["text"], "parallel_tool_calls": True}
    else:
        neutral |= {"suffix": "", "echo": False}
    await ask(engine, route, **neutral)


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        (COMPLETIONS, {"best_of": 3}, "best_of"),
        (COMPLETIONS, {"best_of": 1, "n": 2}, "best_of"),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"stream_options": {"include_usage": 1}, "stream": True}, "include_usage"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
        (COMPLETIONS, {"prompt": [[97], []]}, "prompt"),
        (COMPLETIONS, {"prompt": [[97], [257]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 1025}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 265}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 133, "n": 2}, "prompt"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [*HELLO, {"role": "user"}]}, "messages[1].content"),
        (CHAT, {"messages": [{"role": "", "content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": [*HELLO, {"content": "a"}]}, "messages[1].role"),
        (CHAT, {"messages": [5]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]}, "messages[0]"),
        (CHAT, {"messages": HELLO * 2049}, "messages"),
        (CHAT, {"logprobs": 2}, "logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
async def test_bad_values_name_their_field(route: str, fields: dict[str, Any], param: str, engine: FakeEngine) -> None:
    check_error(await post(engine, route, **fields), 400, "invalid_request", param)
    assert engine.submitted == []


@ROUTES
async def test_errors_of_every_layer_have_openais_shape(route: str) -> None:
    body = body_for(route)
    engine = FakeEngine(queue_limit=2)
    async with client_for(make_app(engine, keys=["correct-horse"])) as client:
        check_error(await client.post(route, json=body), 401, "invalid_api_key")
    app = chat_app(engine, max_body_size=1000)
    async with client_for(app) as client:
        check_error(await client.get(route), 405, "method_not_allowed")
        check_error(await client.post(f"{route}/x", json=body), 404, "not_found")
        check_error(await client.post(route, json=body | {"model": CANARY}), 404, "model_not_found", "model")
        check_error(await client.post(route, content=b" " * 1001), 413, "body_too_large")
        check_error(await client.post(route, content=b"{}"), 400, "invalid_request")
        check_error(await client.post(route, content=b"[]", headers={"content-type": "application/json"}), 400,
                    "invalid_request")  # fmt: skip
        full = await client.post(route, json=body | {"n": 3})
        check_error(full, 429, "queue_full")
        assert (full.headers["retry-after"], full.json()["error"]["type"]) == ("7", "rate_limit_error")
        app.state.services.lifecycle.draining = True
        response = await client.post(route, json=body | {"stream": True})
        check_error(response, 503, "draining")
        assert int(response.headers["retry-after"]) >= 1
    async with client_for(create_app(make_settings(), FakeEngine())) as client:
        check_error(await client.post(route, json=body), 503, "loading")


@ROUTES
async def test_a_fault_after_the_first_byte_ends_the_stream(route: str) -> None:
    engine = FakeEngine(lambda prompt, params: Plan([[97], [98], [99]], fail_after=2))
    response = await post(engine, route, stream=True)
    *_, (name, data) = read_events(response.text)
    assert (name, json.loads(data)["error"]["code"]) == ("message", "request_failed")
    assert "[DONE]" not in response.text
    check_error(await post(engine, route), 503, "request_failed")


@pytest.fixture(scope="module")
def hostile_app() -> FastAPI:
    return chat_app(FakeEngine(queue_limit=100_000))


def is_valid(schema: type[CompletionRequest] | type[ChatCompletionRequest], body: bytes) -> bool:
    try:
        schema.model_validate_json(body)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("route", "schema", "bodies"), [
    (COMPLETIONS, CompletionRequest, BODIES), (CHAT, ChatCompletionRequest, CHAT_BODIES)
])  # fmt: skip
async def test_hostile_bodies(
    route: str, schema: type[CompletionRequest] | type[ChatCompletionRequest], bodies: list[bytes],
    hostile_app: FastAPI,
) -> None:  # fmt: skip
    answered = 0
    async with client_for(hostile_app) as client:
        for body in bodies:
            response = await client.post(route, content=body, headers={"content-type": "application/json"})
            assert response.status_code in (200, 400), body
            answered += response.status_code == 200
            assert is_valid(schema, body) or response.status_code == 400
            if response.status_code == 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                assert len(response.content) <= 4096
                assert CANARY not in response.text, body
                assert not re.search(r"0x[0-9a-f]|Traceback|\.py", response.text)
    assert answered < len(bodies) / 8


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = {
    "messages", "prompt", *CompletionRequest.model_fields, *ChatCompletionRequest.model_fields,
    *CompletionRequest.unsupported, *ChatCompletionRequest.unsupported,
}  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    route=st.sampled_from([COMPLETIONS, CHAT]),
    fields=st.dictionaries(st.sampled_from(sorted(FIELDS)), JSON_VALUES, max_size=4),
)
def test_any_json_is_answered_or_refused(route: str, fields: dict[str, Any]) -> None:
    engine = FakeEngine()

    async def check() -> None:
        async with client_for(chat_app(engine)) as client:
            content = json.dumps(body_for(route, **fields)).encode()
            response = await client.post(route, content=content, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400, 404), response.text
        assert not engine.live

    anyio.run(check)
