"""docs/api.md holds the whole contract: every route, every field with its rule and default, and tests that exist."""

from __future__ import annotations

import ast
import functools
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel

from server.app import ROUTERS
from server.schemas.classify import ClassifyRequest
from server.schemas.explain import ExplainRequest
from server.schemas.native import GenerateRequest, GrammarFields
from server.schemas.openai import ChatCompletionRequest, CompletionRequest, Message, StreamOptions
from server.schemas.score import ScoreRequest
from server.schemas.tgi import TgiParameters, TgiRequest
from server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine, says

FOLDER = Path(__file__).parent
PAGE = (FOLDER.parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
# In the order in which the page has them under its headings.
TABLES: dict[str, list[type[BaseModel]]] = {
    "POST /generate": [GenerateRequest, GrammarFields],
    "POST /v1/completions": [CompletionRequest],
    "POST /v1/chat/completions": [ChatCompletionRequest, Message, StreamOptions],
    "POST /score": [ScoreRequest],
    "POST /explain": [ExplainRequest],
    "POST /tokenize": [TokenizeRequest],
    "POST /detokenize": [DetokenizeRequest],
    "POST /classify": [ClassifyRequest],
    "Text Generation Inference's bodies": [TgiRequest, TgiParameters],
}
SCHEMAS = [(heading, index, schema) for heading, schemas in TABLES.items() for index, schema in enumerate(schemas)]


def section(heading: str) -> str:
    match = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert match is not None, heading
    return match[1]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table's rows, without its head."""
    found = []
    for match in re.finditer(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in match[0].splitlines()[2:]]
        found.append([[cell.strip().replace("\\|", "|") for cell in row] for row in rows])
    return found


@functools.cache
def functions(module: str) -> dict[str, str]:
    """The source of each test in a file of this folder, with its decorators and the file's own tables."""
    source = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
    body = ast.parse(source).body
    shared = "\n".join(ast.unparse(node) for node in body if isinstance(node, ast.Assign | ast.AnnAssign))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name: ast.unparse(node) + shared for node in body if isinstance(node, kinds)}


def default_of(schema: type[BaseModel], name: str) -> str:
    field = schema.model_fields[name]
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    value: Any = default.model_dump() if isinstance(default, BaseModel) else default
    return f"`{json.dumps(value, ensure_ascii=False)}`"


@pytest.mark.parametrize(("heading", "index", "schema"), SCHEMAS, ids=lambda value: getattr(value, "__name__", None))
def test_a_table_has_every_field_with_its_rule_and_default(heading: str, index: int, schema: type[BaseModel]) -> None:
    rows = tables(section(heading))[index]
    stated = {row[0].strip("`"): (row[1], row[2]) for row in rows}
    assert stated == {
        name: (field.description or "", default_of(schema, name)) for name, field in schema.model_fields.items()
    }


@pytest.mark.parametrize(("heading", "index", "schema"), SCHEMAS, ids=lambda value: getattr(value, "__name__", None))
def test_a_fields_tests_speak_of_the_field(heading: str, index: int, schema: type[BaseModel]) -> None:
    for row in tables(section(heading))[index]:
        name, cited = row[0].strip("`"), re.findall(r"`(\w+)\.(\w+)`", row[3])
        assert cited, name
        for module, function in cited:
            assert re.search(rf"\b{name}\b", functions(module)[function]), (name, function)


def test_every_test_that_is_named_exists() -> None:
    cited = re.findall(r"`(test_\w+)\.(test_\w+)`", PAGE)
    assert len(cited) > 100
    assert [f"{module}.{name}" for module, name in cited if name not in functions(module)] == []


def test_every_route_is_in_the_table() -> None:
    stated = {(method, path) for row in tables(section("Routes"))[0] for method, path in [row[0].strip("`").split()]}
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    served = {(method, route.path.replace(":path", "")) for route in routes for method in route.methods - {"HEAD"}}
    unlisted = {("GET", "/static/{name}")}  # the page's own files
    assert stated == (served - unlisted) | {("GET", "/openapi.json")}


@pytest.mark.anyio
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
async def test_a_deadline_on_openais_routes(route: str, engine: FakeEngine) -> None:
    engine.script = says("abc")
    async with client_for(make_app(engine)) as client:
        refused = await client.post(route, json=body_for(route, deadline_ms=0))
        start = time.monotonic()
        answer: httpx.Response = await client.post("/v1/completions", json=body_for("", deadline_ms=60_000))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "deadline_ms")
    assert answer.status_code == 200
    deadline = engine.submitted[-1].deadline
    assert deadline is not None
    assert start + 59 < deadline < start + 61


def body_for(route: str, **fields: object) -> dict[str, object]:
    prompt = {"messages": [{"role": "user", "content": "a"}]} if "chat" in route else {"prompt": "a"}
    return {**prompt, **fields}
