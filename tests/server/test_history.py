"""GET /requests/{id}: what is kept, for whom, and that its replay is the request."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import httpx
import pytest

from model.sampling_params import SamplingParams
from server.grammars import make_grammar, native_grammar
from server.history import NOT_REPLAYED, replay_body
from server.prompts import Prompt
from server.schemas.native import GenerateRequest
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine, Plan, says
from tests.server.live import LiveServer, wait_until

pytestmark = pytest.mark.anyio
BODY = {
    "prompt": "x!z", "max_tokens": 9, "min_tokens": 2, "temperature": 0.7, "top_k": 9, "top_p": 0.5, "min_p": 0.01,
    "repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": -0.1, "logit_bias": {"7": 2.5},
    "seed": 5, "stop": ["zz"], "stop_token_ids": [9], "ignore_eos": True, "n": 2, "logprobs": 1,
}  # fmt: skip


async def record(client: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    answer = await client.get(f"/requests/{request_id}")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_off_by_default(client: httpx.AsyncClient) -> None:
    made = (await client.post("/generate", json={"prompt": "a", "max_tokens": 2})).json()["id"]
    answer = await client.get(f"/requests/{made}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "history_off"
    assert "--request-history" in answer.json()["error"]["message"]


async def test_a_replay_has_all_that_the_request_asked_for() -> None:
    engine = FakeEngine()
    async with client_for(make_app(engine, request_history=4)) as client:
        made = (await client.post("/generate", json=BODY)).json()
        told = await record(client, made["id"])
        again = (await client.post("/generate", json=told["replay"])).json()
    assert [choice["token_ids"] for choice in again["choices"]] == [each["token_ids"] for each in made["choices"]]
    first, second = engine.submitted[:2], engine.submitted[2:]
    assert [(each.prompt, each.params) for each in first] == [(each.prompt, each.params) for each in second]
    assert told["replay"]["prompt"] == list(b"x!z"), "ids, never text"
    assert "x!z" not in str(told)
    assert told["parameters"][0]["stop"] == ["zz"]
    assert [each["seed"] for each in told["choices"]] == [each["seed"] for each in made["choices"]]
    assert told["usage"] == made["usage"]
    assert told["provenance"] == made["provenance"]
    assert told["status"] == "finished"


def test_no_field_of_the_body_is_forgotten() -> None:
    """A field is replayed as a parameter of the sampler, or is among those that come in other ways."""
    sampled = {each.name for each in dataclasses.fields(SamplingParams)}
    assert set(GenerateRequest.model_fields) - NOT_REPLAYED <= sampled
    body = replay_body(Prompt([1, 2], SamplingParams()), "tiny")
    assert body is not None
    assert set(body) == set(GenerateRequest.model_fields) - {"stream", "echo", "deadline_ms"}
    GenerateRequest.model_validate_json(json.dumps(body))


@pytest.mark.parametrize(
    ("kind", "value"),
    [("regex", "a+"), ("choice", ["x", "y"]), ("lark", 'start: "a"'), ("json_schema", {"type": "object"})],
)
def test_a_grammar_is_replayed_as_it_was_asked_for(kind: str, value: object) -> None:
    grammar = make_grammar("grammar", kind, value)
    body = replay_body(Prompt([1], SamplingParams(grammar=grammar)), "tiny")
    asked = GenerateRequest.model_validate_json(json.dumps(body))
    assert native_grammar(asked.grammar) == grammar


async def test_every_route_that_writes_text_is_kept_under_all_its_ids() -> None:
    engine = FakeEngine()
    async with client_for(make_app(engine, request_history=8)) as client:
        for path, body in (
            ("/v1/completions", {"prompt": ["ab", "cd"], "max_tokens": 3, "seed": 1, "n": 2}),
            ("/generate", {"inputs": "ab", "parameters": {"max_new_tokens": 3, "do_sample": True, "seed": 3}}),
        ):
            answer = await client.post(path, json=body)
            number = answer.headers["x-request-id"].removeprefix("req-")
            told = await record(client, f"cmpl-{number}")
            assert told == await record(client, number) == await record(client, f"req-{number}")
            replays = told["replay"] if isinstance(told["replay"], list) else [told["replay"]]
            start = len(engine.submitted)
            originals = engine.submitted[start - len(told["choices"]) :]
            for replay in replays:
                assert (await client.post("/generate", json=replay)).status_code == 200
            for old, new in zip(originals, engine.submitted[start:], strict=True):
                assert (old.prompt, dataclasses.replace(old.params, logprobs=None)) == (
                    new.prompt, dataclasses.replace(new.params, logprobs=None),
                )  # fmt: skip


async def test_only_the_latest_are_kept() -> None:
    async with client_for(make_app(FakeEngine(), request_history=2)) as client:
        ids = [(await client.post("/generate", json={"prompt": "a", "max_tokens": 1})).json()["id"] for _ in range(3)]
        statuses = [(await client.get(f"/requests/{each}")).status_code for each in ids]
        assert statuses == [404, 200, 200]
        for wrong in ("gen-", "gen-xyz", "0" * 24, "%2e%2e", "a" * 5000, f"GEN-{ids[1]}", ids[1] + "0"):
            answer = await client.get(f"/requests/{wrong}")
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "request_not_found"


async def test_each_key_sees_its_own() -> None:
    keys = [{"authorization": f"Bearer key-number-{number}"} for number in (1, 2)]
    app = make_app(FakeEngine(), ["key-number-1", "key-number-2"], request_history=9)
    async with client_for(app) as client:
        made = [
            (await client.post("/generate", json={"prompt": "a", "max_tokens": 1}, headers=key)).json()["id"]
            for key in keys
        ]
        seen = [[(await client.get(f"/requests/{each}", headers=key)).status_code for each in made] for key in keys]
        assert seen == [[200, 404], [404, 200]]
        assert (await client.get(f"/requests/{made[0]}")).status_code == 401


@pytest.mark.parametrize("manner", ["stop string", "deadline", "error"])
async def test_how_it_ended(manner: str) -> None:
    scripts = {
        "stop string": says("abcd"),
        "deadline": lambda prompt, params: Plan([[]], "deadline", never_scheduled=True),
        "error": lambda prompt, params: Plan([[1], [2]], fail_after=1),
    }
    async with client_for(make_app(FakeEngine(scripts[manner]), request_history=9)) as client:
        answer = await client.post("/generate", json={"prompt": "a", "stop": "c"})
        [choice] = (await record(client, answer.headers["x-request-id"]))["choices"]
    assert choice["finish_reason"] == {"stop string": "stop"}.get(manner, manner)
    timings = choice["timings"]
    if manner == "stop string":
        assert 0 < timings["started"] <= 0.011
        assert timings["first_token"] <= timings["finished"]
    elif manner == "deadline":
        assert timings["started"] is None


def test_one_that_runs_and_one_whose_client_left() -> None:
    engine = FakeEngine(says("abcdefgh" * 20, delay=0.02))
    with LiveServer(engine, request_history=4) as server:
        with httpx.stream("POST", f"{server.url}/generate", json={"prompt": "a", "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            url = f"{server.url}/requests/{response.headers['x-request-id']}"
            told = httpx.get(url).json()
            assert (told["status"], told["choices"][0]["finish_reason"]) == ("running", None)
        wait_until(lambda: httpx.get(url).json()["status"] == "finished")
        assert httpx.get(url).json()["choices"][0]["finish_reason"] == "abort"
