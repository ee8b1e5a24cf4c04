"""Answers and events in OpenAI's shapes. Fields that OpenAI has not: `stop_reason` as in vLLM, `seed`, `provenance`."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from model.text_output import TextDecoder
from model.tokenizer import Tokenizer
from server.errors import ApiError
from server.generation import Generation
from server.openai_errors import openai_error_body
from server.output import ChoiceDelta, TokenLogprob
from server.output import Usage as NativeUsage
from server.prompts import Prompt
from server.sse import DONE, data_event


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """`text_offset` counts characters from the start of the choice's text to where the token's text begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    seed: int | UnsetType = UNSET


class TokenAlternative(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenAlternative]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatToken]


class ChatMessage(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatDelta(msgspec.Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    seed: int


class ChatEventChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    seed: int | UnsetType = UNSET


Choice = CompletionChoice | ChatChoice | ChatEventChoice


class Body(msgspec.Struct, frozen=True):
    """An answer or an event."""

    id: str
    kind: str = msgspec.field(name="object")
    created: int
    model: str
    choices: list[Choice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    provenance: dict[str, object] | UnsetType = UNSET


class AnswerSource(msgspec.Struct, frozen=True):
    """What all events of an answer say of it. `provenance` is that of POST /generate."""

    id: str
    created: int
    model: str
    provenance: dict[str, object]

    @property
    def fingerprint(self) -> str:
        """Names the weights, as a client may compare it."""
        return "fp_" + str(self.provenance["weights"]).removeprefix("sha256:")[:12]


def usage_of(native: NativeUsage) -> Usage:
    prompt, completion = native.prompt_tokens, native.completion_tokens
    return Usage(prompt, completion, prompt + completion, CachedTokens(native.cached_tokens))


class _Format:
    """What both routes share; `include_usage` asks for an event with the usage, and null in those before it."""

    def __init__(
        self, source: AnswerSource, generation: Generation, tokenizer: Tokenizer, *, include_usage: bool
    ) -> None:
        self._source = source
        self._fingerprint = source.fingerprint
        self._seeds = generation.seeds
        self._tokenizer = tokenizer
        self._event_usage = None if include_usage else UNSET

    _answer_name: str
    _event_name: str

    def end(self, generation: Generation) -> bytes:
        if self._event_usage is UNSET:
            return DONE
        last = self._body(self._event_name, [], usage_of(generation.usage), self._source.provenance)
        return data_event(last) + DONE

    def error(self, error: ApiError, request_id: str) -> bytes:
        """An event without a name: OpenAI's clients look for the field `error` in every event."""
        return b"data: " + openai_error_body(error) + b"\n\n"

    def _body(
        self, name: str, choices: list[Choice], usage: Usage | UnsetType | None,
        provenance: dict[str, object] | UnsetType = UNSET,
    ) -> Body:  # fmt: skip
        source = self._source
        return Body(source.id, name, source.created, source.model, choices, self._fingerprint, usage, provenance)

    def _whole(self, choices: list[Choice], usage: NativeUsage) -> bytes:
        body = self._body(self._answer_name, choices, usage_of(usage), self._source.provenance)
        return msgspec.json.encode(body)

    def _event(self, choice: Choice) -> bytes:
        return data_event(self._body(self._event_name, [choice], self._event_usage))


class CompletionFormat(_Format):
    """POST /v1/completions, whose events and whole answers have one shape."""

    _answer_name = _event_name = "text_completion"

    def __init__(
        self, source: AnswerSource, generation: Generation, tokenizer: Tokenizer, *, include_usage: bool
    ) -> None:
        super().__init__(source, generation, tokenizer, include_usage=include_usage)
        self._logprobs = [_LogprobsWriter(prompt, tokenizer) for prompt in generation.prompts for _ in range(prompt.n)]

    def answer(self, choices: list[ChoiceDelta], usage: NativeUsage) -> bytes:
        return self._whole([self._choice(choice) for choice in choices], usage)

    def event(self, delta: ChoiceDelta) -> bytes:
        return self._event(self._choice(delta))

    def _choice(self, delta: ChoiceDelta) -> CompletionChoice:
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._logprobs[delta.index].take(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            seed=UNSET if delta.finish_reason is None else self._seeds[delta.index],
        )


class _LogprobsWriter:
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


class ChatFormat(_Format):
    """POST /v1/chat/completions. A choice's first event names the role, the others add text."""

    _answer_name = "chat.completion"
    _event_name = "chat.completion.chunk"

    def __init__(
        self, source: AnswerSource, generation: Generation, tokenizer: Tokenizer, *, include_usage: bool
    ) -> None:
        super().__init__(source, generation, tokenizer, include_usage=include_usage)
        self._begun = [False for _ in generation.choices]

    def answer(self, choices: list[ChoiceDelta], usage: NativeUsage) -> bytes:
        return self._whole([self._choice(choice) for choice in choices], usage)

    def event(self, delta: ChoiceDelta) -> bytes:
        event = self._event(self._event_choice(delta))
        if self._begun[delta.index]:
            return event
        self._begun[delta.index] = True
        begin = ChatDelta(role="assistant", content="")
        return self._event(ChatEventChoice(delta.index, begin, None, None, None)) + event

    def _choice(self, whole: ChoiceDelta) -> ChatChoice:
        return ChatChoice(
            index=whole.index,
            message=ChatMessage(whole.text),
            logprobs=self._chat_logprobs(whole.logprobs),
            finish_reason=whole.finish_reason,
            stop_reason=whole.stop_reason,
            seed=self._seeds[whole.index],
        )

    def _event_choice(self, delta: ChoiceDelta) -> ChatEventChoice:
        ended = delta.finish_reason is not None
        return ChatEventChoice(
            index=delta.index,
            delta=ChatDelta() if ended and not delta.text else ChatDelta(content=delta.text),
            logprobs=self._chat_logprobs(delta.logprobs),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            seed=self._seeds[delta.index] if ended else UNSET,
        )

    def _chat_logprobs(self, entries: list[TokenLogprob] | None) -> ChatLogprobs | None:
        return None if entries is None else ChatLogprobs([self._chat_token(entry) for entry in entries])

    def _chat_token(self, entry: TokenLogprob) -> ChatToken:
        top = [TokenAlternative(each.text, each.logprob, self._bytes(each.id)) for each in entry.top]
        return ChatToken(entry.text, entry.logprob, self._bytes(entry.id), top)

    def _bytes(self, token_id: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token_id))
