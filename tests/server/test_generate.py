"""POST /generate over the fake engine: one JSON answer, the stream, and how the two agree."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine, Plan, says

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
    assert answer["provenance"] == {"weights": "sha256:abc", "step": 5000, "run": "run-1"}


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
