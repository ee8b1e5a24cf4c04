"""From token ids to what a client reads: text deltas, stop strings, log-probabilities, usage.

Text lives here and not in the engine, which knows token ids only. Joined deltas are the whole answer: a response
that is not streamed is made of the same deltas.
"""

from __future__ import annotations

import msgspec

from model.errors import TokenizerError
from model.tokenizer import StreamDecoder, Tokenizer
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
    """What one event adds to one choice. `finish_reason` is set on a choice's last."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class StopMatcher:
    """Finds stop strings in text that arrives in pieces, and holds back what may yet become one.

    The first match to be complete wins; of several complete at once, the one that starts first.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._first_letters = frozenset(stop[0] for stop in stops)
        self._max_held = max(map(len, stops), default=1) - 1
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show; after a match `matched` is set and the text ends before it."""
        text = self._held + text
        found = [(position, stop) for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            position, self.matched = min(found, key=lambda pair: pair[0])
            self._held = ""
            return text[:position]
        cut = self._hold_from(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, once it is known not to become a stop string."""
        held, self._held = self._held, ""
        return held

    def _hold_from(self, text: str) -> int:
        """Where the longest ending of `text` begins that some stop string starts with."""
        for start in range(max(0, len(text) - self._max_held), len(text)):
            if text[start] in self._first_letters and any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)


class TextDecoder:
    """A StreamDecoder for a model's output, which may be wider than the vocabulary: ids beyond it have no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = StreamDecoder(tokenizer)

    def push(self, ids: list[int]) -> str:
        try:
            return self._decoder.push(ids)
        except TokenizerError:
            return "" if len(ids) == 1 else "".join(self.push([token_id]) for token_id in ids)

    def finish(self) -> str:
        return self._decoder.finish()


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
        text = self._decoder.push(ids[:-1] if reason == "stop" else ids)
        if reason is not None:
            text += self._decoder.finish()
        return self._delta(output, text, len(ids), reason, output.stop_token_id)

    def _push_matching(self, output: SequenceOutput, matcher: StopMatcher) -> ChoiceDelta:
        ids, reason = output.token_ids, output.finish_reason
        text = ""
        for position, token_id in enumerate(ids):
            self.num_tokens += 1
            is_last = position == len(ids) - 1
            piece = "" if is_last and reason == "stop" else self._decoder.push([token_id])
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
        return ChoiceDelta(self.index, text, output.token_ids[:count], reason, stop_reason, logprobs)

    def _logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        top = [TopLogprob(token_id, self._text(token_id), logprob) for token_id, logprob in entry.top]
        return TokenLogprob(entry.token_id, self._text(entry.token_id), entry.logprob, top)

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
