"""Requests to OpenAI's routes over the fake engine, and what every answer to them must be."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from model.chat_template import ChatTemplate
from tests.server.clients import read_events
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine

TEMPLATE = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [{"role": "user", "content": "hi"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ROUTES = pytest.mark.parametrize("route", [COMPLETIONS, CHAT])


def chat_app(engine: FakeEngine, **values: Any) -> FastAPI:
    app = make_app(engine, **values)
    app.state.services.chat_template = TEMPLATE
    return app


def body_for(route: str, **fields: Any) -> dict[str, Any]:
    return ({"prompt": "hi"} if route == COMPLETIONS else {"messages": HELLO}) | fields


async def post(engine: FakeEngine, route: str, **fields: Any) -> httpx.Response:
    async with client_for(chat_app(engine)) as client:
        return await client.post(route, json=body_for(route, **fields))


async def ask(engine: FakeEngine, route: str, **fields: Any) -> dict[str, Any]:
    response = await post(engine, route, **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(engine: FakeEngine, route: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream that ends as it should; every one of them is unnamed."""
    response = await post(engine, route, stream=True, **fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = list(read_events(response.text))
    assert {name for name, _ in events} == {"message"}
    assert events[-1][1] == "[DONE]"
    return [json.loads(data) for _, data in events[:-1]]


def check_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """OpenAI's error shape, with nothing more in it; returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert len(response.content) <= 4096
    assert response.headers["x-request-id"].startswith("req-")
    return str(error["message"])
