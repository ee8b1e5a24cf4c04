"""Control tokens: declared special tokens before a document that say what it is, as in CTRL (Keskar et al., 2019).

    controls = read_controls(Path("checkpoints/best"))
    ids = controls.prefix_ids(tokenizer, ["theme=rain", "meter=doha"])      # <|endoftext|><|meter:doha|><|theme:rain|>

A control has a name (`meter`) and declared values (`doha` …); each pair is one special token, `<|meter:doha|>`. The
file controls.json beside the tokenizer's lists them: {"version": 1, "controls": [{"name": …, "values": […]}, …]}.
In training they stand before a document in the order in which the names were declared. Free of torch.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from model.errors import ControlError, TokenizerError
from model.json_file import JsonFields, read_json_object
from model.tokenizer import Tokenizer

CONTROLS_FILE = "controls.json"
_VERSION = 1
_NAME = re.compile(r"[^\W\d][\w-]{0,63}")
_MAX_VALUE_CHARACTERS = 100


class Label(NamedTuple):
    """One value of one control."""

    name: str
    value: str

    @property
    def token(self) -> str:
        return f"<|{self.name}:{self.value}|>"


@dataclass(frozen=True, slots=True)
class Controls:
    """The values of each control; both in declared order. Empty for a model without controls."""

    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def labels(self) -> list[Label]:
        return [Label(name, value) for name, values in self.values.items() for value in values]

    def with_labels(self, names: Sequence[str], labels: Collection[Label]) -> Controls:
        """These and more: new names in the order of `names`, new values sorted, both behind what was declared."""
        values = {name: list(known) for name, known in self.values.items()}
        for name in names:
            known = values.setdefault(name, [])
            known += sorted({label.value for label in labels if label.name == name} - set(known))
        return Controls({name: tuple(known) for name, known in values.items()})

    def choose(self, choices: Iterable[str]) -> list[Label]:
        """The labels of `name=value` choices, in declared order.

        Raises ControlError, naming what is known, for an unknown or repeated control and for an unknown value.
        """
        chosen: dict[str, str] = {}
        for choice in choices:
            name, equals, value = choice.partition("=")
            name, value = name.strip(), normalised(value)
            if not equals:
                raise ControlError(f"control {choice!r} must have the form name=value; {self._describe()}")
            if name not in self.values:
                raise ControlError(f"control {name!r} is unknown; {self._describe()}")
            if value not in self.values[name]:
                raise ControlError(f"control {name} has no value {value!r}, only {', '.join(self.values[name])}")
            if name in chosen:
                raise ControlError(f"control {name} is given twice; choose one of its values")
            chosen[name] = value
        return [Label(name, chosen[name]) for name in self.values if name in chosen]

    def prefix_ids(self, tokenizer: Tokenizer, choices: Sequence[str]) -> list[int]:
        """What stands before such a document in training: the end-of-text token, if there is one, then the labels'.

        Empty without choices. The prompt's own ids follow, encoded with add_special=False. Raises ControlError, or
        TokenizerError where the tokenizer lacks a declared token.
        """
        labels = self.choose(choices)
        if not labels:
            return []
        missing = [label.token for label in labels if label.token not in tokenizer.special_tokens]
        if missing:
            raise TokenizerError(f"{CONTROLS_FILE} declares {missing[0]}, which the tokenizer lacks; restore its files")
        separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return separator + [tokenizer.special_tokens[label.token] for label in labels]

    def _describe(self) -> str:
        if not self.values:
            return "this model has no controls, for its data was prepared without --control"
        return "known are " + "; ".join(f"{name} ({', '.join(known)})" for name, known in self.values.items())


def normalised(value: str) -> str:
    """Values are compared without outer white space and composed (NFC), so that equal looks are equal values."""
    return unicodedata.normalize("NFC", value.strip())


def check_name(name: str) -> None:
    """Raises ControlError for what cannot name a control."""
    if not _NAME.fullmatch(name):
        raise ControlError(f"control name {name!r} must be letters, digits, _ and -, with a letter first")


def check_value(name: str, value: str) -> None:
    """Raises ControlError for a value that is no label but a text, or that would end its token."""
    if len(value) > _MAX_VALUE_CHARACTERS or "|>" in value or not value.isprintable():
        raise ControlError(
            f"control {name} has the value {value[:_MAX_VALUE_CHARACTERS]!r}; "
            f"values are one line of at most {_MAX_VALUE_CHARACTERS} characters without '|>'"
        )


def controls_json(controls: Controls) -> bytes:
    entries = [{"name": name, "values": list(values)} for name, values in controls.values.items()]
    return (json.dumps({"version": _VERSION, "controls": entries}, ensure_ascii=False, indent=2) + "\n").encode()


def read_controls(folder: Path) -> Controls:
    """The controls of a checkpoint's or tokenizer's folder, none without the file. Raises TokenizerError."""
    path = folder / CONTROLS_FILE
    if not path.is_file():
        return Controls()
    content = read_json_object(path, TokenizerError)
    fields = JsonFields(content, CONTROLS_FILE, TokenizerError)
    if fields.integer("version") != _VERSION:
        fields.fail("version", f"must be {_VERSION}")
    values: dict[str, tuple[str, ...]] = {}
    entries = fields.value("controls")
    for entry in entries if isinstance(entries, list) else fields.fail("controls", "must be a list"):
        name, known = (entry.get("name"), entry.get("values")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or name in values or not isinstance(known, list):
            fields.fail("controls", "must hold objects with a name of its own and values")
        if not all(isinstance(value, str) for value in known) or len(set(known)) < len(known):
            fields.fail("controls", f"must list different texts as the values of {name}")
        values[name] = tuple(known)
    return Controls(values)
