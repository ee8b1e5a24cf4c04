"""One real server over one real engine: what comes back over HTTP is what `generate()` alone would have said.

The KV cache holds little more than one context, so that load brings preemption and reuse of prefixes.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.transformer import Transformer
from tests.server.clients import (
    Answer,
    Choice,
    ask,
    ask_all,
    ask_and_give_up,
    ask_and_leave,
    ask_one,
    open_client,
)
from tests.server.expected import alone, mixed_bodies, prompt_ids
from tests.server.hostile_bodies import BODIES
from tests.server.real import VOCAB_SIZE, RealServer, load_alone, memory_maps, random_config, running, save_random

CONTEXT = random_config().max_seq_len
NUM_BLOCKS = CONTEXT // 16 + 8
LONG: dict[str, Any] = {"prompt": "a long story", "max_tokens": None, "ignore_eos": True, "seed": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("real") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load_alone(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RealServer]:
    config = random_config()
    block = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4 * 16
    with running(folder, "--kv-cache-memory", str(NUM_BLOCKS * block), "--log-level", "warning") as server:
        server.wait_ready()
        yield server
        server.wait_idle()
        assert "Traceback" not in server.log
        server.terminate()
        assert server.wait() == 0


def assert_equals_alone(answer: Answer, body: dict[str, Any], model: Transformer) -> None:
    assert answer.status == 200, answer.body
    assert len(answer.choices) == body.get("n", 1)
    assert answer.choices[0].seed == body["seed"]
    assert len({choice.seed for choice in answer.choices}) == len(answer.choices)
    for choice in answer.choices:
        assert choice.seed is not None
        expected = alone(model, body, choice.seed)
        assert choice.token_ids == expected.token_ids
        assert choice.text == expected.text
        assert (choice.finish_reason, choice.stop_reason) == (expected.finish_reason, expected.stop_reason)
        assert choice.logprobs == expected.logprobs
    assert answer.usage["prompt_tokens"] == len(prompt_ids(body))
    assert answer.usage["completion_tokens"] == sum(len(choice.token_ids) for choice in answer.choices)


def test_mixed_load_with_leaving_clients_equals_generate_alone(server: RealServer, model: Transformer) -> None:
    # Choices that together need more blocks than there are, whatever else runs.
    big = LONG | {"max_tokens": 250, "n": 3, "stream": True}
    bodies = [big, *mixed_bodies(model, 48)]
    leaving = [body | {"max_tokens": 200, "ignore_eos": True, "stop": []} for body in bodies[1::4]]

    async def load() -> tuple[list[Answer], list[Choice]]:
        async with open_client(server.url) as client:
            answers = asyncio.gather(*(ask(client, body) for body in bodies))
            departures = [
                ask_and_leave(client, body | {"stream": True}, 1 + number) for number, body in enumerate(leaving)
            ]
            impatient = [ask_and_give_up(client, LONG | {"stream": False}, 0.05 * number) for number in range(1, 4)]
            partial = await asyncio.gather(*departures)
            await asyncio.gather(*impatient)
            return await answers, partial

    answers, partial = asyncio.run(load())
    server.wait_idle()
    assert server.metric("vllm:num_preemptions_total") > 0
    assert server.metric("vllm:prefix_cache_hits_total") > 0
    assert server.metric("vllm:request_success_total", finished_reason="abort") > 0
    for body, answer in zip(bodies, answers, strict=True):
        assert_equals_alone(answer, body, model)
    assert {choice.finish_reason for answer in answers for choice in answer.choices} == {"stop", "length"}
    assert any(isinstance(choice.stop_reason, str) for answer in answers for choice in answer.choices)
    for body, choice in zip(leaving, partial, strict=True):
        expected = alone(model, body | {"max_tokens": len(choice.token_ids)}, body["seed"])
        assert choice.token_ids == expected.token_ids
        assert expected.text.startswith(choice.text)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_within_a_second(server: RealServer, stream: bool) -> None:
    body = LONG | {"n": 8, "stream": stream}

    async def leave() -> None:
        async with open_client(server.url) as client:
            request = asyncio.create_task(ask(client, body))
            await asyncio.to_thread(server.wait_used)
            request.cancel()

    aborted = server.metric("vllm:request_success_total", finished_reason="abort")
    asyncio.run(leave())
    assert server.wait_idle(seconds=5.0) < 1.0
    assert server.metric("vllm:request_success_total", finished_reason="abort") > aborted


def test_hostile_requests_change_nothing_for_their_neighbours(server: RealServer) -> None:
    canary = {"prompt": "canary", "max_tokens": 100, "temperature": 0.8, "seed": 9, "logprobs": 3, "ignore_eos": True}
    before = ask_one(server.url, **canary)
    # At the edge of what is allowed: ids without text, biases that leave nothing else, floods of choices.
    padding = {str(token_id): 100.0 for token_id in range(257, VOCAB_SIZE)}
    edge: list[dict[str, Any]] = [
        {"prompt": [VOCAB_SIZE - 1] * 100, "logit_bias": padding, "max_tokens": 20, "logprobs": 20},
        {"prompt": "a", "logit_bias": {str(i): -100.0 for i in range(257)} | padding, "max_tokens": 20, "n": 4},
        {"prompt": "b", "repetition_penalty": 1e-9, "frequency_penalty": -2.0, "max_tokens": 60},
        {"prompt": "c", "repetition_penalty": 10.0, "presence_penalty": 2.0, "temperature": 1e-300, "max_tokens": 60},
        {"prompt": "d", "temperature": 5e-324, "top_p": 5e-324, "min_p": 1.0, "top_k": 1, "max_tokens": 30},
        {"prompt": "e", "n": 16, "max_tokens": 40, "stop": ["\ufffd"] * 16, "stream": True},
        {"prompt": "f", "stop_token_ids": list(range(64)), "min_tokens": 50, "max_tokens": 50},
        {"prompt": "g", "min_tokens": 30, "max_tokens": 30, "logit_bias": {"256": 100.0}},
        {"prompt": "\x00\x7f\u202e" * 30, "echo": True, "stream": True, "deadline_ms": 1},
    ]

    async def flood() -> tuple[list[int], list[Answer], list[Answer]]:
        headers = {"content-type": "application/json"}
        async with open_client(server.url) as client:
            canaries = asyncio.gather(*(ask(client, canary | {"stream": i % 2 == 0}) for i in range(6)))
            odd = asyncio.gather(*(ask(client, body) for body in edge))
            hostile = await asyncio.gather(
                *(client.post("/generate", content=body, headers=headers) for body in BODIES)
            )
            assert all(len(response.content) <= 4096 for response in hostile if response.status_code != 200)
            return [response.status_code for response in hostile], await odd, await canaries

    statuses, odd, canaries = asyncio.run(flood())
    assert set(statuses) <= {200, 422}
    assert statuses.count(422) > 0.95 * len(BODIES)
    assert {answer.status for answer in odd} <= {200, 429}
    assert max(token for answer in odd for choice in answer.choices for token in choice.token_ids) <= 256
    assert [answer.only.text for answer in canaries] == [before.only.text] * 6
    assert [answer.only.logprobs for answer in canaries] == [before.only.logprobs] * 6
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_every_request_is_accounted_for(server: RealServer) -> None:
    """A ledger of the clients against the server's counters."""
    rng = random.Random(3)
    bodies: list[dict[str, Any]] = [
        {
            "prompt": "x" * rng.randrange(40) + str(number),
            "max_tokens": rng.randrange(1, 8),
            "n": rng.choice([1, 1, 1, 2, 4]),
            "stream": rng.random() < 0.5,
            "logit_bias": {"256": 3.0},
        }
        for number in range(300)
    ]
    names = ("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:e2e_request_latency_seconds", "vllm:request_success")
    counters = [f"{name}_count" if name.endswith("seconds") else f"{name}_total" for name in names]
    server.wait_idle()
    before = [server.metric(name) for name in counters]
    reasons_before = {r: server.metric("vllm:request_success_total", finished_reason=r) for r in ("stop", "length")}
    answers = ask_all(server.url, bodies, at_once=50)
    server.wait_idle()
    assert {answer.status for answer in answers} == {200}
    assert len({answer.headers["x-request-id"] for answer in answers}) == 300
    choices = [choice for answer in answers for choice in answer.choices]
    assert [choice.num_ends for choice in choices] == [1] * sum(body["n"] for body in bodies)
    for body, answer in zip(bodies, answers, strict=True):
        assert (len(answer.events) > 0) == body["stream"]
        assert all(1 <= len(choice.token_ids) <= body["max_tokens"] for choice in answer.choices)
    # The engine processes a prompt once for each choice, while usage counts it once.
    prompts = sum(answer.usage["prompt_tokens"] * body["n"] for body, answer in zip(bodies, answers, strict=True))
    generated = sum(answer.usage["completion_tokens"] for answer in answers)
    assert generated == sum(len(choice.token_ids) for choice in choices)
    after = [server.metric(name) for name in counters]
    growth = [int(new - old) for new, old in zip(after, before, strict=True)]
    assert growth == [prompts, generated, len(choices), len(choices)]
    ended = Counter(choice.finish_reason for choice in choices)
    for reason, count in reasons_before.items():
        assert server.metric("vllm:request_success_total", finished_reason=reason) - count == ended[reason] > 0


