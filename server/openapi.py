"""Bodies in /openapi.json, for routes that read them themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def request_body(*schemas: type[BaseModel], examples: dict[str, Any] | None = None) -> dict[str, Any]:
    """A route's `openapi_extra` for a required JSON body of one of these schemas."""
    shapes = [_inlined(schema) for schema in schemas]
    content: dict[str, Any] = {"schema": shapes[0] if len(shapes) == 1 else {"anyOf": shapes}}
    if examples is not None:
        content["examples"] = examples
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def _inlined(schema: type[BaseModel]) -> dict[str, Any]:
    """The schema in one piece: inside a larger document, references into its own `$defs` lead nowhere.

    No body of ours holds itself, so this ends.
    """
    document = schema.model_json_schema()
    definitions = document.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            name = value["$ref"].removeprefix("#/$defs/")
            return resolve({**definitions[name], **{key: rest for key, rest in value.items() if key != "$ref"}})
        return {key: resolve(item) for key, item in value.items()}

    inlined: dict[str, Any] = resolve(document)
    return inlined
