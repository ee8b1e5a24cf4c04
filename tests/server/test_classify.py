"""POST /classify over a scripted engine and over a real server, and what other routes say there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch

from model.classifier import Classifier, load_classifier, save_classifier
from model.classifier_config import ClassifierConfig
from model.presets import create_config
from model.tokenizer import Tokenizer
from server.app import create_app
from server.engine.messages import SequenceOutput
from server.errors import draining_error
from tests.server.conftest import client_for, make_app, make_settings
from tests.server.fake_engine import FakeEngine, FakeStream, Plan
from tests.server.hostile_bodies import CANARY
from tests.server.live import LiveServer, wait_until
from tests.server.real import PATIENCE, RealServer, running
from tests.server.test_ops import value

LABELS = ["ham", "spam"]
CONTEXT = 48


class FakeClassifier(FakeEngine):
    """The share of "!" among a text's bytes is its score for spam."""

    def __init__(self, **values: Any) -> None:
        super().__init__(lambda prompt, params: Plan([[]], "stop"), max_model_len=CONTEXT, **values)
        model = msgspec.structs.replace(
            self._info.models[0], task="classification", labels=LABELS, pad_token_id=256
        )  # fmt: skip
        self._info = msgspec.structs.replace(self._info, models=[model])

    def _output(self, stream: FakeStream, *rest: Any, **options: Any) -> SequenceOutput:
        spam = stream.prompt.count(ord("!")) / len(stream.prompt)
        return msgspec.structs.replace(super()._output(stream, *rest, **options), scores=[1.0 - spam, spam])


@pytest.fixture
def engine() -> FakeClassifier:
    return FakeClassifier()


@pytest.mark.anyio
async def test_texts_are_labelled_in_order(client: httpx.AsyncClient, engine: FakeClassifier) -> None:
    response = await client.post("/classify", json={"texts": ["hi !!!!!", "hello"], "model": "tiny"})
    assert response.status_code == 200
    assert response.json() == {
        "model": "tiny",
        "results": [
            {"label": "spam", "score": 0.625, "scores": {"ham": 0.375, "spam": 0.625}},
            {"label": "ham", "score": 1.0, "scores": {"ham": 1.0, "spam": 0.0}},
        ],
        "usage": {"prompt_tokens": 13, "completion_tokens": 0, "cached_tokens": 0},
    }
    assert [stream.prompt for stream in engine.submitted] == [list(b"hi !!!!!"), list(b"hello")]
    one = await client.post("/classify", json={"text": "hello"})
    assert one.json()["results"] == [response.json()["results"][1]]
    assert engine.live == set()


@pytest.mark.anyio
async def test_an_empty_text_is_its_start_token(client: httpx.AsyncClient, engine: FakeClassifier) -> None:
    assert (await client.post("/classify", json={"text": ""})).status_code == 200
    assert engine.submitted[0].prompt == [256]


