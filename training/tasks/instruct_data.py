"""Instruction data: rows of JSON into conversations, and these into token examples of which the answers count.

A row is {"instruction", "input" (may be empty or absent), "output"} or {"messages": [{"role", "content"} …]}.
Free of torch.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from model.atomic_folder import replace_folder
from model.chat_template import ChatTemplate, render_chat
from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from training.data.compressed import Meter
from training.data.examples import ExampleWriter
from training.data.named_tokenizer import named_tokenizer
from training.data.readers import read_rows
from training.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER_DIR,
    DataManifest,
    SourceInfo,
    SplitInfo,
    dtype_name,
    read_manifest,
    write_manifest,
)
from training.data.sources import Input, Source, check_inputs, fetch
from training.data.splits import Shares, split_of
from training.errors import DataError, RecipeError
from training.tasks.instruct_templates import write_template

TemplateName = Literal["alpaca", "chat"]
Message = Mapping[str, str]
_KEYS = ("instruction", "input", "output", "messages")


class Example(NamedTuple):
    """The tokens of a conversation; `counted` are those that the assistant wrote, `answers` their text."""

    ids: list[int]
    counted: list[bool]
    answers: str


@dataclass(frozen=True, slots=True)
class InstructDataRequest:
    """`inputs` are files, folders or URLs, `digests` the sha256 of these URLs, `tokenizer` is the folder of the model
    that will be tuned. Rows go to the splits by the hash of what they say.
    """

    inputs: tuple[str, ...]
    out: Path
    tokenizer: str
    template: TemplateName = "alpaca"
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    digests: tuple[str, ...] = ()
    force: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.val_fraction < 1.0:
            raise RecipeError(f"--val-fraction is {self.val_fraction} but must lie between 0 and 1")
        if not 0.0 <= self.test_fraction < 1.0 - self.val_fraction:
            raise RecipeError(f"--test-fraction is {self.test_fraction} but must leave rows beside --val-fraction")

    @property
    def shares(self) -> Shares:
        return Shares(self.val_fraction, self.test_fraction)


def prepare_instructions(
    request: InstructDataRequest, *, on_notice: Callable[[str], None] = lambda line: None
) -> tuple[DataManifest, bool]:
    """Writes `request.out`, whole or not at all. Returns its manifest and whether anything had to be written.

    A folder that already holds these examples is left as it is; one that holds anything else is replaced only with
    `force`. Raises RecipeError, DataError or TokenizerError; the folder is then untouched.
    """
    inputs = check_inputs(request.inputs, request.digests, on_notice)
    for item in inputs:
        if item.kind == "dataset":
            raise RecipeError(f"{item.origin}: conversations are read from JSON; save the dataset as JSON lines first")
    tokenizer = named_tokenizer(request.tokenizer, "--tokenizer")
    if (request.out / MANIFEST).is_file() and not request.force:
        return _existing(request, tokenizer, inputs), False
    with tempfile.TemporaryDirectory(prefix="quill-prepare-") as downloads:
        sources = [fetch(item, Path(downloads)) for item in inputs]
        job = _Job(request, tokenizer, sources, on_notice)
        replace_folder(request.out, job.write, marker=MANIFEST)
    return read_manifest(request.out), True


def conversation(row: Mapping[str, Any], place: str, template: TemplateName) -> list[Message]:
    """The messages of a row; [] where nobody answers. Raises DataError, naming `place`, for a row of another form."""
    if "messages" in row:
        try:
            messages = msgspec.convert(row["messages"], list[dict[str, str]])
        except msgspec.ValidationError as error:
            raise DataError(f"{place}: messages {error}; each must have the texts role and content") from None
        if any(message.keys() < {"role", "content"} for message in messages):
            raise DataError(f"{place}: a message lacks its role or its content")
        return [*messages] if any(_is_answer(message) for message in messages) else []
    instruction, context, output = (_text(row, key, place) for key in ("instruction", "input", "output"))
    if not instruction and not context:
        raise DataError(f"{place}: has no instruction; rows need instruction and output, or messages")
    if not output:
        return []
    answer = {"role": "assistant", "content": output}
    if instruction and context and template == "alpaca":
        return [{"role": "system", "content": instruction}, {"role": "user", "content": context}, answer]
    return [{"role": "user", "content": "\n\n".join(filter(None, (instruction, context)))}, answer]


def make_example(messages: Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer) -> Example:
    """The conversation up to its last answer, as the chat route would write it.

    What stands before an answer is encoded by itself, as it will be when the model is asked; what a template writes
    behind the answer's end-of-text token belongs to the next prompt. Raises TokenizerError for messages that the
    template refuses, or that hold control tokens.
    """
    ids: list[int] = []
    counted: list[bool] = []
    answers, done = [], ""
    for number, message in enumerate(messages):
        if not _is_answer(message):
            continue
        prompt = render_chat(template, messages[:number], forbidden=tokenizer.special_tokens)
        whole = render_chat(
            template, messages[: number + 1], add_generation_prompt=False, forbidden=tokenizer.special_tokens
        )
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise TokenizerError(
                "the chat template rewrites what was said before, so that answers cannot be told from prompts; "
                "choose --template alpaca"
            )
        end = _end_of_answer(whole, len(prompt), tokenizer)
        for text, is_answer in ((prompt[len(done) :], False), (whole[len(prompt) : end], True)):
            tokens = tokenizer.encode_template(text)
            ids += tokens
            counted += [is_answer] * len(tokens)
        answers.append(message["content"].strip())
        done = whole[:end]
    return Example(ids, counted, "".join(answers))


def _end_of_answer(whole: str, start: int, tokenizer: Tokenizer) -> int:
    """Behind the end-of-text token of the answer that begins at `start`, or where the text ends without one."""
    if tokenizer.eos_token_id is None:
        return len(whole)
    end_of_text = tokenizer.token_bytes(tokenizer.eos_token_id).decode()
    found = whole.find(end_of_text, start)
    return len(whole) if found < 0 else found + len(end_of_text)


def _content(messages: Sequence[Message]) -> str:
    """What decides the split: the same for every tokenizer."""
    return "\0".join(f"{message['role']}\0{message['content']}" for message in messages)


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


def _text(row: Mapping[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if value is None:
        if key == "output":
            raise DataError(f"{place}: has no output; rows need instruction and output, or messages")
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: {key} is {type(value).__name__}, not text")
    return value.strip()


@dataclass(frozen=True, slots=True)
class _Job:
    """One preparation, from the sources to the folder."""

    request: InstructDataRequest
    tokenizer: Tokenizer
    sources: Sequence[Source]
    on_notice: Callable[[str], None]

    def write(self, folder: Path) -> None:
        (folder / TOKENIZER_DIR).mkdir()
        self.tokenizer.save(folder / TOKENIZER_DIR)
        template = write_template(self.request.template, self.tokenizer, folder / TOKENIZER_DIR)
        splits = self._write_splits(folder, template)
        write_manifest(folder, self._manifest(splits, template))

    def _write_splits(self, folder: Path, template: ChatTemplate) -> dict[str, SplitInfo]:
        shares, dtype, unanswered = self.request.shares, dtype_name(self.tokenizer.vocab_size), 0
        with ExitStack() as stack:
            writers = {name: stack.enter_context(ExampleWriter(folder, name, dtype)) for name in shares.names}
            for place, messages in self._conversations():
                if not messages:
                    unanswered += 1
                    continue
                try:
                    example = make_example(messages, template, self.tokenizer)
                except TokenizerError as error:
                    raise DataError(f"{place}: {error}") from None
                writers[split_of(_content(messages), shares)].append(
                    example.ids, example.counted, text=self.tokenizer.decode(example.ids),
                    answer_bytes=len(example.answers.encode()),
                )  # fmt: skip
            splits = {name: writer.finish() for name, writer in writers.items()}
        if unanswered:
            self.on_notice(f"{unanswered} rows have no answer and are left out")
        return splits

    def _conversations(self) -> Iterator[tuple[str, list[Message]]]:
        for source in self.sources:
            for place, row in read_rows(source.path, source.origin, _KEYS, Meter()):
                yield place, conversation(row, place, self.request.template)

    def _manifest(self, splits: dict[str, SplitInfo], template: ChatTemplate) -> DataManifest:
        request, tokenizer = self.request, self.tokenizer
        return DataManifest(
            version=FORMAT_VERSION,
            dtype=dtype_name(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.kind,
            tokenizer_digest=tokenizer.digest,
            val_fraction=request.val_fraction,
            sources=tuple(SourceInfo(each.origin, each.num_bytes, each.sha256) for each in self.sources),
            splits=splits,
            test_fraction=request.test_fraction,
            split="documents",
            text_keys=(),
            kind="examples",
            template=request.template,
            template_digest=hashlib.sha256(template.source.encode()).hexdigest(),
        )


def _existing(request: InstructDataRequest, tokenizer: Tokenizer, inputs: Sequence[Input]) -> DataManifest:
    """The manifest of `request.out`, if that is what preparing would write. Raises DataError if it is not."""
    manifest = read_manifest(request.out)
    wanted = ("examples", request.template, request.val_fraction, request.test_fraction, tokenizer.digest)
    found = (manifest.kind, manifest.template, manifest.val_fraction, manifest.test_fraction, manifest.tokenizer_digest)
    if wanted == found and [each.sha256 for each in inputs] == [each.sha256 for each in manifest.sources]:
        return manifest
    raise DataError(f"{request.out}: already holds other prepared data; choose another --out")
