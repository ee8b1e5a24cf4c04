"""Generated text as its readers get it, whoever they are: stop strings and tokens without text. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

from model.errors import TokenizerError
from model.tokenizer import StreamDecoder, Tokenizer


class StopMatcher:
    """Finds stop strings in text that arrives in pieces, and holds back what may yet become one.

    The first match to be complete wins; of several complete at once, the one that starts first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
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
