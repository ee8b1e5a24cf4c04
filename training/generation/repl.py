"""`python -m training generate CKPT --interactive`: prompts from the terminal or a pipe, answered as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable

from model.errors import QuillError
from training.errors import RecipeError
from training.generate import TextGenerator
from training.generation.dialogue import Chat, Completion, Dialogue
from training.generation.job import Job
from training.generation.settings import Settings
from training.generation.stopwatch import Stopwatch
from training.generation.terminal import printable, read_line

HELP = """\
/set NAME=VALUE   change a setting: temperature, top_k, top_p, min_p, max_tokens, seed, stop …; /set alone shows all
/seed N           draw the next answer with seed N; each further one takes the next seed
/reset            forget what was said
/help             this
/quit             leave, as Ctrl-D does
//text            a line that begins with one slash
Ctrl-C stops an answer."""

ReadLine = Callable[[], str]


class Repl:
    """Reads lines until /quit or the end of input and answers each. `read_line` raises EOFError at the end."""

    def __init__(
        self,
        generator: TextGenerator,
        dialogue: Dialogue,
        settings: Settings,
        read_line: ReadLine = read_line,
        *,
        verbose: bool = False,
    ) -> None:
        self._generator, self._dialogue, self.settings = generator, dialogue, settings
        self._read_line = read_line
        self._verbose = verbose
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(HELP),
            "/reset": self._reset,
            "/set": self._set,
            "/seed": lambda value: self._change("seed", value),
        }

    def run(self) -> None:
        while True:
            try:
                line = self._read_line()
            except EOFError:
                return
            except KeyboardInterrupt:
                _say("\n/quit or Ctrl-D leaves")
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self._handle(line)
            except QuillError as error:
                _say(f"error: {error}")

    def _handle(self, line: str) -> None:
        if line.startswith("//"):
            self._answer(line[1:])
        elif line.startswith("/"):
            name, _, value = line.strip().partition(" ")
            if name not in self._commands:
                raise RecipeError(f"{name} is no command; /help lists them")
            self._commands[name](value.strip())
        else:
            self._answer(line)

    def _answer(self, line: str) -> None:
        params = self.settings.params
        ids = self._dialogue.ask(line, params.max_tokens)
        parts: list[str] = []
        token_ids: list[int] = []
        watch = Stopwatch()
        try:
            for delta in watch.timed(self._generator.stream(ids, params, stop=self.settings.stop)):
                parts.append(delta.text)
                token_ids.append(delta.token_id)
                _write(printable(delta.text))
            _say("")
        except KeyboardInterrupt:
            _say(" [stopped]")
        if self._verbose:
            print(watch.describe(), file=sys.stderr)
        if token_ids:
            self._dialogue.answered("".join(parts), token_ids)
        self.settings = self.settings.with_next_seed()

    def _reset(self, _: str) -> None:
        self._dialogue.reset()
        _say("forgotten")

    def _set(self, assignment: str) -> None:
        if not assignment:
            _say(self.settings.describe())
            return
        name, _, value = assignment.partition("=") if "=" in assignment else assignment.partition(" ")
        self._change(name.strip(), value.strip())

    def _change(self, name: str, value: str) -> None:
        self.settings = self.settings.with_value(name, value)


def converse(generator: TextGenerator, job: Job, *, verbose: bool = False) -> None:
    """Answer what is typed until it ends: as a chat where the checkpoint has a template, unless `job.chat` is False.

    Raises RecipeError for a chat without a template, ControlError for unknown controls.
    """
    template = generator.chat_template
    dialogue: Dialogue
    if job.chat is False or (job.chat is None and (template is None or job.controls)):
        prefix = generator.controls.prefix_ids(generator.tokenizer, job.controls)
        dialogue = Completion(generator.tokenizer, generator.max_seq_len, prefix)
        mode = "each line is a prompt, an empty one goes on with the last text"
    else:
        dialogue = Chat(generator.tokenizer, generator.require_template(), generator.max_seq_len, job.system)
        mode = "a chat"
    if sys.stdin.isatty():
        _say(f"{mode}; /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    Repl(generator, dialogue, Settings(job.params, job.stop), verbose=verbose).run()


def _say(text: str) -> None:
    _write(text + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
