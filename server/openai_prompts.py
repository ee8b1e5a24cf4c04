"""OpenAI's bodies as prompts. Knows a model, but no server, as `server.prompts`."""

from __future__ import annotations

from dataclasses import replace

from model.chat_template import ChatTemplate, render_chat
from model.errors import TokenizerError
from model.grammar import Grammar
from server.errors import InvalidRequestError
from server.grammars import openai_grammar
from server.prompts import (
    Prompt,
    ServedModel,
    check_count,
    check_grammar,
    echo_text,
    encode_prompts,
    make_prompt,
    off_loop,
)
from server.schemas.openai import ChatCompletionRequest, CompletionRequest, Message, OpenAIFields

_MESSAGE_COST = 100  # characters that take a template as long as a message without any


async def completion_prompts(body: CompletionRequest, model: ServedModel, arrival: float) -> list[Prompt]:
    """The prompts of POST /v1/completions; `arrival` as in `make_prompt`. Raises InvalidRequestError."""
    _refuse_unsupported(body)
    if body.best_of is not None and body.best_of != body.n:
        raise InvalidRequestError(
            "best_of must be equal to n: every answer that is generated is returned", param="best_of"
        )
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequestError("max_tokens must be at least 1 without echo", param="max_tokens")
    check_count(len(body.prompts), body.n, model)
    grammar = await _grammar(body, model)
    encoded = await encode_prompts(body.prompts, model.tokenizer)
    return [
        make_prompt(
            token_ids, body, body.max_tokens, model if index == 0 else replace(model, seed=None),
            arrival=arrival, logprobs=body.logprobs, echo=echo_text(prompt, model.tokenizer) if body.echo else "",
            prompt_logprobs=_prompt_logprobs(body), grammar=grammar,
        )
        for index, (prompt, token_ids) in enumerate(zip(body.prompts, encoded, strict=True))
    ]  # fmt: skip


async def _grammar(body: OpenAIFields, model: ServedModel) -> Grammar | None:
    found = openai_grammar(body)
    if found is None:
        return None
    field, grammar = found
    await check_grammar(grammar, field, model)
    return grammar


def _prompt_logprobs(body: CompletionRequest) -> int | None:
    """`echo` with `logprobs` tells those of the prompt too. A request that generates nothing scores, asked or not."""
    return (body.logprobs or 0) if body.echo and (body.logprobs is not None or body.max_tokens == 0) else None


async def chat_prompt(body: ChatCompletionRequest, model: ServedModel, arrival: float) -> Prompt:
    """The prompt of POST /v1/chat/completions: the conversation in the model's own template.

    Raises InvalidRequestError, with the code `no_chat_template` where the model has none.
    """
    _refuse_unsupported(body)
    if model.chat_template is None:
        message = "the model served here has no chat template; send its prompt to POST /v1/completions"
        raise InvalidRequestError(message, code="no_chat_template", param="messages")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    check_count(1, body.n, model)
    grammar = await _grammar(body, model)
    token_ids = await _conversation_ids(body, model.chat_template, model)
    newer = body.max_completion_tokens is not None
    return make_prompt(
        token_ids,
        body,
        body.max_completion_tokens if newer else body.max_tokens,
        model,
        arrival=arrival,
        logprobs=body.top_logprobs if body.logprobs else None,
        grammar=grammar,
        prompt_field="messages",
        max_tokens_field="max_completion_tokens" if newer else "max_tokens",
    )


def _refuse_unsupported(body: OpenAIFields) -> None:
    given = body.model_extra or {}
    for name, (neutral, rule) in body.unsupported.items():
        if given.get(name) is not None and given[name] not in neutral:
            raise InvalidRequestError(f"{name} {rule}", param=name)
    if "stream_options" in body.model_fields_set and not body.stream:
        raise InvalidRequestError("stream_options needs stream to be true", param="stream_options")


async def _conversation_ids(body: ChatCompletionRequest, template: ChatTemplate, model: ServedModel) -> list[int]:
    messages = [_plain_message(index, message) for index, message in enumerate(body.messages)]
    size = sum(_MESSAGE_COST + len(message["content"]) for message in messages)
    return await off_loop(size, lambda: _encode_conversation(body, messages, template, model))


def _plain_message(index: int, given: Message) -> dict[str, str]:
    """What a template of a text model reads. OpenAI calls the system's role `developer` since its reasoning models."""
    extra = given.model_extra or {}
    if extra.get("tool_calls") or extra.get("function_call"):
        message = f"messages[{index}] has tool calls, which are not supported here"
        raise InvalidRequestError(message, param=f"messages[{index}]")
    if given.text is None:
        raise InvalidRequestError(f"messages[{index}].content is required", param=f"messages[{index}].content")
    role = "system" if given.role == "developer" else given.role
    named = {} if given.name is None else {"name": given.name}
    return {"role": role, "content": given.text, **named}


def _encode_conversation(
    body: ChatCompletionRequest, messages: list[dict[str, str]], template: ChatTemplate, model: ServedModel
) -> list[int]:
    if body.continue_final_message and body.add_generation_prompt:
        message = "continue_final_message needs add_generation_prompt to be false"
        raise InvalidRequestError(message, param="continue_final_message")
    try:
        text = render_chat(
            template,
            messages,
            add_generation_prompt=body.add_generation_prompt,
            forbidden=model.tokenizer.special_tokens,
            variables=body.chat_template_kwargs,
        )
    except TokenizerError as error:  # its sentences name a message by its place
        raise InvalidRequestError(str(error), param="messages") from None
    if body.continue_final_message:
        text = _open_ended(text, messages[-1]["content"])
    try:
        token_ids = model.tokenizer.encode_template(text)
    except TokenizerError:
        message = "messages hold characters that this model's tokenizer does not know"
        raise InvalidRequestError(message, param="messages") from None
    if not token_ids:
        raise InvalidRequestError("messages must not be empty in this model's chat template", param="messages")
    return token_ids


def _open_ended(text: str, content: str) -> str:
    """A conversation cut after its last message's content, which templates write as it is or without its margins."""
    for written in (content, content.strip()):
        start = text.rfind(written)
        if written and start >= 0:
            return text[: start + len(written)]
    message = "continue_final_message needs a last message whose content the chat template writes as it is"
    raise InvalidRequestError(message, param="continue_final_message")
