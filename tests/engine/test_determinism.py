"""The same answer under any load: every request gets, to the bit, the tokens and log-probabilities that it gets alone.

The full size, a thousand requests for each model and precision: `pytest -m slow tests/engine/test_determinism.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.errors import ConfigError
from server.engine.messages import AddRequest, EngineStats
from server.engine.speculation import PromptLookup
from tests.engine.conftest import MODELS
from tests.engine.mixed_load import (
    Answers,
    cache_bytes,
    differing,
    erring_guesses,
    make_engine,
    make_lively_checkpoint,
    mixed_requests,
    run_alone,
    run_under_load,
    split_sums,
)
from tests.server.real import running, save_random

PRECISIONS = ("float32", "bfloat16", "int8")
COUNT = 28
# Room for one context of 160 tokens and a few blocks more: sequences preempt each other.
SMALL_POOL = 14


@dataclass(frozen=True)
class Load:
    """One way of running many requests at once. `happened` says of the engine's counts that it was this way."""

    happened: Callable[[EngineStats], bool]
    changes: dict[str, object] = field(default_factory=dict)
    small_pool: bool = False
    passes: int = 1
    abort_share: float = 0.0
    guessing: bool = False
    most: int = 1_000_000


LOADS = {
    "beside others": Load(lambda stats: stats.num_preemptions == 0, {"max_num_batched_tokens": 1024}),
    "in chunks": Load(
        # Prompts have 40 tokens on average and a step takes 8.
        lambda stats: stats.num_steps > stats.prompt_tokens / 8,
        {"max_num_seqs": 8, "max_num_batched_tokens": 8, "prefix_caching": False},
    ),
    "preempted": Load(lambda stats: stats.num_preemptions > 0, {"prefix_caching": False}, small_pool=True),
    # The second pass finds nearly every prompt in the cache.
    "prefix cached": Load(lambda stats: stats.prefix_cache_hits > stats.prefix_cache_queries / 4, passes=2),
    "guessing ahead": Load(
        lambda stats: (
            stats.generation_tokens / 8
            < stats.spec_decode_num_accepted_tokens
            < 0.9 * stats.spec_decode_num_draft_tokens
        ),
        {"speculation": True},
        guessing=True,
        most=3,  # no guesses are made while others wait, and only so few may guess several tokens
    ),
    "running ahead": Load(
        lambda stats: stats.num_preemptions > 0 and stats.prefix_cache_hits > 0,
        {"max_num_batched_tokens": 64, "overlap": True},
        small_pool=True,
    ),
    "aborted neighbours": Load(lambda stats: stats.num_free_blocks == stats.num_blocks, abort_share=0.2),
    "all of it": Load(
        lambda stats: stats.num_preemptions > 0 and stats.prefix_cache_hits > 0,
        {"max_num_batched_tokens": 32, "speculation": True},
        small_pool=True,
        passes=2,
        abort_share=0.04,
    ),
}


