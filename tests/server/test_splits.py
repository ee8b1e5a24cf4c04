"""Splits and shadows over a scripted engine, and how they are written on the command line."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from server.app import create_app
from server.services import Services, TextTools
from server.settings import Settings
from server.shadow import same_tokens
from server.splits import Shadow, Split, parse_shadows, parse_splits
from tests.server.conftest import client_for
from tests.server.fake_engine import FakeEngine, fake_prompt_logprob
from tests.server.real import sum_metric

pytestmark = pytest.mark.anyio
MODELS = ["old", "new"]


def make_pair(engine: FakeEngine, **settings: object) -> FastAPI:
    """An app over two models, of which the second has a shorter context."""
    assert engine.info is not None
    first = engine.info.models[0]
    models = [
        msgspec.structs.replace(first, name="old", max_model_len=256),
        msgspec.structs.replace(first, name="new", max_model_len=64, weights_digest="sha256:new"),
    ]
    engine._info = msgspec.structs.replace(engine.info, models=models)
    app = create_app(Settings(model=[Path("models/old"), Path("models/new")], **settings), engine)  # type: ignore[arg-type]
    services: Services = app.state.services
    services.set_tokenizer(Tokenizer.bytes(), None, {"new": TextTools(Tokenizer.bytes())})
    return app


async def test_each_request_is_answered_by_the_model_it_names(engine: FakeEngine) -> None:
    app = make_pair(engine)
    async with client_for(app) as client:
        for name, expected in ((None, "old"), ("old", "old"), ("new", "new")):
            body = {"prompt": "a", "max_tokens": 2} | ({} if name is None else {"model": name})
            native = (await client.post("/generate", json=body)).json()
            assert native["model"] == expected
            assert native["provenance"]["weights"] == ("sha256:new" if expected == "new" else "sha256:abc")
            assert engine.submitted[-1].model == ("new" if expected == "new" else None)
            openai = (await client.post("/v1/completions", json={"model": expected, "prompt": "a"})).json()
            assert openai["model"] == expected
        for path, body in (
            ("/generate", {"prompt": "a", "model": "other"}),
            ("/v1/completions", {"prompt": "a", "model": "other"}),
            ("/score", {"texts": ["a"], "model": "other"}),
            ("/tokenize", {"text": "a", "model": "other"}),
        ):
            assert (await client.post(path, json=body)).status_code == 404, path
        tokens = (await client.post("/tokenize", json={"text": "a", "model": "new"})).json()
        assert tokens["max_model_len"] == 64
        long = await client.post("/generate", json={"prompt": "a" * 60, "max_tokens": 60, "model": "new"})
        assert long.status_code == 422
        assert "context of 64" in long.json()["error"]["message"]
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(model["id"], model["max_model_len"]) for model in listed] == [("old", 256), ("new", 64)]
        text = (await client.get("/metrics")).text
    assert sum_metric(text, "vllm:request_success_total", model_name="old", finished_reason="length") == 4
    assert sum_metric(text, "vllm:request_success_total", model_name="new", finished_reason="length") == 2


async def test_a_split_answers_by_seed_and_says_which_model_did(engine: FakeEngine) -> None:
    app = make_pair(engine, split="chat=old:3,new:1")
    async with client_for(app) as client:
        first = (await client.post("/generate", json={"prompt": "a", "max_tokens": 1, "model": "chat"})).json()
        seed = first["choices"][0]["seed"]
        body = {"prompt": "a", "max_tokens": 1, "model": "chat", "seed": seed}
        again = (await client.post("/generate", json=body)).json()
        assert again["model"] == first["model"]
        assert again["choices"] == first["choices"]
        answered = [(await client.post("/generate", json=body | {"seed": seed})).json()["model"] for seed in range(60)]
        split = Split(("old", "new"), (3.0, 1.0))
        assert answered == [split.choose("chat", seed) for seed in range(60)]
        assert len(set(answered)) == 2
        many = {"model": "chat", "prompt": ["a", "a"], "max_tokens": 8}
        texts = [choice["text"] for choice in (await client.post("/v1/completions", json=many)).json()["choices"]]
        assert texts[0] != texts[1]
        refused = await client.post("/score", json={"texts": ["a"], "model": "chat"})
        assert refused.status_code == 422
        assert refused.json()["error"]["message"] == "model names a split; name one of its models: old, new"
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(model["id"], model["max_model_len"]) for model in listed][-1] == ("chat", 64)
        assert (await client.get("/info")).json()["splits"] == {"chat": {"old": 0.75, "new": 0.25}}


def test_shares_are_the_weights() -> None:
    split = Split(("a", "b", "c"), (6.0, 3.0, 1.0))
    drawn = [split.choose("name", seed) for seed in range(20_000)]
    for model, share in split.shares.items():
        deviation = math.sqrt(share * (1 - share) / len(drawn))
        assert abs(drawn.count(model) / len(drawn) - share) < 4 * deviation
    other = [split.choose("another", seed) for seed in range(20_000)]
    agree = sum(a == b for a, b in zip(drawn, other, strict=True)) / len(drawn)
    assert abs(agree - (0.36 + 0.09 + 0.01)) < 0.02  # as two independent choices do


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=5), st.integers(0, 2**63 - 1))
def test_every_seed_has_a_model(weights: list[float], seed: int) -> None:
    split = Split(tuple(map(str, range(len(weights)))), tuple(weights))
    assert split.choose("x", seed) in split.models
    assert math.isclose(sum(split.shares.values()), 1.0)


def test_splits_and_shadows_as_they_are_written() -> None:
    found = parse_splits(["a=old:9", "new:1", "b=new:1", "old:0.5"], MODELS)
    assert found == {"a": Split(("old", "new"), (9.0, 1.0)), "b": Split(("new", "old"), (1.0, 0.5))}
    assert parse_shadows(["old=new:0.25"], MODELS) == {"old": Shadow("new", 0.25)}
    settings = Settings(model=[Path("old"), Path("new")], split="a=old:9,new:1", shadow="old=new:0.25")  # type: ignore[arg-type]
    assert settings.splits == {"a": found["a"]}
    assert settings.shadows == {"old": Shadow("new", 0.25)}


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["a"], "must read NAME="), (["old:1"], "must read NAME="), (["a=old:1"], "at least two models"),
        (["a=old:1", "old:2"], "each once"), (["a=old:x", "new:1"], "must read NAME="),
        (["a=old:0", "new:1"], "must read NAME="), (["a=old:nan", "new:1"], "must read NAME="),
        (["a=old:1", "other:1"], "other, which is not served"), (["old=old:1", "new:1"], "the name of the model old"),
        (["a=old:1", "new:1", "a=old:1", "new:1"], "gives a twice"),
    ],
)  # fmt: skip
def test_a_split_that_cannot_be(items: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_splits(items, MODELS)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("old", "must read MODEL="), ("old=new", "must read MODEL="), ("old=new:2", "at most 1"),
        ("old=old:1", "one other model"), ("other=new:1", "other, which is not served"),
        ("old=new:-1", "must read MODEL="),
    ],
)  # fmt: skip
def test_a_shadow_that_cannot_be(item: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_shadows([item], MODELS)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("it did not come true in ten seconds")


async def scored(client: httpx.AsyncClient, count: int) -> str:
    """/metrics, once so many answers have been scored."""
    async with asyncio.timeout(10):
        while True:
            text = (await client.get("/metrics")).text
            if sum_metric(text, "quill:shadow_answers_total", outcome="scored") >= count:
                return text
            await asyncio.sleep(0.01)


async def test_a_shadow_scores_a_share_of_the_answers(engine: FakeEngine) -> None:
    app = make_pair(engine, shadow="old=new:0.5")
    async with client_for(app) as client:
        answers = []
        for _ in range(4):
            answer = await client.post("/generate", json={"prompt": "abcd", "max_tokens": 6})
            answers.append(answer.json()["choices"][0]["token_ids"])
        await client.post("/generate", json={"prompt": "abcd", "max_tokens": 6, "model": "new"})
        text = await scored(client, 2)
    told = [fake_prompt_logprob([*b"abcd", *answers[index]], place) for index in (1, 3) for place in range(1, 10)]
    prompts, written = [*told[:3], *told[9:12]], [*told[3:9], *told[12:18]]
    for part, expected in (("prompt", prompts), ("answer", written)):
        labels = {"model_name": "old", "candidate": "new", "part": part}
        assert sum_metric(text, "quill:shadow_tokens_total", **labels) == len(expected)
        for name in ("quill:shadow_nll_total", "quill:shadow_live_nll_total"):
            assert sum_metric(text, name, **labels) == pytest.approx(-sum(expected))
        assert sum_metric(text, "quill:shadow_nll_difference", **labels) == 0.0  # the fake's models are alike
    scoring = [stream for stream in engine.submitted if stream.prompt_logprobs is not None]
    assert [stream.model for stream in scoring] == [None, "new"] * 2


async def test_requests_come_before_shadows(engine: FakeEngine) -> None:
    """A shadow's work begins when nothing is in flight, and what it has begun is dropped for a request."""
    app = make_pair(engine, shadow="old=new:1")
    async with client_for(app) as client:
        await client.post("/generate", json={"prompt": "ab", "max_tokens": 2})
        engine.close_gate()
        await until(lambda: len(engine.submitted) == 2)
        begun = engine.submitted[1]
        request = asyncio.create_task(client.post("/generate", json={"prompt": "cd", "max_tokens": 2}))
        await until(lambda: begun.aborted)
        assert not request.done()
        assert [stream.prompt_logprobs for stream in engine.submitted] == [None, 0, None]
        engine.open_gate()
        assert (await request).status_code == 200
        text = await scored(client, 2)
    assert sum_metric(text, "quill:shadow_answers_total", outcome="dropped") == 0


async def test_a_text_is_cut_to_what_both_models_read(engine: FakeEngine) -> None:
    app = make_pair(engine, shadow="old=new:1")
    async with client_for(app) as client:
        await client.post("/generate", json={"prompt": "a" * 70, "max_tokens": 30})
        text = await scored(client, 1)
    assert sum_metric(text, "quill:shadow_tokens_total") == 64


def test_tokenizers_are_compared() -> None:
    assert same_tokens(Tokenizer.bytes(), Tokenizer.bytes())
    assert not same_tokens(Tokenizer.bytes(), Tokenizer.gpt2())
