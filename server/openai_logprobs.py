"""Log-probabilities as POST /v1/completions tells them: lists side by side, the prompt's before the answer's."""

from __future__ import annotations

from msgspec import UNSET

from model.text_output import TextDecoder
from model.tokenizer import Tokenizer
from server.openai_shapes import CompletionLogprobs
from server.output import ChoiceDelta, TokenLogprob
from server.prompts import Prompt


class LogprobsWriter:
    """The log-probabilities of one choice, whose deltas it is given in order."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self._asked = prompt.params.logprobs is not None
        self._first_id = prompt.token_ids[0] if self._asked and prompt.prompt_logprobs is not None else None
        self._answer_offset = len(prompt.echo)
        self._tokenizer = tokenizer
        self._decoder = TextDecoder(tokenizer)
        self._offset = 0
        self._in_prompt = True

    def take(self, delta: ChoiceDelta) -> CompletionLogprobs | None:
        if not self._asked:
            return None
        written = CompletionLogprobs([], [], [], [])
        if self._first_id is not None:  # nothing stands before it that could predict it
            self._write(written, self._first_id, None, None)
            self._first_id = None
        for entry in [] if delta.prompt_logprobs is UNSET else delta.prompt_logprobs:
            self._write(written, entry.id, entry.logprob, self._top(entry))
        if delta.logprobs and self._in_prompt:
            self._in_prompt = False
            self._offset, self._decoder = self._answer_offset, TextDecoder(self._tokenizer)
        for entry in delta.logprobs or []:
            self._write(written, entry.id, entry.logprob, self._top(entry))
        return written if written.tokens else None

    def _write(
        self, written: CompletionLogprobs, token_id: int, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        written.tokens.append(self._name(token_id))
        written.token_logprobs.append(logprob)
        written.top_logprobs.append(top)
        written.text_offset.append(self._offset)
        self._offset += len(self._decoder.push([token_id]))

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The alternatives, and with them the token itself. Of two tokens with one name the likelier counts."""
        top: dict[str, float] = {}
        for alternative in entry.top:
            top.setdefault(self._name(alternative.id), alternative.logprob)
        top.setdefault(self._name(entry.id), entry.logprob)
        return top

    def _name(self, token_id: int) -> str:
        """A token's text; one that is no text of its own, half a character, is spelled as OpenAI does."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
