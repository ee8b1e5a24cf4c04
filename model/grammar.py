"""Grammar: what a sequence's text must be, as a value that any process can hold. Free of torch and of llguidance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import InvalidSamplingParamsError

GrammarType = Literal["regex", "json_schema", "choice", "lark"]
GRAMMAR_TYPES: tuple[str, ...] = get_args(GrammarType)

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_GRAMMAR_DEPTH = 64
MAX_GRAMMAR_CHOICES = 1024


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language, to which the whole of a generated text belongs once it has ended by itself.

    `value` is a regular expression, the JSON text of a JSON schema, the JSON text of a list of strings, or a grammar in
    Lark's notation. Made by the class methods below. Raises InvalidSamplingParamsError for what is larger than is
    taken; whether the value means anything only a compiler can tell.
    """

    type: GrammarType
    value: str

    def __post_init__(self) -> None:
        if self.type not in GRAMMAR_TYPES:
            raise InvalidSamplingParamsError("grammar", f"must be one of {', '.join(GRAMMAR_TYPES)}")
        try:
            size = len(self.value.encode())
        except UnicodeEncodeError:
            raise InvalidSamplingParamsError("grammar", "must hold valid Unicode") from None
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidSamplingParamsError("grammar", f"must not be longer than {MAX_GRAMMAR_BYTES} bytes")

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        return cls("lark", text)

    @classmethod
    def json_schema(cls, schema: Mapping[str, object] | bool | str) -> Grammar:
        """`schema` may also be the schema's JSON text."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema, parse_constant=_refuse_constant)
            except (ValueError, RecursionError):
                raise InvalidSamplingParamsError("grammar", "must hold a JSON schema that is valid JSON") from None
        if not isinstance(schema, Mapping | bool):
            raise InvalidSamplingParamsError("grammar", "must hold a JSON schema that is an object, true or false")
        if _is_deeper(schema, MAX_GRAMMAR_DEPTH):
            raise InvalidSamplingParamsError(
                "grammar", f"must not nest its schema deeper than {MAX_GRAMMAR_DEPTH} levels"
            )
        return cls("json_schema", _json(schema))

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """The text is one of `choices`."""
        if not 1 <= len(choices) <= MAX_GRAMMAR_CHOICES or not all(isinstance(text, str) and text for text in choices):
            raise InvalidSamplingParamsError(
                "grammar", f"must list 1 to {MAX_GRAMMAR_CHOICES} choices, strings that are not empty"
            )
        return cls("choice", _json(list(choices)))

    @property
    def key(self) -> bytes:
        """Equal for equal grammars: SHA-256 of type and value."""
        return hashlib.sha256(f"{self.type}\0{self.value}".encode()).digest()


def _json(value: object) -> str:
    """Keys stay in their order, in which an object's properties are written."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):
        raise InvalidSamplingParamsError("grammar", "must hold values of JSON alone, without NaN or infinity") from None


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _is_deeper(value: object, most: int) -> bool:
    """Whether a JSON value nests more than `most` levels; walked without recursion, since it may be very deep."""
    level: list[object] = [value]
    for _ in range(most + 1):
        inner: list[object] = []
        for item in level:
            if isinstance(item, Mapping):
                inner += item.values()
            elif isinstance(item, list | tuple):
                inner += item
        if not inner:
            return False
        level = inner
    return True
