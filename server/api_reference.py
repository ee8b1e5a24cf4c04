"""/docs: /openapi.json as a page to read, with examples to paste. It is whole without a network and without scripts."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ORDER = ("get", "post")


@dataclass(frozen=True, slots=True)
class FieldRow:
    """One field of a body. `rule` is what its value must be, in the schema's own words."""

    name: str
    rule: str
    default: str
    required: bool


@dataclass(frozen=True, slots=True)
class Example:
    title: str
    command: str


@dataclass(frozen=True, slots=True)
class Operation:
    """A route with a method. `bodies` are the fields of each shape that its body may have."""

    anchor: str
    method: str
    path: str
    summary: str
    description: str
    bodies: list[list[FieldRow]]
    examples: list[Example]


def operations(document: dict[str, Any], base_url: str) -> list[Operation]:
    """What an OpenAPI document describes, in its order; examples are commands for a server at `base_url`."""
    return [
        _operation(method, path, item[method], base_url)
        for path, item in document["paths"].items()
        for method in _ORDER
        if method in item
    ]


def _operation(method: str, path: str, operation: dict[str, Any], base_url: str) -> Operation:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = content.get("schema", {})
    examples = content.get("examples", {})
    return Operation(
        anchor=f"{method}{path.replace('/', '-').replace('{', '').replace('}', '')}",
        method=method.upper(),
        path=path,
        summary=operation.get("summary", ""),
        description=operation.get("description", ""),
        bodies=[_fields(shape) for shape in schema.get("anyOf", [schema]) if "properties" in shape],
        examples=[
            Example(name, _command(base_url + path, example["value"])) for name, example in examples.items()
        ] or ([] if content else [Example("", f"curl {base_url}{path}")]),
    )  # fmt: skip


def _fields(schema: dict[str, Any]) -> list[FieldRow]:
    required = schema.get("required", [])
    return [
        FieldRow(
            name=name,
            rule=field.get("description", ""),
            default=json.dumps(field["default"], ensure_ascii=False) if "default" in field else "",
            required=name in required,
        )
        for name, field in schema["properties"].items()
    ]


def _command(url: str, body: object) -> str:
    """A line for a shell. The body stands in single quotes, where only a single quote itself needs an escape."""
    text = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    streams = " -N" if isinstance(body, dict) and body.get("stream") else ""
    return f"curl{streams} {url} -H 'Content-Type: application/json' -d '{text}'"


def render_reference(document: dict[str, Any], base_url: str) -> str:
    return str(_template().render(operations=operations(document, base_url), info=document["info"]))


@functools.cache
def _template() -> Any:
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "docs.html"
    )
