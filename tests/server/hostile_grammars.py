"""Grammars that mean harm: to compile, to follow, to nest, to fill the memory. Values of POST /generate's `grammar`."""

from __future__ import annotations

from typing import Any


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _doubling(keyword: str, depth: int) -> dict[str, Any]:
    """Each part refers twice to the next one."""
    parts = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$defs": parts | {f"d{depth}": {"type": "string"}}, "$ref": "#/$defs/d0"}


_OVERLAPPING = [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(10, 30)]
_CHAIN = "start: r0\n" + "\n".join(f'r{i}: r{i + 1} r{i + 1} | "a"' for i in range(1000)) + '\nr1000: "b"'
_SCHEMAS: dict[str, Any] = {
    "nested": _nested(25), "too_nested": _nested(200), "wide": {"properties": {f"k{i}": {} for i in range(1500)}},
    "long_enum": {"enum": ["a" * i for i in range(300)]}, "all_of_doubles": _doubling("allOf", 24),
    "any_of_doubles": _doubling("anyOf", 24), "one_of_doubles": _doubling("oneOf", 24), "itself": {"$ref": "#"},
    "patterns_at_once": {"allOf": _OVERLAPPING}, "a_million_characters": {"type": "string", "minLength": 1_000_000},
    "a_million_items": {"type": "array", "minItems": 1_000_000}, "remote": {"$ref": "http://127.0.0.1:1/schema"},
    "digits": {"type": "integer", "maximum": 10**300}, "primes": {"type": "integer", "multipleOf": 999_999_937},
    "overlapping_keys": {"patternProperties": {f"^(a|b)*a(a|b){{{i}}}$": {} for i in range(20)}},
    "subsets": {"type": "object", "minProperties": 100_000}, "never": False, "no_schema": {"type": 7},
    "file": {"$ref": "file:///etc/passwd"}, "unsupported": {"uniqueItems": True, "not": {}},
}  # fmt: skip
_PATTERNS = {
    "states": "(a|b)*a(a|b){22}", "more_states": "(a|b)*a(a|b){2000}", "repeats": "((a{1,999}){1,999}){1,999}",
    "parentheses": "(" * 20_000 + ")" * 20_000, "optional": "a?" * 3000 + "a" * 3000, "dots": "(.*a){40}",
    "letters": r"(\p{L}{1,500}){1,500}", "stars": "(.*)*(.*)*x", "words": "|".join(f"w{i}" for i in range(8000)),
    "look": "a(?=b)", "back": r"(a)\1", "open": "(a", "long": "a" * 60_000,
    "too_long": "a" * 70_000, "nothing": "[^\\s\\S]",
}  # fmt: skip
_LARK = {
    "ambiguous": 'start: s\ns: s s s | s s | "a"', "left": 'start: start start start | "x" | "x" start',
    "chain": _CHAIN,
    "million": 'start: /a{1000000}/ "b"{1000000}', "empty": 'start: a*\na: b*\nb: c*\nc: ""', "undefined": "start: foo",
    "complement": "start: T\nT: /(.*a.{15}b.*)/ & /(.*b.{14}c.*)/ & ~/(.*c.{13}d.*)/",
    "no_start": 'a: "b"', "none": "",
}  # fmt: skip

HOSTILE = {
    **{f"json_schema-{name}": {"type": "json_schema", "value": value} for name, value in _SCHEMAS.items()},
    **{f"regex-{name}": {"type": "regex", "value": value} for name, value in _PATTERNS.items()},
    **{f"lark-{name}": {"type": "lark", "value": value} for name, value in _LARK.items()},
    "choice-many": {"type": "choice", "value": [f"choice {i}" for i in range(1024)]},
    "choice-too_many": {"type": "choice", "value": ["a"] * 1025},
    "choice-long": {"type": "choice", "value": ["a" * 60_000]},
}
