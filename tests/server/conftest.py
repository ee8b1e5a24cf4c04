"""Fixtures: settings, an app over a fake engine, and a client that reaches it without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from model.tokenizer import Tokenizer
from server.app import create_app
from server.auth import ApiKeys
from server.settings import Settings
from tests.server.fake_engine import FakeEngine


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_settings(**values: Any) -> Settings:
    return Settings(model=[Path("models/tiny")], **values)


def make_app(engine: FakeEngine, keys: list[str] | None = None, **values: Any) -> FastAPI:
    return create_app(make_settings(**values), engine, ApiKeys(keys or []), Tokenizer.bytes())


def client_for(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", **options)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_for(make_app(engine)) as client:
        yield client
