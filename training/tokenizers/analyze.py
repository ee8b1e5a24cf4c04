"""Several tokenizers on one text: how long it becomes, and what they lack.

    python -m training tokenizer analyze gpt2 bytes char tokenizers/hindi --input poems.txt --plot tokenizers.png

Words are what stands between white space, without the punctuation around it. Free of torch.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from training.data.named_tokenizer import named_tokenizer
from training.data.prepare import OnProgress
from training.errors import RecipeError
from training.tokenizers.corpus import CorpusRequest, TextStream, open_corpus

CHARACTERS = "char"


@dataclass(frozen=True, slots=True)
class Analysis:
    """Counts over a text of `characters`, `num_bytes` in UTF-8 and `words`. A word is unknown if the vocabulary lacks
    part of it, whole if one token is all of it; both are counted as often as the word occurs."""

    name: str
    kind: str
    vocab_size: int
    tokens: int
    characters: int
    num_bytes: int
    words: int
    unknown_words: int
    whole_words: int

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / max(1, self.words)

    @property
    def characters_per_token(self) -> float:
        return self.characters / max(1, self.tokens)

    @property
    def bytes_per_token(self) -> float:
        """The compression."""
        return self.num_bytes / max(1, self.tokens)

    @property
    def unknown_rate(self) -> float:
        return self.unknown_words / max(1, self.words)

    @property
    def whole_rate(self) -> float:
        return self.whole_words / max(1, self.words)


def analyze(
    names: Sequence[str],
    request: CorpusRequest,
    *,
    on_progress: OnProgress = lambda what, done, total: None,
    on_notice: Callable[[str], None] = lambda line: None,
) -> list[Analysis]:
    """One row for each of `names`: gpt2, bytes, char (the characters of this text), a tokenizer.json or its folder.

    Raises RecipeError, DataError or TokenizerError.
    """
    if not request.inputs:
        raise RecipeError("--input names no text: give a file, a folder, a URL, hf:OWNER/NAME or a short name")
    found = {name: None if name == CHARACTERS else named_tokenizer(name, "TOKENIZER") for name in dict.fromkeys(names)}
    with open_corpus(request, on_progress, on_notice) as texts:
        return _analyze(found, texts)


def _analyze(found: dict[str, Tokenizer | None], texts: TextStream) -> list[Analysis]:
    if None in found.values():
        for _ in texts.read("reading"):
            pass
    counters = [_Counter(name, each or Tokenizer.characters(texts.alphabet)) for name, each in found.items()]
    words: Counter[str] = Counter()
    num_bytes = 0
    for text in texts.read("tokenising"):
        num_bytes += len(text.encode())
        words.update(filter(None, map(_strip_signs, text.split())))
        for counter in counters:
            counter.add(text)
    return [counter.result(texts.characters, num_bytes, words) for counter in counters]


@dataclass(slots=True)
class _Counter:
    name: str
    tokenizer: Tokenizer
    tokens: int = 0
    known: dict[str, bool] = field(default_factory=dict)

    def add(self, text: str) -> None:
        self.tokens += len(self._encode_known(text))

    def result(self, characters: int, num_bytes: int, words: Counter[str]) -> Analysis:
        lengths = {word: self._word_tokens(word) for word in words}
        return Analysis(
            name=self.name,
            kind=self.tokenizer.kind,
            vocab_size=self.tokenizer.vocab_size,
            tokens=self.tokens,
            characters=characters,
            num_bytes=num_bytes,
            words=words.total(),
            unknown_words=sum(count for word, count in words.items() if lengths[word] is None),
            whole_words=sum(count for word, count in words.items() if lengths[word] == 1),
        )

    def _encode_known(self, text: str) -> list[int]:
        """The ids without the characters that the vocabulary cannot express."""
        try:
            return self.tokenizer.encode(text, add_special=False)
        except TokenizerError:
            return self.tokenizer.encode("".join(filter(self._is_known, text)), add_special=False)

    def _is_known(self, character: str) -> bool:
        if character not in self.known:
            try:
                self.tokenizer.encode(character, add_special=False)
                self.known[character] = True
            except TokenizerError:
                self.known[character] = False
        return self.known[character]

    def _word_tokens(self, word: str) -> int | None:
        """How many tokens a word takes, with the space before it or without; None for one that is unknown."""
        try:
            alone, inside = (self.tokenizer.encode(text, add_special=False) for text in (word, f" {word}"))
        except TokenizerError:
            return None
        if not alone or (self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in alone):
            return None
        return min(len(alone), len(inside))


def _strip_signs(word: str) -> str:
    """A word without the punctuation and symbols around it."""
    start, end = 0, len(word)
    while start < end and _is_sign(word[start]):
        start += 1
    while start < end and _is_sign(word[end - 1]):
        end -= 1
    return word[start:end]


def _is_sign(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"