@pytest.fixture(scope="session", params=sorted(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_checkpoint(MODELS[request.param], tmp_path_factory.mktemp(request.param) / "model")


@cache
def answers_alone(folder: Path, precision: str, count: int) -> tuple[list[AddRequest], Answers]:
    """Skips where the engine does not run the precision."""
    requests = mixed_requests(count, seed=5)
    try:
        engine = make_engine(folder, precision, prefix_caching=False)
    except ConfigError as error:
        pytest.skip(str(error))
    return requests, run_alone(engine, requests)


def check(folder: Path, precision: str, load: Load, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, alone = answers_alone(folder, precision, count)
    if load.guessing:
        monkeypatch.setattr(PromptLookup, "propose", erring_guesses(requests, alone))
    changes = dict(load.changes)
    if load.small_pool:
        changes["kv_cache_memory"] = cache_bytes(make_engine(folder, precision), SMALL_POOL)
    engine = make_engine(folder, precision, **changes)
    for seed in range(load.passes):
        answers = run_under_load(engine, requests, seed, abort_share=load.abort_share, most=load.most)
        assert len(answers) == count
        unfinished = sum(answer.finish_reason is None for answer in answers.values())
        assert unfinished == 0 if not load.abort_share else 0 < unfinished < count / 2
        assert differing(answers, alone) == []
    assert load.happened(engine.stats()), engine.stats()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("load", LOADS)
def test_a_request_under_load_is_the_request_alone(
    checkpoint: Path, load: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(checkpoint, precision, LOADS[load], COUNT, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("load", LOADS)
def test_a_thousand_requests_under_load_are_each_alone(
    checkpoint: Path, load: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(checkpoint, precision, LOADS[load], 1_000, monkeypatch)


def test_the_requests_are_of_every_kind() -> None:
    requests, params = mixed_requests(COUNT, seed=5), [request.params for request in mixed_requests(COUNT, seed=5)]
    assert sum(p.temperature == 0.0 for p in params) > 6
    assert sum(p.temperature > 0.0 for p in params) > 6
    for name in ("top_k", "min_p", "logit_bias", "stop_token_ids", "logprobs", "presence_penalty", "ignore_eos"):
        assert 2 < sum(bool(getattr(p, name)) for p in params) < COUNT - 2, name
    beginnings = [tuple(request.prompt_token_ids[:16]) for request in requests]
    assert max(map(beginnings.count, beginnings)) > 2
    assert len({p.seed for p in params}) == COUNT


def test_answers_without_any_variety_would_prove_nothing(checkpoint: Path) -> None:
    _, alone = answers_alone(checkpoint, "float32", COUNT)
    assert len({tuple(answer.token_ids) for answer in alone.values()}) > 0.9 * COUNT
    assert len({token_id for answer in alone.values() for token_id in answer.token_ids}) > 80
    assert {answer.finish_reason for answer in alone.values()} == {"stop", "length"}


def test_a_product_that_depends_on_the_number_of_rows_is_found_out(llama_checkpoint: Path) -> None:
    requests = mixed_requests(10, seed=5)
    engine = make_engine(llama_checkpoint, "float32", prefix_caching=False)
    split_sums(engine, llama_checkpoint)
    alone = run_alone(engine, requests)
    assert differing(run_alone(engine, requests), alone) == []
    assert len(differing(run_under_load(engine, requests, seed=0), alone)) > 2


def ask(url: str, body: dict[str, Any]) -> tuple[list[int], str, str]:
    """Token ids, text and finish reason of one choice, put together from the events where it is streamed."""
    response = httpx.post(f"{url}/generate", json=body, timeout=60)
    assert response.status_code == 200, response.text
    lines = [response.text]
    if body["stream"]:
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    token_ids = [token_id for choice in choices for token_id in choice["token_ids"]]
    return token_ids, "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


def test_streamed_or_not_over_http_is_the_same_answer(tmp_path: Path) -> None:
    """Each body alone and not streamed, then all at once, streamed and not."""
    bodies: list[dict[str, Any]] = [
        {
            "prompt": "To be" * (1 + number % 7),
            "max_tokens": 8 + number,
            "temperature": number % 3 * 0.6,
            "seed": number,
        }
        for number in range(10)
    ]
    with running(save_random(tmp_path / "model"), "--max-num-batched-tokens", "24", "--max-num-seqs", "8") as server:
        server.wait_ready()
        alone = [ask(server.url, body | {"stream": False}) for body in bodies]
        with ThreadPoolExecutor(2 * len(bodies)) as pool:
            together = [
                pool.submit(ask, server.url, body | {"stream": stream}) for body in bodies for stream in (True, False)
            ]
        assert [future.result() for future in together] == [answer for answer in alone for _ in range(2)]
    assert len({tuple(token_ids) for token_ids, _, _ in alone}) == len(bodies)
