"""Labels of documents: fields of a row that become control tokens before its text. Free of torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from model.controls import CONTROLS_FILE, Controls, Label, check_value, controls_json, normalised
from model.errors import ControlError
from model.tokenizer import Tokenizer
from model.tokenizer.extension import extend_tokenizer
from training.errors import DataError

# Each value is a token with a row of the embedding; a field of more values is a text or a number of its own.
MAX_LABELS = 10_000


def row_labels(row: Mapping[str, Any], place: str, names: Sequence[str]) -> tuple[Label, ...]:
    """The row's labels in the order of `names`; a field that is absent, null or empty gives none.

    Raises DataError, naming `place`, for a field that is neither text nor a whole number and for unfit values.
    """
    labels = []
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(f"{place}: {name!r} is {type(value).__name__}; a --control field must hold one text")
        text = normalised(str(value))
        if text:
            labels.append(_checked(Label(name, text), place))
    return tuple(labels)


def _checked(label: Label, place: str) -> Label:
    try:
        check_value(*label)
    except ControlError as error:
        raise DataError(f"{place}: {error}") from None
    return label


def declare(tokenizer: Tokenizer, known: Controls, names: Sequence[str], found: Collection[Label]) -> Tokenizer:
    """The tokenizer with a special token for every label of `found`, beside those of `known`, and their controls.json.

    Raises DataError for a name of which no row has a value, TokenizerError for a token that cannot be added.
    """
    for name in names:
        if not any(label.name == name for label in found):
            raise DataError(
                f"--control {name}: no row of the inputs has a value of that name; name a field of the rows"
            )
    controls = known.with_labels(names, found)
    special = [label.token for label in controls.labels]
    return extend_tokenizer(tokenizer, special=special, files={CONTROLS_FILE: controls_json(controls)})
