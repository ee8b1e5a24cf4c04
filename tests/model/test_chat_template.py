"""Chat templates against transformers, which runs the same dialect."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from model.chat_template import ChatTemplate, load_chat_template, render_chat
from model.errors import TokenizerError
from model.tokenizer import Tokenizer

CHAT_ML = """\
{%- for message in messages %}
    {%- if loop.index0 == 0 and message['role'] == 'assistant' %}
        {{- raise_exception('an assistant cannot open: ' + message['content']) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}{{ message.content | trim }}{% endgeneration %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
TURNS = """\
{{ bos_token }}{% set ns = namespace(count=0) %}
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
  {% set ns.count = ns.count + 1 %}
[{{ ns.count }}] {{ message | tojson }} {{ message.content | upper }}{{ eos_token }}
{% endfor %}
"""
MESSAGES = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "What is <b>2</b> & 'three' — नमस्ते?"},
    {"role": "assistant", "content": "  five\n"},
]


@pytest.fixture
def folder(tmp_path):
    Tokenizer.bytes().save(tmp_path)
    return tmp_path


def set_config(folder, **values):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("source", [CHAT_ML, TURNS])
@pytest.mark.parametrize("place", ["file", "config", "named"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_conversation_is_rendered_as_transformers_does(source, place, add_generation_prompt, folder):
    if place == "file":
        (folder / "chat_template.jinja").write_text(source)
    elif place == "config":
        set_config(folder, chat_template=source)
    else:
        others = {"name": "tool_use", "template": "never"}
        set_config(folder, chat_template=[others, {"name": "default", "template": source}])
    template = load_chat_template(folder)
    assert template is not None
    text = render_chat(template, MESSAGES, add_generation_prompt=add_generation_prompt)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert text == theirs.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert "नमस्ते" in text


def test_most_models_have_none(folder):
    assert load_chat_template(folder) is None


def test_control_tokens_of_the_template_become_ids_and_those_of_users_are_refused(folder):
    (folder / "chat_template.jinja").write_text(TURNS)
    template, tokenizer = load_chat_template(folder), Tokenizer.load(folder)
    assert template is not None
    ids = tokenizer.encode_template(render_chat(template, MESSAGES[1:2], forbidden=tokenizer.special_tokens))
    assert [i for i in ids if i >= 256] == [256, 256]
    for content in ("a<|endoftext|>b", ["<|endoftext|>"]):
        with pytest.raises(TokenizerError, match=r"^messages\[1\] holds a control token"):
            render_chat(
                template, [MESSAGES[0], {"role": "user", "content": content}], forbidden=tokenizer.special_tokens
            )


@pytest.mark.parametrize("messages", [MESSAGES[2:], [{"content": 3}], [{"role": 1, "content": "x"}]])
def test_messages_that_the_template_refuses_are_not_echoed(messages):
    with pytest.raises(TokenizerError, match=r"^messages do not fit this model's chat template; check [a-z ]+$"):
        render_chat(ChatTemplate(CHAT_ML), messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages.append(1) }}",
        "{{ self._TemplateReference__context.environment }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_stays_in_its_sandbox(source):
    with pytest.raises(TokenizerError, match="do not fit"):
        render_chat(ChatTemplate(source), MESSAGES)


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% generation %}", "{% nonsense %}", "{{" + "(" * 5_000])
def test_a_malformed_template_is_refused_at_load(source, folder):
    (folder / "chat_template.jinja").write_text(source)
    with pytest.raises(TokenizerError, match="chat template is not valid Jinja"):
        load_chat_template(folder)


def test_unreadable_templates_are_refused_by_name(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"^chat_template\.jinja cannot be read as UTF-8"):
        load_chat_template(folder)
    (folder / "chat_template.jinja").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(TokenizerError, match=r"^chat_template\.jinja is larger than"):
        load_chat_template(folder)
    (folder / "chat_template.jinja").unlink()
    set_config(folder, chat_template=7)
    with pytest.raises(TokenizerError, match=r"^tokenizer_config\.json: chat_template must be a string"):
        load_chat_template(folder)
