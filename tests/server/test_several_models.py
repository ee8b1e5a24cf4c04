"""Two models behind one real server, with one small KV cache: each answers what `generate()` alone would have said."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model.checkpoint import save_model
from model.config import llama_config
from model.generate import CausalModel
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from tests.server.clients import ask, open_client
from tests.server.expected import alone
from tests.server.real import EOS, VOCAB_SIZE, RealServer, load_alone, running, save_random, sum_metric

# Blocks of the larger model: one context of it and a little more.
NUM_BLOCKS = 36
CONTEXT = 512


def save_wider(folder: Path) -> Path:
    """Another random model with the same tokens, whose blocks are three times as large."""
    config = llama_config(3, 4, 4, 64, 160, vocab_size=VOCAB_SIZE, max_seq_len=CONTEXT, tie_word_embeddings=False)
    model = Transformer(replace(config, bos_token_id=EOS, eos_token_id=EOS))
    model.init_weights(seed=5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_({"lm_head.weight": 8.0, "embed_tokens.weight": 20.0}.get(name, 1.0))
    save_model(folder, model, tokenizer=Tokenizer.bytes(), dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("two")
    return {"tiny": save_random(root / "tiny"), "wider": save_wider(root / "wider")}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, CausalModel]:
    return {name: load_alone(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[RealServer]:
    block = 2 * 3 * 4 * 16 * 4 * 16
    options = ["--model", str(folders["wider"]), "--kv-cache-memory", str(NUM_BLOCKS * block)]
    aliases = ["--split", "both=tiny:1,wider:1", "--shadow", "tiny=wider:1"]
    with running(folders["tiny"], *options, *aliases, "--log-level", "warning") as server:
        greeting = server.wait_ready()
        assert "tiny" in greeting
        yield server
        server.wait_idle()
        assert "Traceback" not in server.log
        server.terminate()
        assert server.wait() == 0


def bodies_for_both(count: int) -> list[dict[str, Any]]:
    rng = random.Random(3)
    bodies = []
    for index in range(count):
        prompt = "It was the best of times. " * rng.randrange(3) + "".join(rng.choices("abcdef ghi", k=20))
        bodies.append(
            {
                "prompt": prompt, "max_tokens": rng.randrange(20, 120), "seed": index,
                "stream": rng.random() < 0.5, "temperature": rng.choice([0.0, 1.0]), "ignore_eos": True,
                "model": ("tiny", "wider", "both")[index % 3],
            }
        )  # fmt: skip
    return bodies


def test_both_answer_as_if_alone_from_one_cache(server: RealServer, models: dict[str, CausalModel]) -> None:
    bodies = bodies_for_both(36)

    async def load() -> list[Any]:
        async with open_client(server.url) as client:
            return await asyncio.gather(*(ask(client, body) for body in bodies))

    answers = asyncio.run(load())
    assert server.metric("vllm:num_preemptions_total") > 0
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status == 200, answer.body
        expected = {name: alone(model, body, body["seed"]).token_ids for name, model in models.items()}
        token_ids = answer.choices[0].token_ids
        if body["model"] == "both":
            assert token_ids in expected.values()
        else:
            assert token_ids == expected[body["model"]]
    for name in models:
        assert server.metric("vllm:generation_tokens_total", model_name=name) > 0
    info = httpx.get(f"{server.url}/info").json()
    assert [model["name"] for model in info["models"]] == ["tiny", "wider"]
    assert info["limits"]["kv_blocks"] == NUM_BLOCKS
    assert len({model["weights"] for model in info["models"]}) == 2


def test_what_a_shadow_finds_is_what_score_says(server: RealServer) -> None:
    """The metrics grow by the sums of POST /score over an answer."""
    wait_for_shadow(server)
    before = httpx.get(f"{server.url}/metrics").text
    body = {"prompt": "It was the best", "max_tokens": 40, "seed": 9, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/generate", json=body).json()
    text = [*b"It was the best", *answer["choices"][0]["token_ids"]]
    found = wait_for_shadow(server, above=sum_metric(before, "quill:shadow_answers_total", outcome="scored"))
    for metric, model in (("quill:shadow_live_nll_total", "tiny"), ("quill:shadow_nll_total", "wider")):
        told = httpx.post(f"{server.url}/score", json={"texts": [text], "model": model}).json()
        assert told["model"] == model
        logprobs = told["results"][0]["logprobs"]
        for part, expected in (("prompt", logprobs[1:15]), ("answer", logprobs[15:])):
            grown = sum_metric(found, metric, part=part) - sum_metric(before, metric, part=part)
            assert grown == pytest.approx(-sum(expected), rel=1e-9)
    difference = sum_metric(found, "quill:shadow_nll_difference", part="answer")
    sums = [sum_metric(found, f"quill:shadow_{name}_total", part="answer") for name in ("nll", "live_nll", "tokens")]
    assert difference == pytest.approx((sums[0] - sums[1]) / sums[2])


def wait_for_shadow(server: RealServer, above: float = -1.0) -> str:
    """/metrics, once every answer of the live model has been scored, and more than `above` of them."""
    for _ in range(500):
        text = httpx.get(f"{server.url}/metrics").text
        scored = sum_metric(text, "quill:shadow_answers_total", outcome="scored")
        live = sum_metric(text, "vllm:request_success_total", model_name="tiny", finished_reason="length")
        scoring = sum_metric(text, "vllm:num_requests_running") + sum_metric(text, "vllm:num_requests_waiting")
        if scored > above and scored == live and not scoring:
            return text
        time.sleep(0.02)
    raise AssertionError("the shadow did not come to an end")
