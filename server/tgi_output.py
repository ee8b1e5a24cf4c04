"""Answers in the shapes of Text Generation Inference.

Unlike POST /generate's, TGI's text holds the stop sequence that ended it, a token's text is what it adds to that text,
and a special token's text is its own, which the whole text leaves out. `provenance`, which TGI has not, is that of
POST /generate.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from model.text_output import TextDecoder
from model.tokenizer import Tokenizer
from server.output import ChoiceDelta, TopLogprob
from server.tokenization import token_text


class PrefillToken(msgspec.Struct):
    """A token of the prompt. The first one, which nothing precedes, has no log-probability."""

    id: int
    text: str
    logprob: float | None


class Token(msgspec.Struct):
    id: int
    text: str
    logprob: float | None
    special: bool


class StreamDetails(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int
    provenance: dict[str, object]


class StreamEvent(msgspec.Struct):
    """One token; the last one's event has the whole text, and the details if they were asked for."""

    index: int
    token: Token
    top_tokens: list[Token] | UnsetType = UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None


class Details(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    provenance: dict[str, object]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[Token]] | UnsetType = UNSET


class BestOfSequence(msgspec.Struct):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Answer(msgspec.Struct):
    generated_text: str
    details: Details | UnsetType = UNSET


class TokenReader:
    """Turns one sequence's deltas into TGI's tokens; `text` is what they make together.

    `prompt_logprobs` are those of all the prompt's tokens, where they were asked for.
    The joined texts of the tokens that are not special are `text`, which ends with the stop sequence if one ended it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens: list[Token] = []
        self.top_tokens: list[list[Token]] = []
        self.prompt_logprobs: list[float | None] = [None]
        self.finish_reason = ""
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_tokens.values())
        self._decoder = TextDecoder(tokenizer)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, delta: ChoiceDelta) -> list[Token]:
        """The tokens that this delta adds."""
        start, last = len(self.tokens), len(delta.token_ids) - 1
        at_end = delta.finish_reason == "stop" and delta.stop_reason is None and delta.complete is UNSET
        for position, token_id in enumerate(delta.token_ids):
            entry = delta.logprobs[position] if delta.logprobs is not None else None
            logprob = None if entry is None else entry.logprob
            self.tokens.append(self._token(token_id, logprob, is_eos=at_end and position == last))
            self.top_tokens.append(self._top(entry.top if entry is not None else ()))
        if delta.prompt_logprobs is not UNSET:
            self.prompt_logprobs += [entry.logprob for entry in delta.prompt_logprobs]
        if delta.finish_reason is not None:
            self._finish(delta)
        return self.tokens[start:]

    def _token(self, token_id: int, logprob: float | None, *, is_eos: bool) -> Token:
        """A special token shows its own text, which the decoder leaves out."""
        piece = "" if is_eos else self._decoder.push([token_id])
        self._pieces.append(piece)
        special = is_eos or token_id in self._special
        return Token(token_id, token_text(token_id, self._tokenizer) if special else piece, logprob, special)

    def _top(self, alternatives: Sequence[TopLogprob]) -> list[Token]:
        return [Token(top.id, top.text, top.logprob, top.id in self._special) for top in alternatives]

    def _finish(self, delta: ChoiceDelta) -> None:
        self.finish_reason = _finish_reason(delta)
        if self.tokens:
            self._extend_last(self._decoder.finish())
        if isinstance(delta.stop_reason, str):
            _, _, surplus = self.text.partition(delta.stop_reason)
            self._cut_last(len(surplus))

    def _extend_last(self, tail: str) -> None:
        """Bytes that were held back for a character that never became whole."""
        self._pieces[-1] += tail
        if not self.tokens[-1].special:
            self.tokens[-1].text += tail

    def _cut_last(self, count: int) -> None:
        """Leave out what the last token adds after the end of the stop sequence."""
        if count:
            self._pieces[-1] = self._pieces[-1][:-count]
            self.tokens[-1].text = self.tokens[-1].text[:-count]


def _finish_reason(delta: ChoiceDelta) -> str:
    if delta.finish_reason != "stop":
        return "length"
    return "eos_token" if delta.stop_reason is None else "stop_sequence"


def prefill_tokens(token_ids: list[int], logprobs: list[float | None], tokenizer: Tokenizer) -> list[PrefillToken]:
    return [
        PrefillToken(token_id, token_text(token_id, tokenizer), logprob)
        for token_id, logprob in zip(token_ids, logprobs, strict=True)
    ]


def mean_logprob(reader: TokenReader) -> float:
    """What TGI ranks the sequences of `best_of` by."""
    logprobs = [token.logprob for token in reader.tokens if token.logprob is not None]
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")
