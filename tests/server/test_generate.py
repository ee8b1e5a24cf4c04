"""POST /generate over the fake engine: one JSON answer, the stream, and how the two agree."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from server.admission import admit
from server.engine.interface import QueueFullError
from server.output import ChoiceDelta
from server.schemas.native import GenerateRequest
from server.services import Services
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import PROVENANCE, FakeEngine, Plan, says

pytestmark = pytest.mark.anyio


def events(body: str) -> list[Any]:
    """The JSON of every data event; the last one must be [DONE]."""
    blocks = [block for block in body.split("\n\n") if block]
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def joined(parts: list[Any], index: int = 0) -> tuple[str, list[int], str]:
    """Text, ids and finish reason of one choice in a stream."""
    mine = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
    ids = [token for choice in mine for token in choice["token_ids"]]
    assert all(choice["finish_reason"] is None for choice in mine[:-1])
    return "".join(choice["text"] for choice in mine), ids, mine[-1]["finish_reason"]


async def test_answer_shape(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={"prompt": "abc", "max_tokens": 5, "seed": 9})
    answer = response.json()
    assert response.status_code == 200
    assert answer["id"].startswith("gen-")
    assert answer["model"] == "tiny"
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["text"].encode() == bytes(choice["token_ids"])
    assert len(choice["token_ids"]) == 5
    assert (choice["seed"], choice["stop_reason"], choice["logprobs"]) == (9, None, None)
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "cached_tokens": 0}
    assert answer["provenance"] == PROVENANCE


async def test_stream_equals_answer(client: httpx.AsyncClient) -> None:
    body = {"prompt": "abc", "max_tokens": 20, "seed": 4, "n": 3}
    whole = (await client.post("/generate", json=body)).json()
    response = await client.post("/generate", json=body | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    parts = events(response.text)
    for choice in whole["choices"]:
        expected = (choice["text"], choice["token_ids"], choice["finish_reason"])
        assert joined(parts, choice["index"]) == expected
    last = parts[-1]
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert last["provenance"] == whole["provenance"]
    assert last["seeds"] == [choice["seed"] for choice in whole["choices"]]


async def ask(script: Any, **body: Any) -> dict[str, Any]:
    """One whole answer, after checking that the stream of the same request says the same."""
    engine = FakeEngine(script)
    async with client_for(make_app(engine)) as client:
        body = {"prompt": "p", "seed": 1} | body
        response = await client.post("/generate", json=body)
        assert response.status_code == 200, response.text
        answer = response.json()
        parts = events((await client.post("/generate", json=body | {"stream": True})).text)
    for choice in answer["choices"]:
        assert joined(parts, choice["index"]) == (choice["text"], choice["token_ids"], choice["finish_reason"])
        reasons = [part["stop_reason"] for event in parts for part in event["choices"] if part["finish_reason"]]
        assert choice["stop_reason"] in reasons
    assert parts[-1]["usage"] == answer["usage"]
    assert not engine.live
    return answer


async def test_stop_string_across_tokens() -> None:
    answer = await ask(says("hello STOP world"), stop=["zzz", "STOP"])
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello ", "stop", "STOP")
    assert bytes(choice["token_ids"]) == b"hello STOP"
    assert answer["usage"]["completion_tokens"] == 10


async def test_stop_string_ends_the_engine_request() -> None:
    engine = FakeEngine(says("abcdefgh" * 10, delay=0.001))
    async with client_for(make_app(engine)) as client:
        await client.post("/generate", json={"prompt": "p", "stop": "c"})
    assert engine.submitted[0].aborted
    assert not engine.live


async def test_a_slow_client_does_not_keep_a_stopped_request_running() -> None:
    engine = FakeEngine(says("abcdefgh" * 10, delay=0.001))
    services: Services = make_app(engine).state.services
    generation = await admit(GenerateRequest(prompt="p", stop="c"), services)

    async def emit(delta: ChoiceDelta) -> None:
        assert delta.finish_reason is None or not engine.live

    await generation.run(asyncio.Event().wait, emit)  # type: ignore[arg-type]
    assert services.metrics.of("tiny").finished["stop"] == 1


async def test_eos_has_no_text() -> None:
    choice = (await ask(says("bye", end=True)))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("bye", "stop", None)
    assert choice["token_ids"][-1] == 256


async def test_stop_token_is_named() -> None:
    choice = (await ask(lambda prompt, params: Plan([[97], [98]], "stop", 98), stop_token_ids=[98]))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", 98)


async def test_engine_finish_reasons_pass_through() -> None:
    for reason in ("deadline", "abort"):
        plan = Plan([[97], [98]], reason)
        choice = (await ask(lambda prompt, params, plan=plan: plan, deadline_ms=60_000))["choices"][0]
        assert choice["finish_reason"] == reason


async def test_multibyte_text_streams_whole() -> None:
    text = "नमस्ते 👩‍🚀 naïve"
    for chunk in (1, 2, 5):
        assert (await ask(says(text, chunk=chunk), max_tokens=100))["choices"][0]["text"] == text


async def test_choices_have_their_own_seeds(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    answer = (await client.post("/generate", json={"prompt": "p", "n": 4, "seed": 77})).json()
    seeds = [choice["seed"] for choice in answer["choices"]]
    assert seeds[0] == 77
    assert len(set(seeds)) == 4
    assert [stream.params.seed for stream in engine.submitted] == seeds
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 4 * 128, "cached_tokens": 0}
    alone = (await client.post("/generate", json={"prompt": "p", "seed": seeds[2]})).json()
    assert alone["choices"][0]["text"] == answer["choices"][2]["text"]


async def test_seed_is_drawn_and_returned(client: httpx.AsyncClient) -> None:
    seeds = set()
    for body in ({"prompt": "p"}, {"prompt": "p", "seed": None}):
        answer = (await client.post("/generate", json=body)).json()["choices"][0]
        again = (await client.post("/generate", json={"prompt": "p", "seed": answer["seed"]})).json()["choices"][0]
        assert again["text"] == answer["text"]
        seeds.add(answer["seed"])
    assert len(seeds) == 2
    assert all(0 <= seed < 2**53 for seed in seeds)


async def test_echo_puts_the_prompt_first() -> None:
    answer = await ask(says("def"), prompt="abc ", echo=True, stop="c")
    assert answer["choices"][0]["text"] == "abc def"
    answer = await ask(says("def"), prompt=list("é→".encode()), echo=True)
    assert answer["choices"][0]["text"] == "é→def"
    assert answer["usage"]["completion_tokens"] == 3


async def test_empty_prompt_starts_from_eos(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    assert (await client.post("/generate", json={"prompt": ""})).status_code == 200
    assert engine.submitted[0].prompt == [256]


async def test_prompt_of_ids(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    assert (await client.post("/generate", json={"prompt": [1, 2, 256]})).status_code == 200
    assert engine.submitted[0].prompt == [1, 2, 256]


async def test_null_max_tokens_is_the_rest_of_the_context(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    answer = (await client.post("/generate", json={"prompt": "a" * 250, "max_tokens": None})).json()
    assert answer["usage"]["completion_tokens"] == 6


async def test_parameters_reach_the_engine(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    body = {
        "prompt": "p", "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"5": -100, "6": 1.5},
        "seed": 2**63 - 1, "stop_token_ids": [3, 4], "ignore_eos": True, "logprobs": 2, "model": "tiny",
    }  # fmt: skip
    assert (await client.post("/generate", json=body)).status_code == 200
    params = engine.submitted[0].params
    for name in body.keys() - {"prompt", "model", "logit_bias", "stop_token_ids"}:
        assert getattr(params, name) == body[name], name
    assert params.logit_bias == {5: -100.0, 6: 1.5}
    assert params.stop_token_ids == (3, 4)


async def test_logprobs() -> None:
    choice = (await ask(says("ab"), logprobs=2))["choices"][0]
    assert [entry["text"] for entry in choice["logprobs"]] == ["a", "b"]
    assert choice["logprobs"][0]["top"][1] == {"id": 98, "text": "b", "logprob": -1.5}
    assert (await ask(says("ab"), logprobs=0))["choices"][0]["logprobs"][0]["top"] == []


async def test_cached_tokens_are_reported(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    engine.cached_tokens = 2
    answer = (await client.post("/generate", json={"prompt": "abc"})).json()
    assert answer["usage"]["cached_tokens"] == 2


async def test_long_prompts_are_tokenised(client: httpx.AsyncClient) -> None:
    engine = FakeEngine(max_model_len=10_000)
    async with client_for(make_app(engine)) as big:
        response = await big.post("/generate", json={"prompt": "a" * 5_000, "max_tokens": 1})
    assert response.json()["usage"]["prompt_tokens"] == 5_000


async def test_a_request_that_fails_leaves_the_others() -> None:
    def script(prompt: list[int], params: Any) -> Plan:
        return Plan([[97]] * 5, fail_after=2 if prompt == [98] else None)

    engine = FakeEngine(script)
    async with client_for(make_app(engine)) as client:
        failed = await client.post("/generate", json={"prompt": "b", "n": 3})
        fine = await client.post("/generate", json={"prompt": "c"})
    assert failed.status_code == 503
    assert failed.json()["error"]["code"] == "request_failed"
    assert fine.json()["choices"][0]["text"] == "aaaaa"
    assert not engine.live


async def test_choices_are_admitted_all_or_none(engine: FakeEngine, client: httpx.AsyncClient) -> None:
    real = engine.submit

    def third_fails(*args: Any, **options: Any) -> Any:
        if len(engine.submitted) == 2:
            raise QueueFullError(3)
        return real(*args, **options)

    engine.submit = third_fails  # type: ignore[method-assign]
    assert (await client.post("/generate", json={"prompt": "p", "n": 3})).status_code == 429
    assert [stream.aborted for stream in engine.submitted] == [True, True]
    assert not engine.live
