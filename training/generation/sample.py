"""What follows a prompt: its text as it comes, and all of it at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.generate import GeneratedToken, TokenLogprobs
from model.text_output import StopMatcher, TextDecoder
from model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Sample:
    """What followed a prompt.

    `text` leaves out the token or the stop string that ended it; `token_ids` has the tokens of both.
    `finish_reason` is `stop` (the end-of-text token, a stop token or a stop string; `stop_reason` names the latter
    two) or `length`. `logprobs` where they were asked for, one for each token. A hypothesis of beam search has a
    `score` and no seed.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    seed: int | None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token added to the text of request `index`: never half a character, often nothing.

    The last delta of a request has its `sample`; the deltas' texts, joined, are the sample's.
    """

    index: int
    text: str
    token_id: int
    sample: Sample | None = None


class TextBuilder:
    """The text of one sequence, token by token. Stop strings count behind the first `min_tokens` tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        seed: int,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._decoder = TextDecoder(tokenizer)
        self._matcher = StopMatcher(stop) if stop else None
        self._seed, self._min_tokens, self._eos = seed, min_tokens, frozenset(eos_token_ids)
        self._parts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self.sample: Sample | None = None

    def push(self, token: GeneratedToken) -> str:
        """The text that is certain now. `sample` is set once the sequence has ended."""
        self._token_ids.append(token.token_id)
        if token.logprobs is not None:
            self._logprobs.append(token.logprobs)
        reason = token.finish_reason
        text = "" if reason == "stop" else self._decoder.push([token.token_id])
        if reason is not None:
            text += self._decoder.finish()
        text = self._match(text, reason is not None)
        self._parts.append(text)
        stop_string = None if self._matcher is None else self._matcher.matched
        if stop_string is not None:
            self._end("stop", stop_string)
        elif reason is not None:
            named = reason == "stop" and token.token_id not in self._eos
            self._end(reason, token.token_id if named else None)
        return text

    def _match(self, text: str, is_last: bool) -> str:
        if self._matcher is None or len(self._token_ids) <= self._min_tokens:
            return text
        text = self._matcher.push(text)
        return text + self._matcher.flush() if is_last and self._matcher.matched is None else text

    def _end(self, finish_reason: str, stop_reason: str | int | None) -> None:
        logprobs = self._logprobs or None
        text = "".join(self._parts)
        self.sample = Sample(text, self._token_ids, finish_reason, self._seed, stop_reason, logprobs)


def sample_values(sample: Sample) -> dict[str, Any]:
    """A sample for JSON; what it has not is left out."""
    values: dict[str, Any] = {"text": sample.text, "token_ids": sample.token_ids, "finish_reason": sample.finish_reason}
    if sample.stop_reason is not None:
        values["stop_reason"] = sample.stop_reason
    if sample.seed is not None:
        values["seed"] = sample.seed
    if sample.score is not None:
        values["score"] = sample.score
    if sample.logprobs is not None:
        values["logprobs"] = [
            {"id": token_id, "logprob": entry.logprob, "top": [{"id": i, "logprob": value} for i, value in entry.top]}
            for token_id, entry in zip(sample.token_ids, sample.logprobs, strict=True)
        ]
    return values
