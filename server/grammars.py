"""From what a body says of a text's language to a Grammar. Each route names its fields; none of them is repeated."""

from __future__ import annotations

from typing import Any

from model.errors import InvalidSamplingParamsError
from model.grammar import GRAMMAR_TYPES, Grammar
from server.errors import InvalidRequestError
from server.schemas.native import GrammarFields
from server.schemas.openai import OpenAIFields

_STRINGS = ("regex", "lark")


def make_grammar(field: str, kind: str, value: Any) -> Grammar:
    """Raises InvalidRequestError, naming `field`, for a value that is not what the kind of grammar needs."""
    try:
        if kind in _STRINGS:
            _require(field, isinstance(value, str), f"must be a string for a {kind} grammar")
            return Grammar.regex(value) if kind == "regex" else Grammar.lark(value)
        if kind == "choice":
            is_list = isinstance(value, list) and all(isinstance(text, str) for text in value)
            _require(field, is_list, "must be a list of strings for a choice")
            return Grammar.choice(value)
        _require(field, isinstance(value, dict | bool | str), "must be an object that holds a JSON schema")
        return Grammar.json_schema(value)
    except InvalidSamplingParamsError as error:
        rule = str(error).removeprefix(f"{error.param} ")
        raise _invalid(field, rule) from None


def native_grammar(grammar: GrammarFields | None) -> Grammar | None:
    """`grammar` of POST /generate, {"type": …, "value": …}, or None. Raises InvalidRequestError."""
    if grammar is None:
        return None
    return make_grammar("grammar.value", grammar.type, grammar.value)


def tgi_grammar(grammar: dict[str, Any] | None) -> Grammar | None:
    """TGI's: `json` has a schema or its text, `json_schema` an object with a schema in it, `regex` a pattern.

    Raises InvalidRequestError.
    """
    if grammar is None:
        return None
    kind, value = grammar.get("type"), grammar.get("value")
    if set(grammar) != {"type", "value"} or kind not in ("json", "json_schema", "regex"):
        message = "grammar must be an object with a type, json, json_schema or regex, and a value"
        raise InvalidRequestError(message, param="grammar")
    if kind == "json_schema":
        value = value.get("schema") if isinstance(value, dict) else None
    return make_grammar("grammar", "regex" if kind == "regex" else "json_schema", value)


def openai_grammar(body: OpenAIFields) -> tuple[str, Grammar] | None:
    """OpenAI's `response_format`, or vLLM's `structured_outputs` and `guided_*`, of which one may be given: the field's
    name and its grammar. Raises InvalidRequestError."""
    given = [(field, getattr(body, field)) for field in _READERS]
    asked = [(field, value) for field, value in given if value is not None and value not in _NOTHING]
    read = [(field, _READERS[field](field, value)) for field, value in asked]
    found = [(field, grammar) for field, grammar in read if grammar is not None]
    if len(found) > 1:
        fields = " and ".join(field for field, _ in found)
        raise InvalidRequestError(f"{fields} both ask for a grammar; leave one out", param=found[1][0])
    return found[0] if found else None


def _response_format(field: str, value: Any) -> Grammar | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_schema({"type": "object"})
    if kind == "json_schema":
        schema = value.get("json_schema")
        given = isinstance(schema, dict) and isinstance(schema.get("schema"), dict)
        _require(field, given, "of type json_schema needs json_schema, an object with a name and a schema")
        return make_grammar(field, "json_schema", schema["schema"])
    raise InvalidRequestError(f"{field} must have the type text, json_object or json_schema", param=field)


_NOTHING: tuple[object, ...] = (False, "", [])
_STRUCTURES = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark"}
# They choose how vLLM does it, which is not what the text is.
_HOW = {"disable_fallback", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "_backend"}


def _structured_outputs(field: str, value: Any) -> Grammar | None:
    _require(field, isinstance(value, dict), "must be an object")
    given = {name: inner for name, inner in value.items() if inner is not None and inner is not False}
    wanted = [name for name in given if name in _STRUCTURES or name == "json_object"]
    if given.keys() - set(wanted) - _HOW:
        rule = f"takes {', '.join(_STRUCTURES)} and json_object alone"
        raise InvalidRequestError(f"{field} {rule}", param=field)
    if not wanted:
        return None
    _require(field, len(wanted) == 1, "must hold one grammar; leave the others out")
    if wanted[0] == "json_object":
        return Grammar.json_schema({"type": "object"})
    return make_grammar(field, _STRUCTURES[wanted[0]], given[wanted[0]])


_READERS = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": lambda field, value: make_grammar(field, "json_schema", value),
    "guided_regex": lambda field, value: make_grammar(field, "regex", value),
    "guided_choice": lambda field, value: make_grammar(field, "choice", value),
    "guided_grammar": lambda field, value: make_grammar(field, "lark", value),
}
assert set(_STRUCTURES.values()) == set(GRAMMAR_TYPES), "every kind has a name in vLLM"


def _require(field: str, condition: bool, rule: str) -> None:
    if not condition:
        raise _invalid(field, rule)


def _invalid(field: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} {rule}", code="invalid_grammar", param=field.partition(".")[0])
