"""The page without a browser: how its files are served, what its markup holds, and GET /stats."""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

import server
from server.page_files import page_files
from server.schemas.native import GenerateRequest
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
STATIC = Path(server.__file__).parent / "static"
KEY = "correct-horse-battery"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Ways in which text could become markup or code.
SINKS = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|setHTML"


def files() -> dict[str, Path]:
    return {"/" if path.name == "index.html" else f"/static/{path.name}": path for path in sorted(STATIC.iterdir())}


@pytest.mark.parametrize("path", files())
async def test_every_file_is_served_as_it_is(client: httpx.AsyncClient, path: str) -> None:
    body = files()[path].read_bytes()
    response = await client.get(path)
    assert response.content == body
    assert response.headers["content-type"].partition(";")[0] == TYPES[files()[path].suffix]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["etag"] == f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    head = await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(body))


async def test_a_copy_is_confirmed_and_not_sent_again(client: httpx.AsyncClient) -> None:
    tag = (await client.get("/")).headers["etag"]
    for value in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        response = await client.get("/", headers={"if-none-match": value})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", tag)
    assert (await client.get("/", headers={"if-none-match": '"other"'})).status_code == 200


async def test_the_policy_allows_the_pages_own_files_and_nothing_else(client: httpx.AsyncClient) -> None:
    policy = (await client.get("/")).headers["content-security-policy"]
    directives = dict(part.strip().partition(" ")[::2] for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert {name: directives[name] for name in ("script-src", "style-src", "connect-src")} == dict.fromkeys(
        ("script-src", "style-src", "connect-src"), "'self'"
    )
    assert directives["img-src"] == "'self' data:"
    for name in ("base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert directives[name] == "'none'"
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    "path", ["/static/", "/static", "/static/no-such.js", "/static/index.html", "/static/..%2fapp.py", "/static/%00",
             "/static/../app.py", "/static/static/app.js", "//static/app.js", "/index.html"]
)  # fmt: skip
async def test_nothing_else_is_served(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(f"http://localhost{path}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_the_page_can_be_read_without_a_key_and_the_api_cannot(engine: FakeEngine) -> None:
    async with client_for(make_app(engine, keys=[KEY])) as client:
        for path in page_files():
            for method in ("GET", "HEAD"):
                assert (await client.request(method, path)).status_code == 200, path
            for method in ("POST", "PUT", "DELETE"):
                assert (await client.request(method, path, json={})).status_code == 401, path
        for path in ("/stats", "/info", "/static/no-such.js", "/static/", "//static/app.js"):
            assert (await client.get(f"http://localhost{path}")).status_code == 401, path


async def test_stats(engine: FakeEngine) -> None:
    app = make_app(engine)
    engine.set_stats(num_running=3, num_waiting=2, num_blocks=100, num_free_blocks=75, num_preemptions=4,
                     prompt_tokens=40, generation_tokens=50, prefix_cache_queries=30, prefix_cache_hits=20)  # fmt: skip
    async with client_for(app) as client:
        assert (await client.get("/stats")).json() == {
            "state": "ready", "running": 3, "waiting": 2, "kv_blocks": 100, "kv_blocks_used": 25, "prompt_tokens": 40,
            "generation_tokens": 50, "prefix_cache_queries": 30, "prefix_cache_hits": 20, "preemptions": 4,
        }  # fmt: skip
        app.state.services.lifecycle.draining = True
        assert (await client.get("/stats")).json()["state"] == "draining"
        engine.kill()
        app.state.services.lifecycle.draining = False
        assert (await client.get("/stats")).json()["state"] == "engine_down"


class Markup(HTMLParser):
    """Start tags with their attributes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed((STATIC / "index.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def controls() -> dict[str, dict[str, str | None]]:
    """Attributes of the controls that become fields of a request, by field."""
    return {str(attributes["name"]): attributes for _, attributes in Markup().tags if "name" in attributes}


def test_the_form_has_every_field_of_generate() -> None:
    fields = {name for name, attributes in controls().items() if name == "seed" or "data-kind" in attributes}
    assert fields | {"prompt", "stream"} == set(GenerateRequest.model_fields)


def test_the_controls_have_the_bounds_of_the_fields() -> None:
    """Where the server says how far a number goes, so does its control (the model's own limits are set on arrival)."""
    schema = GenerateRequest.model_json_schema()["properties"]
    checked = 0
    for name, attributes in controls().items():
        if attributes.get("type") != "number":
            continue
        kinds = schema[name].get("anyOf", [schema[name]])
        kind = next(kind for kind in kinds if kind["type"] != "null")
        least, most = kind.get("minimum", kind.get("exclusiveMinimum")), kind.get("maximum")
        assert float(attributes["min"] or "nan") == least, name
        if "max" in attributes:
            assert float(attributes["max"] or "nan") == most, name
        assert attributes["step"] == ("1" if kind["type"] == "integer" else "any"), name
        checked += 1
    assert checked >= 12


def test_nothing_in_the_markup_is_inline_or_from_elsewhere() -> None:
    tags = Markup().tags
    for tag, attributes in tags:
        assert tag not in ("style", "base", "iframe", "object", "embed")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href"):
            assert not re.match(r"[a-z]+:|//", attributes.get(name) or ""), attributes
    scripts = [attributes for tag, attributes in tags if tag == "script"]
    assert scripts
    assert all(attributes["type"] == "module" and attributes["src"] for attributes in scripts)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.js")), ids=lambda path: path.name)
def test_modules_make_no_markup_of_text(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert re.findall(SINKS, source) == []
    assert re.findall(r"https?://", source) == []
    assert len(source.splitlines()) <= 250


def test_stylesheets_load_nothing() -> None:
    for path in STATIC.glob("*.css"):
        source = path.read_text(encoding="utf-8")
        assert re.findall(r"url\(|@import", source) == []
        assert len(source.splitlines()) <= 400