@pytest.mark.anyio
async def test_texts_beyond_the_context_are_refused_or_cut(client: httpx.AsyncClient, engine: FakeClassifier) -> None:
    body = {"texts": ["short", "x" * (CONTEXT + 1)]}
    response = await client.post("/classify", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (422, "context_length_exceeded", "texts")
    assert f"{CONTEXT + 1} tokens" in error["message"]
    assert f"the {CONTEXT} that" in error["message"]
    assert engine.submitted == []
    assert (await client.post("/classify", json=body | {"truncate": True})).status_code == 200
    assert len(engine.submitted[1].prompt) == CONTEXT


_T = {"texts": [CANARY]}
HOSTILE: list[bytes] = [
    *(json.dumps(body).encode() for body in (
        {}, {"text": CANARY, "texts": [CANARY]}, {"text": None}, {"texts": []}, {"texts": ["a"] * 65},
        {"texts": [1]}, {"texts": [None]}, {"texts": [[CANARY]]}, {"text": 5}, {"text": [CANARY]}, {"text": True},
        _T | {"truncate": 1}, _T | {"truncate": "true"}, _T | {"truncate": None}, _T | {CANARY: 1}, _T | {"model": 5},
        _T | {"model": "x" * 201}, _T | {"max_tokens": 5}, _T | {"prompt": CANARY}, {"text": "a" * (CONTEXT + 1)},
        {"texts": {"0": CANARY}}, {"texts": CANARY}, _T | {"__proto__": {}},
    )),
    b"", b"null", b"[]", b"5", b'"a"', b"{", b"{'text': 'a'}", b'{"text": "a",}', b'{"text": "\xff"}', b"\x00",
    b'{"text": "\\ud800"}', b'{"texts": ["\\udfff"]}', b"[" * 100_000, b'{"texts": ' + b"[" * 5_000,
    b'{"text": ' + b"9" * 5_000 + b"}", '{"text": "a"}'.encode("utf-16"),
]  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("number", range(len(HOSTILE)))
async def test_hostile_bodies_are_refused(client: httpx.AsyncClient, engine: FakeClassifier, number: int) -> None:
    response = await client.post(
        "/classify", content=HOSTILE[number], headers={"content-type": "application/json"}
    )  # fmt: skip
    assert response.status_code == 422
    assert response.json()["error"]["code"] in (
        "invalid_request", "invalid_json", "unknown_field", "context_length_exceeded"
    )  # fmt: skip
    assert CANARY not in response.text
    assert engine.submitted == []


@pytest.mark.anyio
async def test_other_refusals(engine: FakeClassifier) -> None:
    async with client_for(make_app(engine, max_body_size=2_000)) as client:

        async def refused(**options: Any) -> tuple[int, str]:
            response = await client.post("/classify", **options)
            return response.status_code, response.json()["error"]["code"]

        assert await refused(json={"text": "a", "model": "other"}) == (404, "model_not_found")
        assert await refused(json={"texts": ["x" * 3_000]}) == (413, "body_too_large")
        assert await refused(content=b'{"text": "a"}', headers={"content-type": "text/plain"}) == (
            422, "invalid_request",
        )  # fmt: skip
        assert (await client.get("/classify")).status_code == 405
        engine.queue_limit = 1
        response = await client.post("/classify", json={"texts": ["a", "b"]})
        assert (response.status_code, response.headers["retry-after"]) == (429, "7")
        assert engine.submitted == []
        assert value((await client.get("/metrics")).text, "vllm:admission_rejections_total", model_name="tiny",
                     reason="queue_full") == 1.0  # fmt: skip
        engine.kill()
        assert await refused(json={"text": "a"}) == (503, "engine_down")
    async with client_for(create_app(make_settings(), FakeClassifier(state="loading"))) as client:
        assert (await client.post("/classify", json={"text": "a"})).json()["error"]["code"] == "loading"
    async with client_for(make_app(FakeClassifier(), max_queued_requests=1)) as client:
        response = await client.post("/classify", json={"texts": ["a"] * 10})  # 8 run, 1 waits
        assert (response.status_code, response.json()["error"]["param"]) == (422, "texts")


@pytest.mark.anyio
async def test_unknown_characters_are_refused(engine: FakeClassifier) -> None:
    app = create_app(make_settings(), engine, None, Tokenizer.characters("abc", end_of_text=False))
    async with client_for(app) as client:
        for text in (CANARY, "", "abé"):
            response = await client.post("/classify", json={"texts": [text]})
            assert (response.status_code, response.json()["error"]["param"]) == (422, "texts")
            assert CANARY not in response.text
        assert (await client.post("/classify", json={"texts": ["abc"]})).status_code == 200


@pytest.mark.anyio
async def test_each_task_has_its_routes(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={"prompt": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "task_not_served")
    assert "POST /classify" in response.json()["error"]["message"]
    model = (await client.get("/info")).json()["models"][0]
    assert (model["task"], model["labels"]) == ("classification", LABELS)
    for route in ("/health", "/ready", "/metrics", "/v1/models"):
        assert (await client.get(route)).status_code == 200
    async with client_for(make_app(FakeEngine())) as other:
        response = await other.post("/classify", json={"text": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "task_not_served")
        assert (await other.get("/info")).json()["models"][0]["task"] == "generation"


@pytest.mark.anyio
async def test_metrics_count_texts(client: httpx.AsyncClient, engine: FakeClassifier) -> None:
    await client.post("/classify", json={"texts": ["a", "bb"]})
    engine.script = lambda prompt, params: Plan([[], []], fail_after=0)
    failed = await client.post("/classify", json={"texts": ["a"]})
    assert (failed.status_code, failed.json()["error"]["code"]) == (503, "request_failed")
    engine.script = lambda prompt, params: Plan([[]], "error")
    assert (await client.post("/classify", json={"texts": ["a"]})).status_code == 503
    text = (await client.get("/metrics")).text
    assert value(text, "vllm:request_success_total", model_name="tiny", finished_reason="stop") == 2.0
    assert value(text, "vllm:request_success_total", model_name="tiny", finished_reason="error") == 2.0
    assert value(text, "vllm:request_prompt_tokens_sum", model_name="tiny") == 3.0
    assert value(text, "quill:http_requests_total", route="/classify", status="2xx") == 1.0
    assert engine.live == set()


@pytest.mark.anyio
async def test_a_drain_ends_what_waits(engine: FakeClassifier) -> None:
    engine.close_gate()
    app = make_app(engine)
    async with client_for(app) as client:
        waiting = asyncio.create_task(client.post("/classify", json={"texts": ["a", "b"]}))
        await asyncio.to_thread(wait_until, lambda: len(engine.live) == 2)
        lifecycle = app.state.services.lifecycle
        assert lifecycle.num_active == 1
        lifecycle.interrupt_all()
        response = await waiting
        assert response.status_code == draining_error().status
        assert response.json()["error"]["code"] == "draining"
        assert (engine.live, lifecycle.num_active) == (set(), 0)
        text = (await client.get("/metrics")).text
        assert value(text, "vllm:request_success_total", model_name="tiny", finished_reason="abort") == 2.0


def test_a_client_that_leaves_takes_its_texts_along() -> None:
    engine = FakeClassifier()
    with LiveServer(engine) as server:
        server.in_loop(engine.close_gate)
        body = json.dumps({"texts": ["a", "b", "c"]}).encode()
        with server.connect() as sock:
            sock.sendall(
                b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_until(lambda: len(engine.live) == 3)
        wait_until(lambda: not engine.live)
        assert all(stream.aborted for stream in engine.submitted)
        server.in_loop(engine.open_gate)
        assert httpx.post(f"{server.url}/classify", json={"text": "a"}).status_code == 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = create_config(
        "llama-tiny", vocab_size=257, hidden_size=32, num_heads=2, num_layers=2, max_seq_len=64, num_kv_heads=1
    )  # fmt: skip
    base = replace(base, tie_word_embeddings=True, bos_token_id=256, eos_token_id=256)
    classifier = Classifier(ClassifierConfig(base, tuple(LABELS), 256, CONTEXT))
    classifier.transformer.init_weights(5)
    classifier.init_score(5)
    with torch.no_grad():
        classifier.score.weight.mul_(60.0)
    out = tmp_path_factory.mktemp("classify") / "tiny-classifier"
    save_classifier(
        out, classifier.config, classifier.state_dict(), dtype=torch.float32, tokenizer=Tokenizer.bytes()
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RealServer]:
    with running(folder, "--num-threads", "1") as server:
        assert "/classify" in server.wait_ready()
        yield server
        server.terminate()
        assert server.wait() == 0


def test_a_real_server_gives_the_scores_of_the_checkpoint(server: RealServer, folder: Path) -> None:
    texts = ["see you at home", "WINNER!! claim now", "", "नमस्ते", "ok", *(f"text number {n}" for n in range(59))]
    answer = httpx.post(f"{server.url}/classify", json={"texts": texts}, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    ids = [list(text.encode()) or [256] for text in texts]
    expected = load_classifier(folder).probabilities(ids).tolist()
    results = answer.json()["results"]
    assert [[each["scores"][label] for label in LABELS] for each in results] == [
        pytest.approx(row, abs=1e-4) for row in expected
    ]
    assert {each["label"] for each in results} == set(LABELS)
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer.json()["model"] == folder.name


def test_a_real_server_says_what_it_is(server: RealServer) -> None:
    for route in ("/health", "/ready", "/v1/models"):
        assert httpx.get(f"{server.url}{route}", timeout=PATIENCE).status_code == 200
    info = httpx.get(f"{server.url}/info", timeout=PATIENCE).json()
    assert info["models"][0]["task"] == "classification"
    assert info["limits"]["max_model_len"] == CONTEXT
    assert server.metric("vllm:num_requests_waiting") == 0.0
    refused = httpx.post(f"{server.url}/generate", json={"prompt": "a"}, timeout=PATIENCE)
    assert refused.json()["error"]["code"] == "task_not_served"
