"""What the tests of TGI's routes share: a request to an app of its own, and the events of a stream."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine, Script


async def post(
    script: Script, body: dict[str, Any], path: str = "/generate", **engine_options: Any
) -> tuple[httpx.Response, FakeEngine]:
    engine = FakeEngine(script, **engine_options)
    async with client_for(make_app(engine)) as client:
        response = await client.post(path, json=body)
    assert not engine.live
    return response, engine


def events(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block]
    return [json.loads(block.removeprefix("data: ")) for block in blocks]
