"""Which split a document belongs to. Free of torch.

- `tail`: the order of the text is kept: training first, then validation, then test, each its share of the characters.
  A cut moves to the nearest end of a document where that changes no split by more than a tenth; else it falls within
  one, as it must when a single book is all there is.
- `documents`: each document goes where the hash of its text sends it. Shares hold on average, equal documents stay
  together, nothing has to be counted beforehand, and text added later moves nothing.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from model.controls import Label
from training.data.labels import MAX_LABELS
from training.data.readers import Piece
from training.errors import DataError

SplitRule = Literal["auto", "tail", "documents"]
SPLITS = ("train", "val", "test")
_TOLERANCE = 0.1
_ENDS_KEPT = 1 << 20


@dataclass(frozen=True, slots=True)
class Shares:
    """Fractions of the text for validation and test; training gets the rest."""

    val: float
    test: float

    @property
    def names(self) -> tuple[str, ...]:
        return SPLITS if self.test else SPLITS[:2]


@dataclass(slots=True)
class Survey:
    """What one pass over the text tells: its length in characters, where documents end, its characters and labels."""

    keep_alphabet: bool = True
    characters: int = 0
    ends: list[int] = field(default_factory=list)
    alphabet: set[str] = field(default_factory=set)
    labels: set[Label] = field(default_factory=set)
    _step: int = 1
    _seen: int = 0

    def add(self, piece: Piece) -> None:
        if piece.starts and self.characters:
            self._end_document()
        self.characters += len(piece.text)
        self.labels.update(piece.labels)
        if len(self.labels) > MAX_LABELS:
            name, count = Counter(label.name for label in self.labels).most_common(1)[0]
            raise DataError(
                f"--control {name}: has {count} values or more; name a field of fewer, at most {MAX_LABELS}"
            )
        if self.keep_alphabet:
            self.alphabet.update(piece.text)

    def _end_document(self) -> None:
        """Keeps every end, or of very many every second, fourth …: memory stays bounded, and cuts lose nothing."""
        self._seen += 1
        if self._seen % self._step == 0:
            self.ends.append(self.characters)
        if len(self.ends) > _ENDS_KEPT:
            self.ends, self._step = self.ends[1::2], 2 * self._step


def tail_cuts(survey: Survey, shares: Shares) -> list[int]:
    """The characters at which validation and, if there is one, test begin."""
    total = survey.characters
    slack = (
        _TOLERANCE * total * min(share for share in (shares.val, shares.test or 1.0, 1.0 - shares.val - shares.test))
    )
    cuts = [int(total * (1.0 - (shares.val + shares.test)))]
    if shares.test:
        cuts.append(int(total * (1.0 - shares.test)))
    return [_nearest_end(survey.ends, cut, slack) for cut in cuts]


def _nearest_end(ends: list[int], cut: int, slack: float) -> int:
    index = bisect_left(ends, cut)
    nearest = min(ends[max(0, index - 1) : index + 1], key=lambda end: abs(end - cut), default=cut)
    return nearest if abs(nearest - cut) <= slack else cut


def split_tail(pieces: Iterable[Piece], cuts: list[int], names: tuple[str, ...]) -> Iterator[tuple[str, Piece]]:
    """The pieces with their splits; one that lies across a cut is divided, and its rest begins a document."""
    position, part = 0, 0
    for text, starts, labels in pieces:
        while part < len(cuts) and position + len(text) > cuts[part]:
            room = cuts[part] - position
            if room:
                yield names[part], Piece(text[:room], starts, labels)
            text, starts, position = text[room:], True, cuts[part]
            part += 1
        yield names[part], Piece(text, starts, labels)
        position += len(text)


def split_documents(pieces: Iterable[Piece], shares: Shares) -> Iterator[tuple[str, Piece]]:
    """Whole documents, each by the hash of its text (of the first piece, of one that comes in several)."""
    name = SPLITS[0]
    for piece in pieces:
        if piece.starts:
            name = split_of(piece.text, shares)
        yield name, piece


def split_of(text: str, shares: Shares) -> str:
    """Where the hash of a text sends it."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < shares.val:
        return "val"
    return "test" if place < shares.val + shares.test else "train"
