"""The text that a tokenizer is trained on or measured with: the inputs of `prepare`, read as a stream.

Free of torch.
"""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from training.data.compressed import Meter
from training.data.hub_dataset import HubDataset
from training.data.prepare import Corpus, OnProgress
from training.data.readers import ReadOptions, cut_text
from training.data.sources import check_inputs, fetch
from training.errors import DataError, RecipeError

# `tokenizers` takes 256 texts at a time from an iterator, so that this bounds what it holds.
_MAX_CHARACTERS = 1 << 16


@dataclass(frozen=True, slots=True)
class CorpusRequest:
    """What to read. `digests` are the sha256 of the URLs among `inputs`, `text_keys` the fields of a row with text."""

    inputs: tuple[str, ...]
    digests: tuple[str, ...] = ()
    text_keys: tuple[str, ...] = ("text",)

    def __post_init__(self) -> None:
        if not self.text_keys or not all(self.text_keys):
            raise RecipeError("--text-key is empty; name the field that holds the text")


@dataclass(slots=True)
class TextStream:
    """Texts of bounded length, cut only before a space or line end that something visible follows. It can be read
    several times; `characters` counts what the last time gave, `alphabet` holds every character seen."""

    corpus: Corpus
    text_keys: tuple[str, ...]
    on_progress: OnProgress
    characters: int = 0
    alphabet: set[str] = field(default_factory=set)

    def read(self, what: str) -> Iterator[str]:
        """`what` is told to `on_progress`. Raises DataError for bad content and for no text at all."""
        meter, self.characters = Meter(), 0
        for piece in self.corpus.read(ReadOptions("file", self.text_keys, "words"), meter):
            for text in cut_text(_slices(piece.text), "words"):
                self.characters += len(text)
                self.alphabet.update(text)
                yield text
            self.on_progress(what, meter.done, self.corpus.num_bytes)
        if not self.characters:
            raise DataError("the inputs hold no text at all; check --input and --text-key")

    @property
    def marks(self) -> str:
        """The combining marks seen."""
        return "".join(sorted(each for each in self.alphabet if unicodedata.category(each).startswith("M")))


@contextmanager
def open_corpus(
    request: CorpusRequest, on_progress: OnProgress, on_notice: Callable[[str], None]
) -> Iterator[TextStream]:
    """Downloads what must be downloaded; without inputs it is empty. Raises RecipeError or DataError."""
    inputs = check_inputs(request.inputs, request.digests, on_notice) if request.inputs else []
    with tempfile.TemporaryDirectory(prefix="quill-tokenizer-") as folder:
        sources: Sequence[object] = [
            HubDataset(item.origin, item.location, item.sha256, False)
            if item.kind == "dataset"
            else fetch(item, Path(folder))
            for item in inputs
        ]
        yield TextStream(Corpus(sources), request.text_keys, on_progress)  # type: ignore[arg-type]


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), _MAX_CHARACTERS):
        yield text[start : start + _MAX_CHARACTERS]
