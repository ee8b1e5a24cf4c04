"""Answers and events in OpenAI's shapes.

Fields that OpenAI has not: `seed` and `provenance`; from vLLM `stop_reason` and, where they are asked for, the ids of
the tokens behind a text.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


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
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


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
    token_ids: list[int] | UnsetType = UNSET


class ChatEventChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    seed: int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


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
    prompt_token_ids: list[int] | UnsetType = UNSET
