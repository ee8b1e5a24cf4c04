"""/docs: every route, with examples that the server answers when they are pasted; nothing comes from elsewhere."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from typing import Any

import httpx
import jsonschema
import pytest

from server.api_reference import operations
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine, says

pytestmark = pytest.mark.anyio


class Page(HTMLParser):
    """Its text, the headings' ids, and the addresses that it loads or leads to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [value for name in ("href", "src") if (value := values.get(name)) is not None]
        self.ids += [values["id"]] if values.get("id") else []

    def handle_data(self, data: str) -> None:
        self.words.append(data)


async def test_every_route_and_field_is_on_the_page(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    answer = await client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = Page(answer.text)
    for path, item in document["paths"].items():
        for method in item:
            assert f"{method.upper()} {path}" in page.words
    described = operations(document, "http://x")
    fields = {field.name: field.rule for operation in described for body in operation.bodies for field in body}
    assert {"prompt", "messages", "inputs", "texts", "tokens"} <= fields.keys()
    assert fields.keys() | {rule for rule in fields.values() if rule} <= set(page.words)


async def test_it_loads_nothing_from_elsewhere_and_its_links_lead_somewhere(client: httpx.AsyncClient) -> None:
    answer = await client.get("/docs")
    page = Page(answer.text)
    assert "script" not in page.tags
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for address in page.addresses:
        if address.startswith("#"):
            assert address[1:] in page.ids
        else:
            assert (await client.get(f"/{address.removeprefix('.')}")).status_code == 200, address
    assert len(page.ids) == len(set(page.ids))


def posts(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    content = {path: item["post"]["requestBody"] for path, item in document["paths"].items() if "post" in item}
    return {path: body["content"]["application/json"] for path, body in content.items()}


async def test_every_body_has_examples_that_its_schema_takes(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    for path, content in posts(document).items():
        assert content.get("examples"), path
        for example in content["examples"].values():
            jsonschema.validate(example["value"], content["schema"])


async def test_commands_can_be_pasted(engine: FakeEngine) -> None:
    engine.script = says("answer")
    async with client_for(make_app(engine)) as client:
        document = (await client.get("/openapi.json")).json()
        shown = Page((await client.get("/docs")).text).words
        seen = 0
        for operation in operations(document, "http://localhost"):
            for example in operation.examples:
                assert example.command in shown
                words = shlex.split(example.command)
                url = next(word for word in words if word.startswith("http"))
                if "{" in url or operation.path in ("/classify", "/v1/chat/completions", "/explain"):
                    continue  # they need another model, or a name
                if "-d" in words:
                    body = json.loads(words[words.index("-d") + 1])
                    answer = await client.post(url, json=body)
                    assert ("-N" in words) == bool(body.get("stream")) or operation.path == "/generate_stream"
                else:
                    answer = await client.get(url)
                assert answer.status_code == 200, (example.command, answer.text)
                seen += 1
    assert seen > 15


async def test_a_server_with_keys_shows_it_and_still_guards_the_rest(engine: FakeEngine) -> None:
    async with client_for(make_app(engine, ["key"])) as client:
        assert (await client.get("/docs")).status_code == 200
        assert (await client.head("/docs")).status_code == 200
        assert (await client.post("/docs")).status_code == 401
        assert (await client.get("/docs/")).status_code == 401
        assert (await client.get("/openapi.json")).status_code == 401


async def test_the_address_of_the_client_is_in_the_commands(engine: FakeEngine) -> None:
    app = make_app(engine, allowed_hosts=["models.example"])
    async with client_for(app) as client:
        text = (await client.get("/docs", headers={"host": "models.example:8443"})).text
        assert "curl http://models.example:8443/info" in Page(text).words
        assert (await client.get("/docs", headers={"host": "evil.example"})).status_code == 400


def test_text_of_a_schema_cannot_become_markup_or_shell() -> None:
    from server.api_reference import render_reference

    hostile = "<script>alert(1)</script>'; rm -rf / #"
    schema = {"properties": {hostile: {"description": hostile, "default": hostile}}}
    content = {"schema": schema, "examples": {hostile: {"value": {"prompt": hostile}}}}
    operation = {"summary": hostile, "requestBody": {"content": {"application/json": content}}}
    document = {"info": {"version": "1"}, "paths": {"/x": {"post": operation}}}
    page = Page(render_reference(document, "http://x"))
    assert "script" not in page.tags
    [command] = [word for word in page.words if word.startswith("curl")]
    words = shlex.split(command)
    assert json.loads(words[-1]) == {"prompt": hostile}
    assert re.fullmatch(r"curl http://x/x -H .*", command)
