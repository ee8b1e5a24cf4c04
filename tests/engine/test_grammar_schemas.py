"""Random JSON schemas and patterns: a random model's texts satisfy them, by the judgement of `jsonschema` and `re`."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from model.grammar import Grammar
from server.engine.llm_engine import LLMEngine
from tests.engine.grammar_model import make_engine, make_model, request, run

PATTERNS = [
    r"[a-z]{2,6}", r"(yes|no)( (maybe|never)){0,2}", r"\d{4}-(0[1-9]|1[0-2])", r"[A-F0-9]{8}",
    r"#[0-9a-f]{6}", r"(a|b)*c{1,3}", r"[^\x00-\x1f\x7f-\U0010ffff\"]{1,12}", r"x?y+z{0,4}", r"(\(\w{1,3}\)){1,4}",
    r"-?(0|[1-9]\d{0,5})",
]  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    folder = make_model(tmp_path_factory.mktemp("schemas") / "model", max_seq_len=512)
    return make_engine(folder, max_num_seqs=32, max_num_batched_tokens=512)


class Schemas:
    """Random schemas of bounded size; each says how long a value's text may become, at least by intent."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def schema(self, depth: int = 3) -> dict[str, Any]:
        simple = [self._string, self._integer, self._number, self._enum, self._const, self._type]
        nested = [self._object, self._array, self._any_of, self._ref] if depth else []
        return self._random.choice(simple + 2 * nested)(depth)

    def _string(self, depth: int) -> dict[str, Any]:
        least = self._random.randrange(4)
        choices: list[dict[str, Any]] = [
            {"minLength": least, "maxLength": least + self._random.randrange(8)},
            {"pattern": f"^{self._random.choice(PATTERNS)}$"},
            {"format": self._random.choice(["uuid", "ipv4"])},
        ]
        return {"type": "string"} | self._random.choice(choices)

    def _integer(self, depth: int) -> dict[str, Any]:
        least = self._random.randrange(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + self._random.randrange(1, 5000)}

    def _number(self, depth: int) -> dict[str, Any]:
        return {"type": "number", "minimum": -50, "exclusiveMaximum": self._random.randrange(1, 500)}

    def _enum(self, depth: int) -> dict[str, Any]:
        values = ["red", "grün", 'a "quote"', 7, -1.5, True, None, [1, 2], {"k": "v"}, "line\nend", "\\", "日本"]
        return {"enum": self._random.sample(values, self._random.randrange(1, 5))}

    def _const(self, depth: int) -> dict[str, Any]:
        return {"const": self._random.choice(["x", 0, None, {"a": [1, {"b": False}]}])}

    def _type(self, depth: int) -> dict[str, Any]:
        return {"type": self._random.choice(["boolean", "null", ["boolean", "null"]])}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(["id", "name", "tags", "ünï", "a b", 'q"q', "size"], self._random.randrange(1, 4))
        required = [name for name in names if self._random.random() < 0.6]
        properties = {name: self.schema(depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._random.randrange(3)
        if self._random.random() < 0.3:
            items = [self.schema(depth - 1) for _ in range(2)]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": 2}
        most = least + self._random.randrange(3)
        return {"type": "array", "items": self.schema(depth - 1), "minItems": least, "maxItems": most}

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth - 1) for _ in range(self._random.randrange(1, 4))]}

    def _ref(self, depth: int) -> dict[str, Any]:
        """To a part of its own; a random model would rarely end one that holds itself."""
        inner = self.schema(0)
        return {"type": "object", "$defs": {"part": inner}, "properties": {"p": {"$ref": "#/$defs/part"}},
                "required": ["p"], "additionalProperties": False}  # fmt: skip


def lift_definitions(schema: Any, found: dict[str, Any]) -> Any:
    """References lead from the root: each inner `$defs` moves there, under a name of its own."""
    if isinstance(schema, list):
        return [lift_definitions(item, found) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$defs" in schema and "$ref" in schema.get("properties", {}).get("p", {}):
        name = f"part{len(found)}"
        found[name] = None
        found[name] = lift_definitions(schema["$defs"]["part"], found)
        rest = {key: value for key, value in schema.items() if key != "$defs"}
        return rest | {"properties": {"p": {"$ref": f"#/$defs/{name}"}}}
    return {key: lift_definitions(value, found) for key, value in schema.items()}


def random_schemas(count: int, seed: int) -> Iterator[dict[str, Any]]:
    source = Schemas(seed)
    for _ in range(count):
        found: dict[str, Any] = {}
        schema = lift_definitions(source.schema(), found)
        yield schema | ({"$defs": found} if found else {})


def test_five_hundred_random_schemas(engine: LLMEngine) -> None:
    schemas = list(random_schemas(500, seed=11))
    requests = [request(n, Grammar.json_schema(schema), max_tokens=400) for n, schema in enumerate(schemas)]
    answers = run(engine, requests)
    whole = 0
    for number, (text, reason, _) in answers.items():
        assert reason in ("stop", "length"), (schemas[number], text)
        if reason == "stop":
            whole += 1
            checker = jsonschema.Draft202012Validator(schemas[number], format_checker=jsonschema.FormatChecker())
            checker.validate(json.loads(text))
    assert len({json.dumps(schema) for schema in schemas}) > 350
    assert whole >= 490, "some may meet their token limit, not many"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(engine: LLMEngine, pattern: str) -> None:
    answers = run(engine, [request(number, Grammar.regex(pattern), max_tokens=200) for number in range(12)])
    texts = {text for text, reason, _ in answers.values() if reason == "stop"}
    assert all(re.fullmatch(pattern, text, re.ASCII) for text in texts), texts
    assert len(texts) >= 3
