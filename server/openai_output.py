"""Generations as the answers and events of OpenAI's routes."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from model.tokenizer import Tokenizer
from server.errors import ApiError
from server.generation import Generation
from server.openai_errors import openai_error_body
from server.openai_logprobs import LogprobsWriter
from server.openai_shapes import (
    Body,
    CachedTokens,
    ChatChoice,
    ChatDelta,
    ChatEventChoice,
    ChatLogprobs,
    ChatMessage,
    ChatToken,
    Choice,
    CompletionChoice,
    TokenAlternative,
    Usage,
)
from server.output import ChoiceDelta, TokenLogprob
from server.output import Usage as NativeUsage
from server.schemas.openai import OpenAIFields
from server.sse import DONE, data_event


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


def _usage(native: NativeUsage) -> Usage:
    prompt, completion = native.prompt_tokens, native.completion_tokens
    return Usage(prompt, completion, prompt + completion, CachedTokens(native.cached_tokens))


class _Format:
    """What both routes share; `include_usage` asks for an event with the usage, and null in those before it."""

    _answer_name: str
    _event_name: str

    def __init__(self, source: AnswerSource, generation: Generation, tokenizer: Tokenizer, body: OpenAIFields) -> None:
        self._source = source
        self._fingerprint = source.fingerprint
        self._prompts = generation.prompts
        self._seeds = generation.seeds
        self._tokenizer = tokenizer
        self._event_usage = None if body.include_usage else UNSET
        self._with_ids = body.return_token_ids
        self._begun = [False for _ in generation.choices]

    def end(self, generation: Generation) -> bytes:
        if self._event_usage is UNSET:
            return DONE
        last = self._body(self._event_name, [], _usage(generation.usage), self._source.provenance)
        return data_event(last) + DONE

    def error(self, error: ApiError, request_id: str) -> bytes:
        """An event without a name: OpenAI's clients look for the field `error` in every event."""
        return b"data: " + openai_error_body(error) + b"\n\n"

    def _body(
        self, name: str, choices: list[Choice], usage: Usage | UnsetType | None,
        provenance: dict[str, object] | UnsetType = UNSET, prompt_ids: list[int] | UnsetType = UNSET,
    ) -> Body:  # fmt: skip
        source = self._source
        return Body(
            source.id, name, source.created, source.model, choices, self._fingerprint, usage, provenance, prompt_ids
        )

    def _begins(self, index: int) -> bool:
        """Whether this is the first that is told of a choice."""
        begins = not self._begun[index]
        self._begun[index] = True
        return begins

    def _ids(self, delta: ChoiceDelta) -> list[int] | UnsetType:
        return delta.token_ids if self._with_ids else UNSET

    def _whole(self, choices: list[Choice], usage: NativeUsage, prompt_ids: list[int] | UnsetType = UNSET) -> bytes:
        body = self._body(self._answer_name, choices, _usage(usage), self._source.provenance, prompt_ids)
        return msgspec.json.encode(body)

    def _event(self, choice: Choice, prompt_ids: list[int] | UnsetType = UNSET) -> bytes:
        return data_event(self._body(self._event_name, [choice], self._event_usage, UNSET, prompt_ids))


class CompletionFormat(_Format):
    """POST /v1/completions, whose events and whole answers have one shape."""

    _answer_name = _event_name = "text_completion"

    def __init__(self, source: AnswerSource, generation: Generation, tokenizer: Tokenizer, body: OpenAIFields) -> None:
        super().__init__(source, generation, tokenizer, body)
        self._logprobs = [LogprobsWriter(prompt, tokenizer) for prompt in generation.prompts for _ in range(prompt.n)]

    def answer(self, choices: list[ChoiceDelta], usage: NativeUsage) -> bytes:
        return self._whole([self._choice(choice) for choice in choices], usage)

    def event(self, delta: ChoiceDelta) -> bytes:
        return self._event(self._choice(delta))

    def _choice(self, delta: ChoiceDelta) -> CompletionChoice:
        prompt = self._prompts[delta.index // self._prompts[0].n]
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._logprobs[delta.index].take(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            seed=UNSET if delta.finish_reason is None else self._seeds[delta.index],
            token_ids=self._ids(delta),
            prompt_token_ids=prompt.token_ids if self._with_ids and self._begins(delta.index) else UNSET,
        )


class ChatFormat(_Format):
    """POST /v1/chat/completions. A choice's first event names the role, the others add text."""

    _answer_name = "chat.completion"
    _event_name = "chat.completion.chunk"

    def answer(self, choices: list[ChoiceDelta], usage: NativeUsage) -> bytes:
        return self._whole([self._choice(choice) for choice in choices], usage, self._prompt_ids)

    def event(self, delta: ChoiceDelta) -> bytes:
        event = self._event(self._event_choice(delta))
        if not self._begins(delta.index):
            return event
        begin = ChatDelta(role="assistant", content="")
        return self._event(ChatEventChoice(delta.index, begin, None, None, None), self._prompt_ids) + event

    @property
    def _prompt_ids(self) -> list[int] | UnsetType:
        return self._prompts[0].token_ids if self._with_ids else UNSET

    def _choice(self, whole: ChoiceDelta) -> ChatChoice:
        return ChatChoice(
            index=whole.index,
            message=ChatMessage(whole.text),
            logprobs=self._chat_logprobs(whole.logprobs),
            finish_reason=whole.finish_reason,
            stop_reason=whole.stop_reason,
            seed=self._seeds[whole.index],
            token_ids=self._ids(whole),
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
            token_ids=self._ids(delta),
        )

    def _chat_logprobs(self, entries: list[TokenLogprob] | None) -> ChatLogprobs | None:
        return None if entries is None else ChatLogprobs([self._chat_token(entry) for entry in entries])

    def _chat_token(self, entry: TokenLogprob) -> ChatToken:
        top = [TokenAlternative(each.text, each.logprob, self._bytes(each.id)) for each in entry.top]
        return ChatToken(entry.text, entry.logprob, self._bytes(entry.id), top)

    def _bytes(self, token_id: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token_id))