def test_the_context_is_filled_but_never_exceeded(server: RealServer, model: Transformer) -> None:
    whole = {"prompt": "z" * (CONTEXT - 40), "max_tokens": None, "ignore_eos": True, "temperature": 0.0, "seed": 1}
    answer = ask_one(server.url, **whole)
    assert answer.usage["completion_tokens"] == 40
    assert answer.only.finish_reason == "length"
    assert answer.only.token_ids == alone(model, whole | {"max_tokens": 40}, 1).token_ids
    last = ask_one(server.url, prompt=[5] * (CONTEXT - 1), max_tokens=1)
    assert last.usage == {"prompt_tokens": CONTEXT - 1, "completion_tokens": 1, "cached_tokens": 0}
    for body, param, numbers in (
        ({"prompt": "z" * 500, "max_tokens": 13}, "max_tokens", ("500", "13", str(CONTEXT))),
        ({"prompt": [1] * CONTEXT, "max_tokens": None}, "prompt", (str(CONTEXT),)),
        ({"prompt": "z" * 700_000, "max_tokens": 1}, "prompt", ("700000", str(CONTEXT))),
    ):
        refused = ask_one(server.url, **body)
        assert (refused.status, refused.code) == (422, "context_length_exceeded")
        assert refused.body["error"]["param"] == param
        assert all(number in refused.body["error"]["message"] for number in numbers)


