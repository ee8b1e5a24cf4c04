"""POST /score: windows and refusals against an engine whose log-probabilities are known, figures against training's
`evaluate` over a real server."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from model.tokenizer import Tokenizer
from server import score_texts
from server.app import create_app
from server.engine.interface import QueueFullError
from tests.server.clients import ask_one
from tests.server.conftest import client_for, make_app, make_settings
from tests.server.fake_engine import FakeEngine, Plan, fake_prompt_logprob
from tests.server.hostile_bodies import CANARY
from tests.server.live import LiveServer, wait_until
from tests.server.real import PATIENCE, RealServer, running, save_random
from tests.server.test_ops import value
from training.evaluate import evaluate_checkpoint, evaluate_loss, open_checkpoint
from training.evaluation.text import TextTokens

CONTEXT = 16
TEXT = "The quill writes, and having writ — स्याही 🖋 — moves on; "


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(max_model_len=CONTEXT)


async def results(client: httpx.AsyncClient, *texts: str | list[int], **fields: Any) -> list[dict[str, Any]]:
    response = await client.post("/score", json={"texts": list(texts), **fields})
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["results"]
    return found


def expected_logprobs(ids: list[int], stride: int = CONTEXT) -> list[float | None]:
    """Told anew: token i is the first, in order, of the windows that reach it; each window is a prompt of its own."""
    found: list[float | None] = [None]
    for token in range(1, len(ids)):
        if token <= CONTEXT:
            start = 0
        else:
            round_end = min(CONTEXT + stride * math.ceil((token - CONTEXT) / stride), len(ids) - 1)
            start = token - 1 - (token - 1) % CONTEXT if stride == CONTEXT else round_end - CONTEXT
        found.append(fake_prompt_logprob(ids[start:], token - start))
    return found


@pytest.mark.anyio
async def test_a_text_within_the_context(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post("/score", json={"texts": ["naïve"], "return_tokens": True})
    answer = response.json()
    ids = list("naïve".encode())
    [result] = answer["results"]
    assert result["logprobs"] == expected_logprobs(ids)
    nll = -sum(each for each in result["logprobs"] if each is not None)
    assert (result["num_tokens"], result["num_predictions"]) == (6, 5)
    assert result["nll"] == pytest.approx(nll)
    assert result["loss"] == pytest.approx(nll / 5)
    assert result["perplexity"] == pytest.approx(math.exp(nll / 5))
    assert result["bits_per_byte"] == pytest.approx(nll / 5 / math.log(2))  # a token is a byte
    assert [token["id"] for token in result["tokens"]] == ids
    assert [token["text"] for token in result["tokens"]] == ["n", "a", "\ufffd", "\ufffd", "v", "e"]
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 0, "cached_tokens": 0}
    assert (answer["model"], answer["provenance"]["step"]) == ("tiny", 5000)
    assert answer["id"].startswith("score-")
    assert all(stream.params.max_tokens == 0 for stream in engine.submitted)
    assert (await results(client, "naïve"))[0]["tokens"] is None


@pytest.mark.anyio
@pytest.mark.parametrize("stride", [None, 1, 5, 15, 16])
async def test_windows_of_longer_texts(client: httpx.AsyncClient, engine: FakeEngine, stride: int | None) -> None:
    for length in (15, 16, 17, 18, 31, 32, 33, 34, 50, 100):
        ids = [(7 * position) % 256 for position in range(length)]
        [result] = await results(client, ids, stride=stride)
        assert result["logprobs"] == expected_logprobs(ids, stride or CONTEXT)
        assert result["num_predictions"] == length - 1
    assert all(len(stream.prompt) <= CONTEXT + 1 for stream in engine.submitted)


@pytest.mark.anyio
async def test_texts_and_ids_side_by_side(client: httpx.AsyncClient) -> None:
    texts: list[str | list[int]] = ["one", [116, 119, 111, 256], "", "x", [], "a longer text than the context holds"]
    found = await results(client, *texts)
    ids = [text if isinstance(text, list) else list(text.encode()) for text in texts]
    for result, each in zip(found, ids, strict=True):
        assert result["num_tokens"] == len(each)
        assert result["logprobs"] == (expected_logprobs(each) if each else [])
        nothing = len(each) < 2
        assert [result[name] is None for name in ("loss", "perplexity", "bits_per_byte")] == [nothing] * 3
        assert (result["nll"] == 0) == nothing
    # The end-of-text token is a prediction and no byte of the text.
    assert found[1]["bits_per_byte"] == pytest.approx(found[1]["loss"] * 4 / 3 / math.log(2))


@pytest.mark.anyio
async def test_figures_that_json_cannot_write_are_null(client: httpx.AsyncClient) -> None:
    [only_special] = await results(client, [256, 256])
    assert only_special["bits_per_byte"] is None
    assert only_special["loss"] > 0


@pytest.mark.anyio
@pytest.mark.parametrize(("context", "seats", "step", "at_once"), [(16, 8, 512, 2), (16, 64, 32, 4), (16, 3, 8, 1)])
async def test_few_windows_are_in_the_engine_at_once(context: int, seats: int, step: int, at_once: int) -> None:
    """A quarter of the seats, and what two steps compute."""
    engine = FakeEngine(max_model_len=context)
    assert engine.info is not None
    engine._info = msgspec.structs.replace(engine.info, max_num_seqs=seats, max_num_batched_tokens=step)
    most = 0
    submit = engine.submit

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        stream = submit(*args, **kwargs)
        most = max(most, len(engine.live))
        return stream

    engine.submit = count  # type: ignore[method-assign]
    async with client_for(make_app(engine)) as client:
        await results(client, "a" * 500, "b" * 300)
    assert most == at_once
    assert len(engine.submitted) == math.ceil(499 / CONTEXT) + math.ceil(299 / CONTEXT)
    assert engine.live == set()


@pytest.mark.anyio
async def test_a_later_window_waits_where_the_queue_is_full(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.scoring._PATIENCE", 0.01)
    submit, refusals = engine.submit, iter([False, False, True, True, False, True])

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if next(refusals, False):
            raise QueueFullError(7)
        return submit(*args, **kwargs)

    engine.submit = refuse  # type: ignore[method-assign]
    [result] = await results(client, "a" * 100)
    assert result["logprobs"] == expected_logprobs(list(b"a" * 100))
    assert next(refusals, None) is None


BAD_BODIES: list[tuple[dict[str, Any], str]] = [
    ({}, "texts"), ({"texts": []}, "texts"), ({"texts": CANARY}, "texts"), ({"texts": None}, "texts"),
    ({"texts": [None]}, "texts"), ({"texts": [5]}, "texts"), ({"texts": [["a"]]}, "texts"),
    ({"texts": [[1, -1]]}, "texts"), ({"texts": [[257]]}, "texts"), ({"texts": [[1.0]]}, "texts"),
    ({"texts": [[True]]}, "texts"), ({"texts": [[2**40]]}, "texts"), ({"texts": ["a"] * 257}, "texts"),
    ({"texts": ["a"], "stride": 0}, "stride"), ({"texts": ["a"], "stride": CONTEXT + 1}, "stride"),
    ({"texts": ["a"], "stride": 1.5}, "stride"), ({"texts": ["a"], "stride": "1"}, "stride"),
    ({"texts": ["a"], "stride": 2**70}, "stride"), ({"texts": ["a"], "return_tokens": 1}, "return_tokens"),
    ({"texts": ["a"], "return_tokens": None}, "return_tokens"), ({"texts": ["a"], "model": 5}, "model"),
]  # fmt: skip


@pytest.mark.anyio
async def test_wrong_bodies_are_refused_with_the_fields_name(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for body, param in BAD_BODIES:
        response = await client.post("/score", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (422, param), body
        assert param in response.json()["error"]["message"]
        assert CANARY not in response.text
    raw = [b"", b"[]", b"{", b'{"texts": ["\\ud800"]}', b'{"texts": ["\xff"]}', b"null", b'{"texts": [' + b"[" * 5000]
    for content in raw:
        response = await client.post("/score", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 422, content
    unknown = await client.post("/score", json={"texts": ["a"], CANARY: 1})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (422, "unknown_field")
    assert CANARY not in unknown.text
    other = await client.post("/score", json={"texts": ["a"], "model": CANARY})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    assert (await client.get("/score")).status_code == 405
    assert engine.submitted == []


@pytest.mark.anyio
async def test_work_without_bound_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_texts, "MAX_COMPUTED_TOKENS", 200)
    await results(client, "a" * 201)
    submitted = len(engine.submitted)
    for texts, stride in ((["a" * 202], None), (["a" * 120, "a" * 120], None), (["a" * 40], 1)):
        response = await client.post("/score", json={"texts": texts, "stride": stride})
        assert (response.status_code, response.json()["error"]["param"]) == (422, "texts")
        assert "200" in response.json()["error"]["message"]
    assert len(engine.submitted) == submitted


@pytest.mark.anyio
async def test_a_body_beyond_the_limit() -> None:
    async with client_for(make_app(FakeEngine(), max_body_size=1000)) as client:
        assert (await client.post("/score", json={"texts": ["a" * 1000]})).status_code == 413


@pytest.mark.anyio
async def test_unknown_characters_are_refused(engine: FakeEngine) -> None:
    app = create_app(make_settings(), engine, None, Tokenizer.characters("abc", end_of_text=False))
    async with client_for(app) as client:
        response = await client.post("/score", json={"texts": ["abc", CANARY]})
        assert (response.status_code, response.json()["error"]["param"]) == (422, "texts")
        assert CANARY not in response.text
        assert (await client.post("/score", json={"texts": ["abc"]})).status_code == 200


@pytest.mark.anyio
async def test_who_cannot_be_served(engine: FakeEngine) -> None:
    app = make_app(engine)
    async with client_for(app) as client:
        engine.queue_limit = 1
        busy = await client.post("/score", json={"texts": ["a" * 40]})
        assert (busy.status_code, busy.json()["error"]["code"]) == (429, "queue_full")
        assert busy.headers["retry-after"] == "7"
        engine.queue_limit = 64
        engine.kill()
        assert (await client.post("/score", json={"texts": ["ab"]})).json()["error"]["code"] == "engine_down"
    async with client_for(create_app(make_settings(), FakeEngine(state="loading"))) as client:
        assert (await client.post("/score", json={"texts": ["ab"]})).json()["error"]["code"] == "loading"


@pytest.mark.anyio
async def test_what_the_engine_gives_up_on(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for plan in (Plan([[], []], fail_after=1), Plan([[]], "error"), Plan([[]], "deadline"), Plan([[]], "abort")):
        engine.script = lambda prompt, params, plan=plan: plan
        response = await client.post("/score", json={"texts": ["a" * 100, "b" * 100]})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "request_failed")
        assert engine.live == set()
    text = (await client.get("/metrics")).text
    assert value(text, "vllm:request_success_total", model_name="tiny", finished_reason="error") > 0
    assert value(text, "vllm:request_success_total", model_name="tiny", finished_reason="length") == 0


@pytest.mark.anyio
async def test_a_drain_ends_what_runs_and_takes_nothing_new(engine: FakeEngine) -> None:
    engine.close_gate()
    app = make_app(engine)
    async with client_for(app) as client:
        waiting = asyncio.create_task(client.post("/score", json={"texts": ["a" * 100]}))
        await asyncio.to_thread(wait_until, lambda: len(engine.live) == 2)
        lifecycle = app.state.services.lifecycle
        assert lifecycle.num_active == 1
        lifecycle.interrupt_all()
        response = await waiting
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        assert (engine.live, lifecycle.num_active) == (set(), 0)
        lifecycle.draining = True
        refused = await client.post("/score", json={"texts": ["a"]})
        assert refused.json()["error"]["code"] == "draining"


def test_a_client_that_leaves_takes_its_windows_along() -> None:
    engine = FakeEngine(max_model_len=CONTEXT)
    with LiveServer(engine) as server:
        server.in_loop(engine.close_gate)
        body = json.dumps({"texts": ["a" * 200]}).encode()
        with server.connect() as sock:
            sock.sendall(
                b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_until(lambda: len(engine.live) == 2)
        wait_until(lambda: not engine.live)
        assert len(engine.submitted) == 2
        server.in_loop(engine.open_gate)
        assert httpx.post(f"{server.url}/score", json={"texts": ["ab"]}).status_code == 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("score") / "random")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RealServer]:
    with running(folder, "--num-threads", "1", "--max-num-batched-tokens", "96", "--max-num-seqs", "8") as server:
        server.wait_ready()
        yield server
        server.terminate()
        assert server.wait() == 0


def post(server: RealServer, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/score", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_text_file_has_the_figures_of_evaluate(server: RealServer, folder: Path, tmp_path: Path) -> None:
    """Shorter than the context of 512 tokens, as long, and several windows long."""
    for number, text in enumerate((TEXT, (TEXT * 20)[:400], TEXT * 30)):
        path = tmp_path / f"{number}.txt"
        path.write_text(text, encoding="utf-8")
        expected = evaluate_checkpoint(folder, text=path, device="cpu").values()
        [result] = post(server, texts=[text])["results"]
        for name in ("loss", "perplexity", "bits_per_byte"):
            assert result[name] == pytest.approx(expected[name], rel=1e-5), name
        assert result["num_predictions"] == expected["tokens"]


def test_windows_are_those_of_evaluate(server: RealServer, folder: Path) -> None:
    checkpoint = open_checkpoint(folder, device="cpu")
    ids = Tokenizer.bytes().encode(TEXT * 14)
    for length, stride in ((1100, 512), (1025, 100), (700, 300), (514, 1), (513, 7)):
        [result] = post(server, texts=[ids[:length]], stride=stride)["results"]
        tokens = TextTokens(np.array(ids[:length]), length)
        expected = evaluate_loss(checkpoint.model, tokens, seq_len=512, stride=stride, batch_size=4)
        assert result["loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert result["num_predictions"] == expected.tokens


def test_streams_beside_a_long_score_say_what_they_say_alone(server: RealServer) -> None:
    asked: dict[str, Any] = {"prompt": "The quill", "max_tokens": 120, "seed": 3, "ignore_eos": True}
    alone = ask_one(server.url, **asked)
    scores: list[dict[str, Any]] = []
    scoring = threading.Thread(target=lambda: scores.append(post(server, texts=[TEXT * 60], stride=200)))
    scoring.start()
    server.wait_used()
    beside = ask_one(server.url, **asked, stream=True)
    scoring.join(PATIENCE)
    assert beside.only.token_ids == alone.only.token_ids
    assert scores[0]["results"] == post(server, texts=[TEXT * 60], stride=200)["results"]
    server.wait_idle()


def test_a_score_given_up_frees_the_engine(server: RealServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/score", json={"texts": [TEXT * 200], "stride": 20}, timeout=httpx.Timeout(60, read=0.5)
        )
    server.wait_idle()
