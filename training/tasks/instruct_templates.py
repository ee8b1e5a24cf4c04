"""Chat templates that instruction tuning writes with, in the Jinja dialect of `model.chat_template`. Free of torch.

`alpaca` is the format of Stanford's Alpaca (Taori et al. 2023), whose fixed sentences are part of it; a system message
is the instruction and the user's its input. Later turns repeat the sections. `chat` names each speaker on a line.
"""

from __future__ import annotations

import json
from pathlib import Path

from model.chat_template import TEMPLATE_FILE, ChatTemplate, load_chat_template
from model.tokenizer import Tokenizer
from training.errors import RecipeError

_ALPACA = r"""
{{- BOS }}
{%- set ns = namespace(instruction='', begun=false) %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.last %}
        {%- set ns.instruction = message.content | trim %}
    {%- elif message.role == 'user' %}
        {%- if not ns.begun %}
            {{- 'Below is an instruction that describes a task' }}
            {{- ', paired with an input that provides further context' if ns.instruction }}
            {{- '. Write a response that appropriately completes the request.' }}
            {%- set ns.begun = true %}
        {%- endif %}
        {%- if ns.instruction %}
            {{- '\n\n### Instruction:\n' + ns.instruction + '\n\n### Input:\n' + message.content | trim }}
            {%- set ns.instruction = '' %}
        {%- else %}
            {{- '\n\n### Instruction:\n' + message.content | trim }}
        {%- endif %}
    {%- elif message.role == 'assistant' and ns.begun %}
        {{- '\n\n### Response:\n' + message.content | trim + EOS }}
    {%- else %}
        {{- raise_exception('a conversation begins with system or user and goes on with user and assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\n\n### Response:\n' }}
{%- endif %}
"""
_CHAT = r"""
{{- BOS }}
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('roles are system, user and assistant') }}
    {%- endif %}
    {{- '### ' + message.role | capitalize + ':\n' + message.content | trim }}
    {{- EOS if message.role == 'assistant' }}
    {{- '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Assistant:\n' }}
{%- endif %}
"""
_SOURCES = {"alpaca": _ALPACA, "chat": _CHAT}


def write_template(name: str, tokenizer: Tokenizer, folder: Path) -> ChatTemplate:
    """The template `name`, written into the folder of the saved tokenizer, from where it goes into checkpoints.

    Under the name `chat` a folder that has a template of its own keeps it. Raises RecipeError for a tokenizer without
    an end-of-text token, with which answers could not end.
    """
    own = load_chat_template(folder) if name == "chat" else None
    if own is not None:
        return own
    if tokenizer.eos_token_id is None:
        raise RecipeError("the tokenizer has no end-of-text token, so that answers could not end; use another model")
    # Written out, for a template would otherwise need tokenizer_config.json to name the tokens.
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    source = _SOURCES[name].replace("BOS", _literal(tokenizer, tokenizer.bos_token_id if begins else None))
    source = source.replace("EOS", _literal(tokenizer, tokenizer.eos_token_id)).lstrip("\n")
    (folder / TEMPLATE_FILE).write_text(source, encoding="utf-8")
    template = load_chat_template(folder)
    assert template is not None
    return template


def _literal(tokenizer: Tokenizer, token_id: int | None) -> str:
    """A special token's text as a Jinja string."""
    return json.dumps("" if token_id is None else tokenizer.token_bytes(token_id).decode())