def test_prompts_as_text_as_ids_and_empty(server: RealServer) -> None:
    rest: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
    text, ids = ask_one(server.url, prompt="żółw", **rest), ask_one(server.url, prompt=list("żółw".encode()), **rest)
    assert text.only.token_ids == ids.only.token_ids
    empty, start = ask_one(server.url, prompt="", **rest), ask_one(server.url, prompt=[256], **rest)
    assert empty.only.token_ids == start.only.token_ids
    assert empty.usage["prompt_tokens"] == 1
    echoed = ask_one(server.url, prompt="żółw", echo=True, stream=True, **rest)
    assert echoed.only.text == "żółw" + text.only.text


def test_a_drawn_seed_repeats_its_answer(server: RealServer) -> None:
    first = ask_one(server.url, prompt="again", max_tokens=40, n=3)
    again = ask_one(server.url, prompt="again", max_tokens=40, n=3, seed=first.choices[0].seed, stream=True)
    other = ask_one(server.url, prompt="again", max_tokens=40)
    assert [choice.token_ids for choice in again.choices] == [choice.token_ids for choice in first.choices]
    assert [choice.seed for choice in again.choices] == [choice.seed for choice in first.choices]
    assert other.only.seed != first.choices[0].seed


def test_a_deadline_ends_a_request_and_frees_it(server: RealServer, model: Transformer) -> None:
    bodies = [LONG | {"deadline_ms": 60, "n": 16, "stream": stream} for stream in (True, False)]
    for answer in ask_all(server.url, bodies):
        assert answer.status == 200
        assert "deadline" in {choice.finish_reason for choice in answer.choices}
        token_ids = answer.choices[0].token_ids
        assert token_ids == alone(model, LONG | {"max_tokens": max(1, len(token_ids))}, 4).token_ids[: len(token_ids)]
    assert server.wait_idle() < 1.0
    assert server.metric("vllm:request_success_total", finished_reason="deadline") > 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_shows_text_while_it_is_made(server: RealServer) -> None:
    body = json.dumps(LONG | {"stream": True, "n": 8})
    command = ["curl", "-sSN", f"{server.url}/generate", "-H", "Content-Type: application/json", "-d", body]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        assert curl.stdout.readline().startswith('data: {"id":"gen-')
        assert server.metric("vllm:num_requests_running") > 0
        curl.terminate()
    assert server.wait_idle() < 1.0


def test_only_the_engines_process_holds_torch(server: RealServer) -> None:
    assert "libtorch" not in memory_maps(server.popen.pid)
    assert "libtorch" in memory_maps(server.engine.pid)
