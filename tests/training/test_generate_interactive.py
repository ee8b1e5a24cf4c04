"""Conversations in the terminal: commands, contexts that are cut, answers that are stopped."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model.chat_template import ChatTemplate
from model.errors import TokenizerError
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from tests.training.tiny_models import save_tiny_model
from training.errors import RecipeError
from training.generate import TextGenerator
from training.generation import terminal
from training.generation.dialogue import Chat, Completion
from training.generation.repl import HELP, Repl
from training.generation.settings import Settings

BYTES = Tokenizer.bytes()
TEMPLATE = ChatTemplate(
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "llama", context=64)


@pytest.fixture(scope="module")
def generator(folder: Path) -> TextGenerator:
    return TextGenerator.load(folder, device="cpu")


class TestCompletion:
    def test_each_line_is_a_prompt_of_its_own(self) -> None:
        dialogue = Completion(BYTES, 64)
        assert dialogue.ask("ab", 8) == [97, 98]
        dialogue.answered("c", [99])
        assert dialogue.ask("d", 8) == [100]

    def test_an_empty_line_goes_on_with_the_last_text(self) -> None:
        dialogue = Completion(BYTES, 64)
        assert dialogue.ask("", 8) == [256]
        dialogue.answered("c", [99])
        assert dialogue.ask("", 8) == [256, 99]
        dialogue.reset()
        assert dialogue.ask("", 8) == [256]

    def test_the_oldest_tokens_are_cut_and_controls_stay(self) -> None:
        dialogue = Completion(BYTES, 16, prefix=[256, 200])
        assert dialogue.ask("abcdefghijklmnop", 6) == [256, 200, *b"ijklmnop"]
        dialogue.answered("q", [113])
        assert dialogue.ask("", 6) == [256, 200, *b"jklmnopq"]
        assert len(dialogue.ask("", 1000)) == 8  # half of the context is left to the prompt


class TestChat:
    def test_turns_follow_one_another(self) -> None:
        chat = Chat(BYTES, TEMPLATE, 64, system="be brief")
        assert BYTES.decode(chat.ask("hi", 8)) == "<s>be brief<u>hi<a>"
        chat.answered("yo", [121, 111])
        assert BYTES.decode(chat.ask("so?", 8)) == "<s>be brief<u>hi<a>yo<u>so?<a>"
        chat.reset()
        assert BYTES.decode(chat.ask("new", 8)) == "<s>be brief<u>new<a>"

    def test_a_question_without_an_answer_is_forgotten(self) -> None:
        chat = Chat(BYTES, TEMPLATE, 64)
        chat.ask("first", 8)
        assert BYTES.decode(chat.ask("second", 8)) == "<u>second<a>"

    def test_the_oldest_turns_are_cut_and_the_system_message_stays(self) -> None:
        chat = Chat(BYTES, TEMPLATE, 64, system="s")
        for number in range(9):
            ids = chat.ask(f"question {number}", 20)
            assert len(ids) <= 44
            text = BYTES.decode(ids)
            assert text.startswith("<s>s<u>question ")
            assert text.endswith(f"<u>question {number}<a>")
            chat.answered(f"answer {number}", [1])
        assert text == "<s>s<u>question 7<a>answer 7<u>question 8<a>"

    def test_a_long_message_may_use_the_answers_room_but_not_all(self) -> None:
        chat = Chat(BYTES, TEMPLATE, 64)
        assert len(chat.ask("x" * 50, 32)) == 56
        with pytest.raises(RecipeError, match="the message has 76 tokens and must leave room in the context of 64"):
            chat.ask("x" * 70, 32)

    def test_what_cannot_be_a_message_is_refused(self) -> None:
        chat = Chat(BYTES, TEMPLATE, 64)
        with pytest.raises(RecipeError, match="an empty message"):
            chat.ask("", 8)
        with pytest.raises(TokenizerError, match="control token"):
            chat.ask("<|endoftext|>", 8)


def converse(
    generator: TextGenerator,
    lines: list[str | type[BaseException]],
    capsys: pytest.CaptureFixture[str],
    **params: object,
) -> str:
    """What is printed for these lines; an exception among them is raised when it is read."""
    rest = iter(lines)

    def read() -> str:
        line = next(rest, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    settings = Settings(SamplingParams(max_tokens=5, ignore_eos=True, **params))  # type: ignore[arg-type]
    Repl(generator, Completion(generator.tokenizer, generator.max_seq_len), settings, read).run()
    return capsys.readouterr().out


def text_of(generator: TextGenerator, prompt: str, **params: object) -> str:
    values = {"max_tokens": 5, "ignore_eos": True} | params
    [[sample]] = generator.generate([prompt], SamplingParams(**values))  # type: ignore[arg-type]
    return sample.text


def test_answers_take_one_seed_after_the_other(generator: TextGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    out = converse(generator, ["ink", "ink", "/seed 0", "ink", "//x"], capsys)
    texts = [text_of(generator, "ink", seed=seed) for seed in (0, 1)]
    assert out == "".join(f"{text}\n" for text in (*texts, texts[0], text_of(generator, "/x", seed=1)))


def test_settings_change_what_follows(generator: TextGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str | type[BaseException]] = [
        "/set temperature=0", "/set top-k 7", "/set ignore_eos = off", "/set",
        "/set max_tokens=3", "/set ignore_eos=on", "ink",
    ]  # fmt: skip
    shown, _, answer = converse(generator, lines, capsys).partition("\n")
    assert "temperature=0.0 top_k=7" in shown
    assert "ignore_eos=False seed=0 stop=[]" in shown
    assert answer == text_of(generator, "ink", temperature=0.0, max_tokens=3) + "\n"


def test_a_stop_string_can_be_set(generator: TextGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    whole = text_of(generator, "ink", max_tokens=40)
    stop = next(c for c in whole[2:] if c.isprintable() and c not in " \ufffd=")
    out = converse(generator, [f"/set stop={stop}", "/set max_tokens=40", "ink", "/set stop=", "/set"], capsys)
    assert out.startswith(whole[: whole.index(stop)] + "\n")
    assert out.endswith("stop=[]\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "/nothing is no command; /help lists them"),
        ("/set colour=red", "setting 'colour' is unknown; choose among temperature"),
        ("/set temperature=warm", "temperature is 'warm' but must be a number"),
        ("/set top_k=1.5", "top_k is '1.5' but must be a whole number"),
        ("/set ignore_eos=perhaps", "ignore_eos is 'perhaps' but must be on or off"),
        ("/set temperature=9", "temperature must lie in [0, 2]"),
        ("/seed", "seed is '' but must be a whole number"),
        ("\ud800", "the text holds the lone surrogate"),
    ],
)
def test_a_mistake_is_told_and_the_conversation_goes_on(
    line: str, message: str, generator: TextGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    out = converse(generator, [line, "ink"], capsys)
    assert out.startswith(f"error: {message}")
    assert out.splitlines()[1:] == text_of(generator, "ink").splitlines()


def test_help_quit_and_reset(generator: TextGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    out = converse(generator, ["/help", "x", "/reset", "", "/quit", "never read"], capsys)
    assert out == f"{HELP}\n{text_of(generator, 'x')}\nforgotten\n{text_of(generator, '', seed=1)}\n"


def test_ctrl_c_stops_an_answer_and_not_the_program(
    generator: TextGenerator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = generator.stream

    def interrupted(*args: object, **options: object) -> Iterator[object]:
        for number, delta in enumerate(original(*args, **options)):  # type: ignore[arg-type]
            yield delta
            if number == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(generator, "stream", interrupted)
    out = converse(generator, ["ink"], capsys)
    monkeypatch.setattr(generator, "stream", original)
    assert out == text_of(generator, "ink", max_tokens=2) + " [stopped]\n"


def test_what_was_written_before_ctrl_c_is_gone_on_with(
    generator: TextGenerator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    original = generator.stream

    def once_interrupted(ids: list[int], params: SamplingParams, **options: object) -> Iterator[object]:
        asked.append(list(ids))
        for delta in original(ids, params, stop=()):
            yield delta
            if len(asked) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(generator, "stream", once_interrupted)
    converse(generator, ["ink", ""], capsys)
    assert asked[0] == list(b"ink")
    assert asked[1][:3] == asked[0]
    assert len(asked[1]) == 4


def test_ctrl_c_at_the_prompt_leaves_nothing(generator: TextGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    out = converse(generator, [KeyboardInterrupt, "ink"], capsys)
    assert out == f"\n/quit or Ctrl-D leaves\n{text_of(generator, 'ink')}\n"


@pytest.fixture
def piped(printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `generate CHECKPOINT --interactive` prints for lines on its standard input."""

    def run(checkpoint: Path, lines: str, *args: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        options = ("--interactive", "--max-tokens", 5, "--ignore-eos", "--device", "cpu")
        return printed("generate", checkpoint, *options, *args)

    return run


def test_a_checkpoint_with_a_template_chats(
    piped: Callable[..., str], tmp_path: Path, generator: TextGenerator
) -> None:
    chat = save_tiny_model(tmp_path / "chat", "llama", context=64)
    (chat / "chat_template.jinja").write_text(TEMPLATE.source)
    first = text_of(generator, "<s>be<u>hi<a>", temperature=0.0)
    second = text_of(generator, f"<s>be<u>hi<a>{first}<u>so<a>", temperature=0.0)
    options = ("--greedy", "--system", "be")
    if "\ufffd" not in first:  # bytes that are no text would be asked again as another text
        assert piped(chat, "hi\nso\n", *options) == f"{first}\n{second}\n"
    assert piped(chat, "hi\n", *options) == f"{first}\n"
    assert piped(chat, "hi\n", "--greedy", "--no-chat") == text_of(generator, "hi", temperature=0.0) + "\n"


@pytest.mark.slow
def test_lines_come_through_a_pipe(folder: Path, generator: TextGenerator) -> None:
    command = [sys.executable, "-m", "training", "generate", str(folder), "--interactive", "--max-tokens", "5",
               "--ignore-eos", "--temperature", "1", "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, input=b"ink\n/quit\nnever\n", capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == text_of(generator, "ink") + "\n"


def test_control_characters_cannot_take_over_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2J\x07\n\t\x9bé\x7f"
    assert terminal.printable(text) == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert terminal.printable(text) == "a␛[2J␇\n\t␦é␡"
