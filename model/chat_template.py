"""A checkpoint's own chat template: messages to the one text that the model was trained on. Free of torch.

    template = load_chat_template(Path("models/chat"))
    ids = tokenizer.encode_template(render_chat(template, messages))

Templates are Jinja, in the dialect of `transformers`, and run in Jinja's sandbox. They come from the model's folder
only: a template in a request could keep a worker busy for ever.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from model.errors import TokenizerError
from model.tokenizer.files import CONFIG_FILE, read_config

if TYPE_CHECKING:
    import jinja2

TEMPLATE_FILE = "chat_template.jinja"
_MAX_TEMPLATE_BYTES = 2**20
_MISFIT = "messages do not fit this model's chat template; check the order and the names of the roles"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template's source and the texts of the special tokens that it may write."""

    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a checkpoint folder, from chat_template.jinja or tokenizer_config.json; None if it has none.

    Raises TokenizerError, naming the file, for one that cannot be read or is not a template.
    """
    config = read_config(folder)
    path = folder / TEMPLATE_FILE
    source = _read_text(path) if path.is_file() else _default_template(config.get("chat_template"))
    if source is None:
        return None
    template = ChatTemplate(source, tuple(_special_tokens(config)))
    _compile(template.source)
    return template


def render_chat(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, object]],
    *,
    add_generation_prompt: bool = True,
    forbidden: Iterable[str] = (),
    variables: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """The text of a conversation; `add_generation_prompt` ends it with the start of the assistant's answer.

    `variables` are further ones that the template reads, such as Qwen3's `enable_thinking`; those above go first.
    Texts in `forbidden` (the tokenizer's special tokens) may not stand in a message or a variable: `encode_template`
    would take them for the end of a turn. Raises TokenizerError for such and for what the template refuses.
    """
    tokens = tuple(forbidden)
    for index, message in enumerate(messages):
        _refuse_control_tokens(f"messages[{index}]", message, tokens)
    _refuse_control_tokens("a variable of the template", variables, tokens)
    compiled = _compile(template.source)
    try:
        return compiled.render(
            {
                **variables,
                **dict(template.special_tokens),
                "messages": [dict(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
            }
        )
    except Exception as problem:  # whatever code of the template's went wrong on these messages
        raise TokenizerError(_MISFIT) from problem


def _refuse_control_tokens(name: str, values: Mapping[str, object], tokens: Sequence[str]) -> None:
    for value in values.values():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if any(token in text for token in tokens):
            raise TokenizerError(f"{name} holds a control token of this model; remove it")


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise TokenizerError(f"{path.name} is larger than {_MAX_TEMPLATE_BYTES >> 20} MiB; use the model's own")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise TokenizerError(f"{path.name} cannot be read as UTF-8 text; restore it from its source") from problem


def _default_template(value: object) -> str | None:
    """The template in tokenizer_config.json: a string, or a list of named ones of which `default` counts."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{CONFIG_FILE}: chat_template must be a string; restore the file from its source")
    return value


def _special_tokens(config: Mapping[str, object]) -> Iterable[tuple[str, str]]:
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            yield key, content


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError, MemoryError, ValueError) as problem:
        raise TokenizerError("the model's chat template is not valid Jinja; restore it from its source") from problem


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}` marks the assistant's words for training; here its body stands as it is."""

        tags = {"generation"}  # noqa: RUF012  (Jinja reads it from the class)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    return environment


def _to_json(
    value: object, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """JSON as it is: Jinja's own filter would escape what HTML minds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
