"""/openapi.json: it is whole, and its schemas take what the routes take."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema
import pytest

pytestmark = pytest.mark.anyio


async def test_every_reference_leads_somewhere(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    references = set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)))
    for reference in references:
        value: Any = document
        for step in reference.split("/"):
            assert step in value, reference
            value = value[step]


@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        ("/", {"inputs": "a", "parameters": {"top_k": 3, "stop": ["x"]}}, {"inputs": "a", "parameters": {"top_k": 0}}),
        ("/generate_stream", {"inputs": "a", "parameters": None}, {"inputs": "a", "parameters": {"x": 1}}),
        ("/tokenize", {"text": "a"}, {"words": "a"}),
        ("/tokenize", {"inputs": "a"}, {"inputs": 5}),
        ("/detokenize", {"tokens": [1]}, {"tokens": [-1]}),
        ("/v1/completions", {"prompt": [[1, 2]], "stream_options": {"include_usage": True}}, {"prompt": {}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, {"messages": "a"}),
    ],
)
async def test_schemas_tell_good_bodies_from_bad(
    client: httpx.AsyncClient, path: str, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    document = (await client.get("/openapi.json")).json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.validate(good, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, schema)
