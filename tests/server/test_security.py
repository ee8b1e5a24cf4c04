"""Keys, Host headers, CORS, request ids: what stands before every route."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import httpx
import pytest

from server.auth import load_api_keys
from server.settings import UsageError
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
KEY = "correct-horse-battery"


async def status(app_client: httpx.AsyncClient, host: str) -> int:
    return (await app_client.get("/health", headers={"host": host})).status_code


async def test_every_path_but_the_probes_needs_a_key(engine: FakeEngine) -> None:
    app = make_app(engine, keys=[KEY, "another-key"])
    paths = [path for path in app.openapi()["paths"] if path not in ("/health", "/ready")]
    assert "/metrics" in paths
    async with client_for(app) as client:
        for path in [*paths, "/", "/openapi.json", "/no-such", "/health/", "/Health", "//health"]:
            for method in ("POST", "OPTIONS") if path == "/" else ("GET", "POST", "OPTIONS"):
                assert (await client.request(method, f"http://localhost{path}")).status_code == 401, path
        assert (await client.get("/")).headers["content-type"].startswith("text/html")
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200
        for key in (KEY, "another-key"):
            response = await client.get("/info", headers={"authorization": f"bearer {key}"})
            assert response.status_code == 200
        for value in (KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer", "Bearer ", "Bearer \u00e9".encode()):
            assert (await client.get("/info", headers={"authorization": value})).status_code == 401


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# a comment\n\n {KEY} \nsecond-key\n")
    keys = load_api_keys(path)
    assert keys.required
    assert keys.number_of(f"Bearer {KEY}".encode())
    assert not keys.number_of(b"Bearer # a comment")
    assert not keys.number_of(None)
    assert not load_api_keys(None).required
    for content, words in (("", "no key"), ("# only\n", "no key"), ("short\n", "under 8")):
        path.write_text(content)
        with pytest.raises(UsageError, match=words):
            load_api_keys(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        load_api_keys(path)


async def test_foreign_hosts_are_refused(engine: FakeEngine) -> None:
    async with client_for(make_app(engine)) as client:
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:8000"):
            assert await status(client, host) == 200, host
        for host in ("evil.example", "localhost.evil.example", "10.0.0.5", "evil.example:8000", "", "localhost/x",
                     "localhost@evil.example", "[::1].evil.example", "127.0.0.1.evil.example", "evil"):  # fmt: skip
            assert await status(client, host) == 400, host
        response = await client.get("/health", headers={"host": "evil.example"})
        assert response.json()["error"]["code"] == "host_not_allowed"
        assert "evil" not in response.text


async def test_allowed_hosts(engine: FakeEngine) -> None:
    async with client_for(make_app(engine, allowed_hosts=["llm.example", "*.inner.example"])) as client:
        for host in ("llm.example", "a.inner.example:80", "localhost"):
            assert await status(client, host) == 200, host
        for host in ("x.llm.example", "inner.example.evil", "ainner.example"):
            assert await status(client, host) == 400, host
    async with client_for(make_app(engine, allowed_hosts=["*"])) as client:
        assert await status(client, "evil.example") == 200


async def test_a_wildcard_bind_answers_for_addresses_and_plain_names(engine: FakeEngine) -> None:
    async with client_for(make_app(engine, host="0.0.0.0")) as client:
        for host in ("10.1.2.3:8000", "server", "server:8000", "[fd00::1]", socket.gethostname()):
            assert await status(client, host) == 200, host
        for host in ("evil.example", "10.1.2.3.evil.example", ""):
            assert await status(client, host) == 400, host


@pytest.mark.parametrize("bind", ["2001:db8::1", "[2001:db8::1]"])
async def test_a_server_answers_for_the_ipv6_address_it_is_bound_to(engine: FakeEngine, bind: str) -> None:
    async with client_for(make_app(engine, host=bind)) as client:
        assert await status(client, "[2001:db8::1]:8000") == 200
        assert await status(client, "[2001:db8::2]:8000") == 400


async def test_cors_is_off_unless_asked_for(engine: FakeEngine) -> None:
    origin = "https://page.example"
    preflight = {"origin": origin, "access-control-request-method": "POST"}
    async with client_for(make_app(engine)) as client:
        assert "access-control-allow-origin" not in (await client.get("/health", headers={"origin": origin})).headers
        assert (await client.options("/generate", headers=preflight)).status_code == 405
    async with client_for(make_app(engine, keys=[KEY], cors_origins=[origin])) as client:
        assert (await client.options("/generate", headers=preflight)).headers["access-control-allow-origin"] == origin
        foreign = preflight | {"origin": "https://evil.example"}
        assert "access-control-allow-origin" not in (await client.options("/generate", headers=foreign)).headers


async def test_request_ids(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="server.access")
    async with client_for(make_app(engine)) as client:
        drawn = (await client.post("/generate", json={"prompt": "secret words"})).headers["x-request-id"]
        assert drawn.startswith("req-")
        again = await client.post("/generate", json={"prompt": "a"}, headers={"x-request-id": "mine-1"})
        assert again.headers["x-request-id"] == "mine-1"
        assert "mine-1" not in again.text
        for value in ("x" * 65, "a b", "\u00e9".encode(), "", "a\tb"):
            response = await client.get("/health", headers={"x-request-id": value})
            assert response.headers["x-request-id"].startswith("req-")
    assert [getattr(record, "client_request_id", None) for record in caplog.records] == [None, "mine-1"]
    assert "secret words" not in caplog.text


async def test_the_same_client_id_twice_is_two_requests(engine: FakeEngine) -> None:
    headers = {"x-request-id": "same"}
    async with client_for(make_app(engine)) as client:
        answers = [(await client.post("/generate", json={"prompt": p}, headers=headers)).json() for p in ("a", "b")]
    assert answers[0]["id"] != answers[1]["id"]
    assert answers[0]["choices"][0]["text"] != answers[1]["choices"][0]["text"]
