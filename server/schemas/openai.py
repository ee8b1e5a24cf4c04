"""Bodies of OpenAI's routes, with the further sampling fields that vLLM's clients send.

As there, null means a field's default and unknown fields are ignored. Those that are known and would change the
answer, but are not honoured here, are in `unsupported`: a request that uses one is refused rather than answered wrong.
Each field's description is also the rule that its error message states.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.sampling_params import MAX_LOGPROBS
from server.schemas.sampling import MAX_TOKEN_ID, SamplingFields, TokenId

MAX_PROMPTS = 1024
MAX_MESSAGES = 2048
MAX_ROLE_LENGTH = 64
MAX_TEMPLATE_VARIABLES = 64

# fail_fast: a body of a megabyte can hold half a million faults, of which the first is told.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
ManyTokenIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]

Unsupported = dict[str, tuple[tuple[object, ...], str]]
"""Name of a field → its values that ask for nothing, and the rule for the rest."""

_NONE: tuple[object, ...] = (False, [], {}, "")
_REFUSED = "is not supported here; leave it out"
_UNSUPPORTED: Unsupported = {
    "use_beam_search": (_NONE, "must be false: this server samples"),
    "prompt_logprobs": ((), "is not supported here; use echo with logprobs on POST /v1/completions"),
    "truncate_prompt_tokens": ((), "is not supported here; send a shorter prompt"),
    "include_stop_str_in_output": (_NONE, "must be false: stop strings are not part of the text"),
    "skip_special_tokens": ((True,), "must be true: special tokens are not part of the text"),
    "allowed_token_ids": (_NONE, _REFUSED),
    "bad_words": (_NONE, "is not supported here; use logit_bias"),
    "logits_processors": (_NONE, _REFUSED),
    "prompt_embeds": (_NONE, "is not supported here; send text or token ids"),
    "return_tokens_as_token_ids": (_NONE, "must be false; use return_token_ids"),
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool | None = Field(default=False, description="true or false")


class OpenAIFields(SamplingFields):
    """What both routes take."""

    model_config = ConfigDict(extra="allow")

    unsupported: ClassVar[Unsupported] = _UNSUPPORTED

    stream_options: StreamOptions = Field(
        StreamOptions(), description='an object such as {"include_usage": true}, with stream'
    )

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        """Without nulls (but for max_tokens, where it is the rest of the context), and with vLLM's -1 for a top_k
        that is off."""
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if value is not None or name == "max_tokens"}
        top_k = kept.get("top_k")
        return kept | {"top_k": 0} if type(top_k) is int and top_k == -1 else kept

    return_token_ids: bool = Field(False, description="true or false")

    response_format: Any = Field(None, description="an object with the type text, json_object or json_schema")
    structured_outputs: Any = Field(None, description="an object with one of json, regex, choice, grammar, json_object")
    guided_json: Any = Field(None, description="an object that holds a JSON schema")
    guided_regex: Any = Field(None, description="a regular expression")
    guided_choice: Any = Field(None, description="a list of strings")
    guided_grammar: Any = Field(None, description="the text of a Lark grammar")

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options.include_usage)


class _CompletionPrompt(BaseModel):
    prompt: str | TokenIds | Texts | ManyTokenIds = Field(
        description=f"a string, a non-empty list of token ids, or a list of 1 to {MAX_PROMPTS} of either"
    )
    max_tokens: int | None = Field(
        16,
        ge=0,
        le=MAX_TOKEN_ID,
        description="an integer of at least 1 (or 0, with echo), or null for the rest of the context",
    )


# pydantic lists the fields of the last base first: the prompt belongs at the top.
class CompletionRequest(OpenAIFields, _CompletionPrompt):
    unsupported: ClassVar[Unsupported] = _UNSUPPORTED | {
        "suffix": (("",), "is not supported here: the model continues texts and fills no gaps"),
        "add_special_tokens": ((True,), "must be true; send token ids for a prompt without special tokens"),
    }

    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description=f"an integer from 0 to {MAX_LOGPROBS}")
    echo: bool = Field(False, description="true or false")
    best_of: int | None = Field(None, description="equal to n: every answer that is generated is returned")

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [*self.prompt] if isinstance(self.prompt[0], str | list) else [self.prompt]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    role: str = Field(
        min_length=1, max_length=MAX_ROLE_LENGTH, description=f"a string of 1 to {MAX_ROLE_LENGTH} characters"
    )
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = Field(
        None, description='a string or a list of text parts, {"type": "text", "text": …}'
    )
    name: str | None = Field(
        None, max_length=MAX_ROLE_LENGTH, description=f"a string of up to {MAX_ROLE_LENGTH} characters"
    )

    @property
    def text(self) -> str | None:
        """The content as one string, its parts on lines of their own as in vLLM; None if there is none."""
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class _Conversation(BaseModel):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        description=f"a list of 1 to {MAX_MESSAGES} objects, each with a role and a content"
    )
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKEN_ID, description="an integer of at least 1, or null for the rest of the context"
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKEN_ID, description="an integer of at least 1; it goes before max_tokens"
    )


class ChatCompletionRequest(OpenAIFields, _Conversation):
    """`add_generation_prompt` starts an answer; `continue_final_message` goes on with the last message instead."""

    unsupported: ClassVar[Unsupported] = _UNSUPPORTED | {
        "tools": (_NONE, "is not supported here: this model calls no tools"),
        "tool_choice": (("none", "auto"), 'must be "none" or "auto": this model calls no tools'),
        "functions": (_NONE, "is not supported here: this model calls no functions"),
        "function_call": (("none", "auto"), 'must be "none" or "auto": this model calls no functions'),
        "modalities": ((["text"], []), 'must be ["text"]: this model writes text'),
        "audio": (_NONE, _REFUSED),
        "web_search_options": (_NONE, _REFUSED),
        "chat_template": (_NONE, "is not taken from requests: the model's own is used"),
        "documents": (_NONE, "is not supported here; put their text into messages"),
        "add_special_tokens": (_NONE, "must be false: the chat template writes the special tokens"),
        "echo": (_NONE, "must be false; it belongs to POST /v1/completions"),
    }

    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int = Field(
        0, ge=0, le=MAX_LOGPROBS, description=f"an integer from 0 to {MAX_LOGPROBS}, with logprobs true"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, max_length=MAX_TEMPLATE_VARIABLES, description="an object of variables for the chat template"
    )
    add_generation_prompt: bool = Field(True, description="true or false")
    continue_final_message: bool = Field(False, description="true or false; true needs add_generation_prompt false")
