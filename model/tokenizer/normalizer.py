"""Unicode normalisation of a text before it is tokenised, by the `tokenizers` library that the file is written for.

The library's own tables are used, because Python's may be of another version of Unicode. Free of torch.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from model.tokenizer.files import as_dict

if TYPE_CHECKING:
    from tokenizers import normalizers

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_LOWERCASE = "Lowercase"


class Normalizer:
    """Unicode's normalisation forms and lower case, one after the other: the types of a tokenizer.json's normalizer."""

    def __init__(self, steps: tuple[str, ...]) -> None:
        self.steps = steps

    @property
    def is_compatible(self) -> bool:
        """Whether text keeps its white space: NFKC and NFKD write some visible characters as a space and a mark."""
        return not {"NFKC", "NFKD"} & set(self.steps)

    def __call__(self, text: str) -> str:
        if not self.steps or (text.isascii() and _LOWERCASE not in self.steps):
            return text
        return self._library.normalize_str(text)

    def document(self) -> dict[str, object] | None:
        """The normalizer of a tokenizer.json."""
        entries: list[dict[str, object]] = [{"type": step} for step in self.steps]
        if len(entries) < 2:
            return entries[0] if entries else None
        return {"type": "Sequence", "normalizers": entries}

    @cached_property
    def _library(self) -> normalizers.Normalizer:
        from tokenizers import normalizers

        return normalizers.Sequence([getattr(normalizers, step)() for step in self.steps])


NO_NORMALIZER = Normalizer(())


def read_normalizer(value: object) -> Normalizer | None:
    """The normalizer of a tokenizer.json, or None for one that does other things."""
    steps = _flatten(value)
    return None if steps is None else Normalizer(tuple(steps))


def _flatten(value: object) -> list[str] | None:
    if value is None:
        return []
    entry = as_dict(value)
    kind, inner = entry.get("type"), entry.get("normalizers")
    if kind == "Sequence" and isinstance(inner, list):
        steps = [_flatten(each) for each in inner]
        return None if None in steps else [step for each in steps if each is not None for step in each]
    return [kind] if isinstance(kind, str) and kind in (*FORMS, _LOWERCASE) else None
