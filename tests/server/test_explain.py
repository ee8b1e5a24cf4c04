"""POST /explain and GET /requests/{id} over HTTP: refusals with a scripted engine, the rest with a real one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine, says
from tests.server.live import wait_until
from tests.server.real import PATIENCE, RealServer, running, save_random

KEYS = ["first-key-0123", "second-key-4567"]
SAMPLED = {
    "prompt": "To be", "max_tokens": 24, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "seed": 4,
    "repetition_penalty": 1.2, "logit_bias": {"32": 1.5}, "min_tokens": 24,
}  # fmt: skip
CLIENT = httpx.Client(timeout=PATIENCE, limits=httpx.Limits(max_connections=None))
FILTERS = ["logit_bias", "penalties", "min_tokens", "temperature", "top_k", "top_p", "min_p"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"stream": True}, "stream"),
        ({"echo": True}, "echo"),
        ({"count": 65}, "count"),
        ({"count": 0}, "count"),
        ({"start": -1}, "start"),
        ({"tokens": []}, "tokens"),
        ({"tokens": [1, -1]}, "tokens"),
        ({"tokens": [1, 257]}, "tokens"),
        ({"tokens": [1], "start": 1}, "start"),
        ({"tokens": [1] * 300}, "tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"grammar": {"type": "regex", "value": "a"}}, "grammar"),
        ({"tokens": "ab"}, "tokens"),
    ],
)
async def test_refusals(change: dict[str, Any], param: str) -> None:
    async with client_for(make_app(FakeEngine())) as client:
        answer = await client.post("/explain", json={"prompt": "a", **change})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param


@pytest.mark.anyio
async def test_a_full_queue_and_an_engine_that_tells_nothing() -> None:
    full, silent = FakeEngine(queue_limit=0), FakeEngine(says(""))
    async with client_for(make_app(full)) as client:
        for body in ({"prompt": "a"}, {"prompt": "a", "tokens": [1]}):
            answer = await client.post("/explain", json=body)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
    async with client_for(make_app(silent)) as client:
        answer = await client.post("/explain", json={"prompt": "a", "tokens": [1, 2]})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "request_failed"
        assert not silent.live


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder = tmp_path_factory.mktemp("explain")
    keys = folder / "keys"
    keys.write_text("\n".join(KEYS))
    options = ("--max-num-seqs", "2", "--request-history", "300", "--api-key-file", str(keys), "--num-threads", "1")
    with running(save_random(folder / "model"), *options, "--max-queued-requests", "40") as server:
        server.wait_ready()
        with CLIENT:
            yield server


def ask(server: RealServer, path: str, body: dict[str, Any] | None = None, key: int = 0) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEYS[key]}"}
    method = "GET" if body is None else "POST"
    return CLIENT.request(method, server.url + path, json=body, headers=headers)


def good(server: RealServer, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    answer = ask(server, path, body)
    assert answer.status_code == 200, answer.text
    decoded: dict[str, Any] = answer.json()
    return decoded


def test_what_is_generated_is_explained(server: RealServer) -> None:
    [choice] = good(server, "/generate", SAMPLED)["choices"]
    told = good(server, "/explain", SAMPLED)
    assert told["token_ids"] == choice["token_ids"]
    assert told["finish_reason"] == "length"
    assert [each["id"] for each in told["tokens"]] == choice["token_ids"]
    assert [each["index"] for each in told["tokens"]] == list(range(24))
    for each in told["tokens"]:
        assert each["drawn"]["id"] == each["id"]
        assert [effect["name"] for effect in each["filters"]] == FILTERS
        cut = {token_id: effect["name"] for effect in each["filters"] for token_id in effect["cut"]}
        assert all(one["cut_by"] == cut.get(one["id"]) for one in each["top"])
        assert all((one["final_probability"] == 0) == (one["cut_by"] is not None) for one in each["top"])
        assert sum(one["final_probability"] for one in each["top"]) <= 1 + 1e-5


def test_given_tokens_are_explained_from_anywhere(server: RealServer) -> None:
    whole = good(server, "/explain", {**SAMPLED, "logprobs": 2})
    body = {**SAMPLED, "logprobs": 2, "tokens": whole["token_ids"], "start": 11, "count": 9}
    part = good(server, "/explain", body)
    assert part["tokens"] == whole["tokens"][11:20]
    assert (part["finish_reason"], part["usage"]["completion_tokens"]) == (None, 0)
    unseeded = good(server, "/explain", {**body, "seed": None, "count": 1})
    assert unseeded["seed"] is None
    assert unseeded["tokens"][0]["drawn"] is None


def test_only_so_many_are_explained(server: RealServer) -> None:
    """The first tokens of an answer do not depend on how long it was to become."""
    body = {**SAMPLED, "max_tokens": 200, "min_tokens": 150}
    [choice] = good(server, "/generate", body)["choices"]
    told = good(server, "/explain", body)
    assert told["token_ids"] == choice["token_ids"][:64]
    assert (len(told["tokens"]), told["finish_reason"]) == (64, None)
    assert all(each["drawn"]["id"] == each["id"] for each in told["tokens"])


def test_a_replay_gives_the_same_tokens(server: RealServer) -> None:
    """Of what ran beside others and of what a stop string ended; with what it met."""
    bodies = [
        {**SAMPLED, "n": 2, "seed": None},
        {**SAMPLED, "stop": [good(server, "/generate", SAMPLED)["choices"][0]["text"][9:11]], "min_tokens": 0},
        {"prompt": "abcabcabcabcabcabc", "max_tokens": 40, "temperature": 0},
    ]
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda body: good(server, "/generate", body), bodies))
    for body, answer in zip(bodies, made, strict=True):
        told = good(server, f"/requests/{answer['id']}")
        again = good(server, "/generate", told["replay"])
        assert [each["token_ids"] for each in again["choices"]] == [each["token_ids"] for each in answer["choices"]]
        for choice, record in zip(answer["choices"], told["choices"], strict=True):
            assert record["finish_reason"] == choice["finish_reason"]
            sizes, timings = record["batch_size"], record["timings"]
            assert 1 <= sizes["min"] <= sizes["mean"] <= sizes["max"] <= 2
            assert 0 <= timings["started"] <= timings["first_token"] <= timings["finished"]
            # The engine runs ahead of a stop string, which is found outside it, until it is told.
            most = body["max_tokens"] if "stop" in body else len(choice["token_ids"])
            assert 1 <= record["steps"] <= most + 2
            assert record["accepted_tokens"] <= record["drafted_tokens"]
        assert told["usage"] == answer["usage"], body


def test_a_flood_of_one_key_does_not_hold_up_another(server: RealServer) -> None:
    """Sixty requests of the first key: some are refused, with a time to come back; the second key's one is taken, and
    done before most of what came before it."""
    body = {"prompt": "x", "max_tokens": 150, "ignore_eos": True}
    with ThreadPoolExecutor(60) as pool:
        answers = [pool.submit(ask, server, "/generate", {**body, "seed": number}) for number in range(60)]
        wait_until(lambda: ask(server, "/stats", key=1).json()["waiting"] >= 20, 5)
        mine = ask(server, "/generate", body, key=1)
        num_before = len([each for each in answers if each.done() and each.result().status_code == 200])
    statuses = [each.result().status_code for each in answers]
    assert mine.status_code == 200
    assert set(statuses) == {200, 429}
    assert num_before <= statuses.count(200) / 2
    for each in answers:
        if each.result().status_code == 429:
            assert int(each.result().headers["retry-after"]) >= 1
