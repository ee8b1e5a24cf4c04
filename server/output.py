"""From token ids to what a client reads: text deltas, stop strings, log-probabilities, usage.

Text lives here and not in the engine, which knows token ids only. Joined deltas are the whole answer: a response
that is not streamed is made of the same deltas.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from model.text_output import StopMatcher, TextDecoder
from model.tokenizer import Tokenizer
from server.engine.messages import SequenceOutput, TokenLogprobs


class TopLogprob(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True):
    """One generated token: its log-probability in the raw distribution and the best alternatives."""

    id: int
    text: str
    logprob: float
    top: list[TopLogprob]


class ChoiceDelta(msgspec.Struct, frozen=True):
    """What one event adds to one choice. `finish_reason` is set on a choice's last.

    `prompt_logprobs` are those of the prompt's next tokens from its second on, where they were asked for.
    `complete` is true on the last of a choice that ended with its grammar, whose last token is text and no EOS.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | UnsetType = UNSET
    complete: bool | UnsetType = UNSET


def join_deltas(deltas: list[ChoiceDelta]) -> ChoiceDelta:
    """One choice's deltas as a whole."""
    last = deltas[-1]
    logprobs = [entry for delta in deltas for entry in delta.logprobs or []]
    scored = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not UNSET]
    return ChoiceDelta(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=None if all(delta.logprobs is None for delta in deltas) else logprobs,
        prompt_logprobs=[entry for entries in scored for entry in entries] if scored else UNSET,
        complete=last.complete,
    )


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


def _ends_with_stop(output: SequenceOutput) -> bool:
    """Whether the last token is a stop token or EOS, which is no part of the text."""
    return output.finish_reason == "stop" and not output.keeps_last


class ChoiceOutput:
    """Turns one sequence's outputs into deltas.

    Stop strings count from the token after the first `min_tokens`. A match ends the choice at the token that
    completed it, whatever else arrived with that token, so that a stream and a whole answer agree.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, stops: list[str], min_tokens: int = 0) -> None:
        self.index = index
        self.num_tokens = 0
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._decoder = TextDecoder(tokenizer)
        self._matcher = StopMatcher(stops) if stops else None
        self._min_tokens = min_tokens

    def push(self, output: SequenceOutput) -> ChoiceDelta:
        if output.cached_tokens > self.cached_tokens:
            self.cached_tokens = output.cached_tokens
        if self._matcher is not None:
            return self._push_matching(output, self._matcher)
        ids, reason = output.token_ids, output.finish_reason
        self.num_tokens += len(ids)
        text = self._decoder.push(ids[:-1] if _ends_with_stop(output) else ids)
        if reason is not None:
            text += self._decoder.finish()
        return self._delta(output, text, len(ids), reason, output.stop_token_id)

    def _push_matching(self, output: SequenceOutput, matcher: StopMatcher) -> ChoiceDelta:
        ids, reason = output.token_ids, output.finish_reason
        text = ""
        for position, token_id in enumerate(ids):
            self.num_tokens += 1
            is_last = position == len(ids) - 1
            piece = "" if is_last and _ends_with_stop(output) else self._decoder.push([token_id])
            if is_last and reason is not None:
                piece += self._decoder.finish()
            if self.num_tokens <= self._min_tokens:
                text += piece
                continue
            text += matcher.push(piece)
            if matcher.matched is not None:
                return self._delta(output, text, position + 1, "stop", matcher.matched)
        if reason is not None:
            text += matcher.flush() + ("" if ids else self._decoder.finish())
        return self._delta(output, text, len(ids), reason, output.stop_token_id)

    def _delta(
        self, output: SequenceOutput, text: str, count: int, reason: str | None, stop_reason: str | int | None
    ) -> ChoiceDelta:
        self.finish_reason = reason
        logprobs = None if output.logprobs is None else [self._logprob(entry) for entry in output.logprobs[:count]]
        scored = output.prompt_logprobs
        prompt_logprobs = UNSET if scored is None else [self._logprob(entry) for entry in scored]
        complete = True if reason == "stop" and output.keeps_last and stop_reason is None else UNSET
        return ChoiceDelta(
            self.index, text, output.token_ids[:count], reason, stop_reason, logprobs, prompt_logprobs, complete
        )

    def _logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        top = [TopLogprob(token_id, self._text(token_id), logprob) for token_id, logprob in entry.top]
        return TokenLogprob(entry.token_id, self._text(entry.token_id), entry.logprob, top)

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
