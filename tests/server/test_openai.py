"""OpenAI's routes over the fake engine: what is answered, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chat_template import ChatTemplate
from server.schemas.openai import ChatCompletionRequest, CompletionRequest
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import PROVENANCE, FakeEngine, fake_prompt_logprob, says
from tests.server.hostile_bodies import CANARY
from tests.server.openai_requests import CHAT, COMPLETIONS, HELLO, ROUTES, ask, check_error, post, stream

pytestmark = pytest.mark.anyio


async def test_a_completion(engine: FakeEngine) -> None:
    engine.script = says("hello", end=True)
    engine.cached_tokens = 1
    answer = await ask(engine, COMPLETIONS, seed=5)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    choice = {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None, "seed": 5}
    usage = {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [choice],
        "system_fingerprint": "fp_abc",
        "usage": usage | {"prompt_tokens_details": {"cached_tokens": 1}},
        "provenance": PROVENANCE,
    }
    assert (await ask(engine, COMPLETIONS, stop="lo"))["choices"][0]["stop_reason"] == "lo"


async def test_a_chat_completion(engine: FakeEngine) -> None:
    engine.script = says("hello", end=True)
    answer = await ask(engine, CHAT, seed=5)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"content": "hello", "role": "assistant", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "seed": 5,
        }
    ]
    assert bytes(engine.submitted[0].prompt) == b"<user>hi\n<assistant>"
    assert answer["usage"]["prompt_tokens"] == len(engine.submitted[0].prompt)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("ab", [b"ab"]), ([97, 98], [b"ab"]), (["ab", "c"], [b"ab", b"c"]), ([[97, 98], [99]], [b"ab", b"c"]),
     (["", "b" * 3000], [None, b"b" * 3000])],
)  # fmt: skip
async def test_prompts_of_every_form(prompt: Any, prompts: list[bytes | None]) -> None:
    engine = FakeEngine(max_model_len=4096)
    answer = await ask(engine, COMPLETIONS, prompt=prompt, n=2, seed=3, max_tokens=4)
    submitted = [stream.prompt for stream in engine.submitted]
    assert submitted == [[256] if each is None else list(each) for each in prompts for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(prompts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, submitted[::2]))
    assert answer["usage"]["completion_tokens"] == 8 * len(prompts)
    for choice, sent in zip(answer["choices"], engine.submitted, strict=True):
        again = FakeEngine(max_model_len=4096)
        alone = await ask(again, COMPLETIONS, prompt=sent.prompt, seed=choice["seed"], max_tokens=4)
        assert alone["choices"][0]["text"] == choice["text"]


async def test_defaults_and_nulls(engine: FakeEngine) -> None:
    nulls = dict.fromkeys(
        ("model", "temperature", "top_p", "n", "stop", "seed", "logit_bias", "stream", "user", "presence_penalty",
         "frequency_penalty", "stream_options", "logprobs", "response_format", "tools", "best_of", "suffix", "echo"),
    )  # fmt: skip
    for route in (COMPLETIONS, CHAT):
        await ask(engine, route, **nulls)
        await ask(engine, route)
        with_nulls, without = (stream.params for stream in engine.submitted[-2:])
        assert (with_nulls.temperature, with_nulls.top_p, with_nulls.logprobs) == (1.0, 1.0, None)
        assert with_nulls.max_tokens == without.max_tokens
    assert [stream.params.max_tokens for stream in engine.submitted[::2]] == [16, 256 - len("<user>hi\n<assistant>")]
    await ask(engine, COMPLETIONS, max_tokens=None)
    assert engine.submitted[-1].params.max_tokens == 254


@ROUTES
async def test_parameters_reach_the_engine(route: str, engine: FakeEngine) -> None:
    fields = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 2, "seed": 2**63 - 1,
        "ignore_eos": True,
    }  # fmt: skip
    await ask(engine, route, **fields, logit_bias={"5": -100, "6": 1.5}, stop_token_ids=[3, 4], unknown_field={"a": 1})
    params = engine.submitted[0].params
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.logit_bias, params.stop_token_ids) == ({5: -100.0, 6: 1.5}, (3, 4))
    await ask(engine, route, top_k=-1)
    assert engine.submitted[1].params.top_k == 0


async def test_max_completion_tokens_goes_first(engine: FakeEngine) -> None:
    await ask(engine, CHAT, max_tokens=3, max_completion_tokens=5)
    assert engine.submitted[0].params.max_tokens == 5
    response = await post(engine, CHAT, max_completion_tokens=500)
    check_error(response, 400, "context_length_exceeded", "max_completion_tokens")
    response = await post(engine, CHAT, messages=[{"role": "user", "content": "a" * 300}])
    check_error(response, 400, "context_length_exceeded", "messages")


async def test_a_stream_of_chunks(engine: FakeEngine) -> None:
    engine.script = says("héy")
    events = await stream(engine, COMPLETIONS, seed=3, stream_options={"include_usage": True})
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
    *chunks, last = events
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)
    assert last["provenance"]["step"] == 5000
    ends = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert [(end["finish_reason"], end["seed"]) for end in ends] == [("length", 3)]
    for options in ({}, {"include_usage": False}, {"include_usage": None}):
        for event in await stream(engine, COMPLETIONS, stream_options=options):
            assert "usage" not in event
            assert len(event["choices"]) == 1


async def test_a_stream_of_a_chat(engine: FakeEngine) -> None:
    engine.script = says("ab", end=True)
    events = await stream(engine, CHAT, n=2)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for index in range(2):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        deltas = [choice["delta"] for choice in choices]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta["content"] for delta in deltas[1:-1]) == "ab"
        assert deltas[-1] == {}
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


def text_of(route: str, choice: dict[str, Any]) -> str:
    return str(choice["text"] if route == COMPLETIONS else choice["message"]["content"])


def joined(route: str, events: list[dict[str, Any]], index: int) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    if route == COMPLETIONS:
        return "".join(choice["text"] for choice in choices)
    return "".join(choice["delta"].get("content", "") for choice in choices)


@settings(max_examples=40, deadline=None)
@given(
    route=st.sampled_from([COMPLETIONS, CHAT]),
    text=st.text(st.sampled_from("abé→🦜\n\u0301"), min_size=1, max_size=20),
    chunk=st.integers(1, 5),
    n=st.integers(1, 3),
    stop=st.none() | st.text("abé→", min_size=1, max_size=3),
    end=st.booleans(),
    logprobs=st.booleans(),
)
def test_joined_deltas_are_the_whole_text(
    route: str, text: str, chunk: int, n: int, stop: str | None, end: bool, logprobs: bool
) -> None:
    fields = {"n": n, "seed": 1, "stop": stop, "max_tokens": 100, "logprobs": 1 if route == COMPLETIONS else logprobs}

    async def check() -> None:
        whole = await ask(FakeEngine(says(text, chunk=chunk, end=end)), route, **fields)
        events = await stream(FakeEngine(says(text, chunk=chunk, end=end)), route, **fields)
        for choice in whole["choices"]:
            assert text_of(route, choice) == joined(route, events, choice["index"]) == text.partition(stop or "\0")[0]
            parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
            assert parts[-1]["finish_reason"] == choice["finish_reason"]
            assert join_logprobs([part["logprobs"] for part in parts]) == (choice["logprobs"] or {})

    anyio.run(check)


def join_logprobs(parts: list[dict[str, list[Any]] | None]) -> dict[str, list[Any]]:
    """The lists of each part one after the other."""
    whole: dict[str, list[Any]] = {}
    for part in parts:
        for name, values in (part or {}).items():
            whole[name] = whole.get(name, []) + values
    return whole


async def test_completion_logprobs(engine: FakeEngine) -> None:
    engine.script = says("a→b")
    logprobs = (await ask(engine, COMPLETIONS, logprobs=1))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", r"bytes:\xe2", r"bytes:\x86", r"bytes:\x92", "b"]
    assert logprobs["text_offset"] == [0, 1, 1, 1, 2]
    assert logprobs["token_logprobs"] == [-0.5] * 5
    assert logprobs["top_logprobs"][0] == {"a": -0.5}
    assert (await ask(engine, COMPLETIONS, logprobs=0))["choices"][0]["logprobs"]["top_logprobs"][4] == {"b": -0.5}
    top = (await ask(engine, COMPLETIONS, logprobs=3))["choices"][0]["logprobs"]["top_logprobs"]
    assert top[0] == {"a": -0.5, "b": -1.5, "c": -2.5}


async def test_chat_logprobs(engine: FakeEngine) -> None:
    engine.script = says("é")
    content = (await ask(engine, CHAT, logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]["content"]
    assert [token["bytes"] for token in content] == [[0xC3], [0xA9]]
    assert [each["bytes"] for each in content[0]["top_logprobs"]] == [[0xC3], [0xC4]]
    assert content[0]["token"] == "\ufffd"
    content = (await ask(engine, CHAT, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"] == []
    assert engine.submitted[-1].params.logprobs == 0
    response = await post(engine, CHAT, top_logprobs=2)
    check_error(response, 400, "invalid_request", "top_logprobs")


async def test_echo(engine: FakeEngine) -> None:
    engine.script = says("def")
    answer = await ask(engine, COMPLETIONS, prompt=["abc ", "é"], echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["abc def", "édef"]
    events = await stream(engine, COMPLETIONS, prompt=["abc ", "é"], echo=True)
    assert [joined(COMPLETIONS, events, index) for index in range(2)] == ["abc def", "édef"]


async def test_echo_with_logprobs_scores_the_prompt(engine: FakeEngine) -> None:
    engine.script = says("de")
    prompt = list("a→b".encode())
    fields = {"prompt": [prompt, [99]], "echo": True, "logprobs": 2}
    first, second = (await ask(engine, COMPLETIONS, **fields))["choices"]
    scored = [fake_prompt_logprob(prompt, position) for position in range(1, len(prompt))]
    logprobs = first["logprobs"]
    assert first["text"] == "a→bde"
    assert logprobs["tokens"] == ["a", r"bytes:\xe2", r"bytes:\x86", r"bytes:\x92", "b", "d", "e"]
    assert logprobs["token_logprobs"] == [None, *scored, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1, 1, 1, 2, 3, 4]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][4] == {"b": scored[3], "c": scored[3] - 1}
    assert (second["text"], second["logprobs"]["token_logprobs"]) == ("cde", [None, -0.5, -0.5])
    for whole in (first, second):
        events = await stream(engine, COMPLETIONS, **fields)
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == whole["index"]]
        assert join_logprobs([choice["logprobs"] for choice in choices]) == whole["logprobs"]
        assert joined(COMPLETIONS, events, whole["index"]) == whole["text"]


async def test_a_prompt_can_be_scored_and_no_more(engine: FakeEngine) -> None:
    answer = await ask(engine, COMPLETIONS, prompt="a" * 257, echo=True, logprobs=0, max_tokens=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a" * 257, "length")
    assert len(choice["logprobs"]["token_logprobs"]) == answer["usage"]["total_tokens"] == 257
    choice = (await ask(engine, COMPLETIONS, echo=True, max_tokens=0))["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("hi", None)
    check_error(await post(engine, COMPLETIONS, max_tokens=0), 400, "invalid_request", "max_tokens")
    response = await post(engine, COMPLETIONS, prompt="a" * 258, echo=True, max_tokens=0)
    check_error(response, 400, "context_length_exceeded", "prompt")


@ROUTES
async def test_token_ids_where_they_are_asked_for(route: str, engine: FakeEngine) -> None:
    engine.script = says("ab", end=True)
    answer = await ask(engine, route, n=2, return_token_ids=True)
    prompt = engine.submitted[0].prompt
    events = await stream(engine, route, n=2, return_token_ids=True)
    firsts = [event for event in events if "prompt_token_ids" in (event if route == CHAT else event["choices"][0])]
    assert len(firsts) == 2
    for index, choice in enumerate(answer["choices"]):
        parts = [part for event in events for part in event["choices"] if part["index"] == index]
        assert choice["token_ids"] == [*b"ab", 256]
        assert [token_id for part in parts for token_id in part.get("token_ids", [])] == choice["token_ids"]
        for told in (answer, firsts[index]) if route == CHAT else (choice, firsts[index]["choices"][0]):
            assert told["prompt_token_ids"] == prompt
    assert "token_ids" not in (await post(engine, route)).text


async def test_messages_of_every_form(engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "Ann"}]
    await ask(engine, CHAT, messages=[*messages, {"role": "assistant", "content": ""}])
    assert bytes(engine.submitted[0].prompt) == b"<system>be brief\n<user>one\ntwo\n<assistant>\n<assistant>"
    long = [{"role": "user", "content": "a" * 3000}]
    big = FakeEngine(max_model_len=4096)
    await ask(big, CHAT, messages=long, max_tokens=1)
    assert len(big.submitted[0].prompt) == len("<user>\n<assistant>") + 3000


async def test_variables_for_the_template(engine: FakeEngine) -> None:
    app = make_app(engine)
    source = "{{ messages[0].content }}{{ add_generation_prompt }}{{ '+' if enable_thinking else '-' }}"
    app.state.services.chat_template = ChatTemplate(source)
    async with client_for(app) as client:
        for variables in ({"enable_thinking": True}, {"messages": [], "add_generation_prompt": "x"}, {}):
            response = await client.post(CHAT, json={"messages": HELLO, "chat_template_kwargs": variables})
            assert response.status_code == 200
        refused = await client.post(CHAT, json={"messages": HELLO, "chat_template_kwargs": {"a": ["<|endoftext|>"]}})
    assert [bytes(each.prompt) for each in engine.submitted] == [b"hiTrue+", b"hiTrue-", b"hiTrue-"]
    check_error(refused, 400, "invalid_request", "messages")


async def test_the_last_message_can_be_continued(engine: FakeEngine) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Dear"}]
    fields = {"messages": messages, "add_generation_prompt": False}
    await ask(engine, CHAT, **fields)
    await ask(engine, CHAT, **fields, continue_final_message=True)
    prompts = [bytes(stream.prompt) for stream in engine.submitted]
    assert prompts == [b"<user>hi\n<assistant>Dear\n", b"<user>hi\n<assistant>Dear"]
    response = await post(engine, CHAT, messages=messages, continue_final_message=True)
    check_error(response, 400, "invalid_request", "continue_final_message")


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]
    for name in ("x", "a/b", "tiny/", CANARY):
        response = await client.get(f"/v1/models/{name}")
        check_error(response, 404, "model_not_found", "model")
        assert CANARY not in response.text


def test_the_documentation_has_examples_that_are_valid(engine: FakeEngine) -> None:
    paths = make_app(engine).openapi()["paths"]
    for route, schema in ((COMPLETIONS, CompletionRequest), (CHAT, ChatCompletionRequest)):
        content = paths[route]["post"]["requestBody"]["content"]["application/json"]
        assert set(content["schema"]["properties"]) == set(schema.model_fields)
        assert len(content["examples"]) >= 2
        for example in content["examples"].values():
            schema.model_validate_json(json.dumps(example["value"]))
