"""A tokenizer for one's own text, in Hugging Face's files.

    python -m training tokenizer train --input poems.txt --kind bpe --vocab-size 8000 --pretokenizer devanagari \\
        --normalize nfc --out tokenizers/hindi

`Tokenizer.load`, `prepare --tokenizer` and transformers' AutoTokenizer read the folder. Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from model.atomic_folder import replace_folder
from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from model.tokenizer.encoders import LibraryEncoder
from model.tokenizer.files import CONFIG_FILE, END_OF_TEXT, TOKENIZER_FILE, config_bytes, to_json_bytes
from model.tokenizer.normalizer import Normalizer
from training.data.prepare import OnProgress
from training.errors import RecipeError
from training.tokenizers.corpus import CorpusRequest, TextStream, open_corpus
from training.tokenizers.learn import (
    UNKNOWN,
    Document,
    Kind,
    Plan,
    Pretokenizer,
    learn,
    special_token_clash,
    special_tokens,
)

Form = Literal["none", "nfc", "nfkc"]

DEFAULT_MIN_FREQUENCY = 2
_BATCH_TEXTS = 32


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """What `tokenizer train` is asked for. `vocab_size` is the most tokens there may be, special ones included; it may
    be None for characters and bytes, which take what they need. `pretokenizer` and `min_frequency` are for the others.
    """

    corpus: CorpusRequest
    out: Path
    kind: Kind
    vocab_size: int | None = None
    normalize: Form = "none"
    lowercase: bool = False
    pretokenizer: Pretokenizer | None = None
    special: tuple[str, ...] = ()
    min_frequency: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        learns = self.kind in ("bpe", "wordpiece")
        if learns and self.vocab_size is None:
            raise RecipeError(f"--kind {self.kind} needs --vocab-size, the number of tokens")
        if not self.corpus.inputs and self.kind != "bytes":
            raise RecipeError("--input names no text: give a file, a folder, a URL, hf:OWNER/NAME or a short name")
        for option, value in (("--pretokenizer", self.pretokenizer), ("--min-frequency", self.min_frequency)):
            if value is not None and not learns:
                raise RecipeError(f"{option} is for --kind bpe and wordpiece; leave it out with {self.kind}")
        for option, number in (("--vocab-size", self.vocab_size), ("--min-frequency", self.min_frequency)):
            if number is not None and not 1 <= number < 1 << 24:
                raise RecipeError(f"{option} is {number} but must lie between 1 and {(1 << 24) - 1}")

    @property
    def plan(self) -> Plan:
        form = () if self.normalize == "none" else (self.normalize.upper(),)
        return Plan(
            kind=self.kind,
            vocab_size=self.vocab_size or 1 << 24,
            pretokenizer=self.pretokenizer or "gpt2",
            normalizer=Normalizer((*form, *(("Lowercase",) if self.lowercase else ()))),
            special_tokens=special_tokens(self.special),
            min_frequency=self.min_frequency or DEFAULT_MIN_FREQUENCY,
        )


@dataclass(frozen=True, slots=True)
class Trained:
    """`tokens` and `characters` are of the text that it was trained on. `runs_through`: tiktoken, tokenizers, or this
    package alone."""

    tokenizer: Tokenizer
    characters: int
    tokens: int
    runs_through: str


def train_tokenizer(
    request: TrainRequest,
    *,
    on_progress: OnProgress = lambda what, done, total: None,
    on_notice: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Writes `request.out`, whole or not at all.

    Raises RecipeError for what cannot be had, DataError for bad inputs, TokenizerError for a text that the tokenizer
    does not give back.
    """
    plan = request.plan
    _require_replaceable(request.out, request.force)
    with open_corpus(request.corpus, on_progress, on_notice) as texts:
        job = _Job(request, plan, texts, on_notice)
        replace_folder(request.out, job.write, marker=TOKENIZER_FILE)
    tokenizer = Tokenizer.load(request.out)
    runs_through = {"byte_bpe": "tiktoken", "library": "tokenizers"}.get(tokenizer.kind, "quill")
    return Trained(tokenizer, texts.characters, job.tokens, runs_through)


@dataclass(slots=True)
class _Job:
    request: TrainRequest
    plan: Plan
    texts: TextStream
    on_notice: Callable[[str], None]
    tokens: int = field(default=0)

    def write(self, folder: Path) -> None:
        document = learn(self.plan, self.texts.read, self.on_notice)
        tokenizer = _save(folder, document, self.plan.kind)
        _check_special_tokens(tokenizer, self.plan.special_tokens)
        if not self._agree(tokenizer, folder):
            self.on_notice(
                "tiktoken and tokenizers differ on this text, so the tokenizers library runs this vocabulary"
            )
            tokenizer = _save(folder, document, self.plan.kind, needs_library=True)
        elif tokenizer.kind == "library" and self.plan.kind == "bpe":
            self.on_notice("two merges make one token, which tiktoken cannot follow; the tokenizers library runs it")
        self._tell(tokenizer)

    def _agree(self, tokenizer: Tokenizer, folder: Path) -> bool:
        """Whether the library gives the same ids for the whole text. Raises TokenizerError for text that is changed."""
        self.tokens = 0
        if not self.request.corpus.inputs:  # bytes are learned from nothing
            return True
        library = LibraryEncoder((folder / TOKENIZER_FILE).read_bytes(), TOKENIZER_FILE)
        for batch in _batches(self.texts.read("checking")):
            ids = tokenizer.encode_batch(batch, add_special=False)
            self.tokens += sum(map(len, ids))
            if tokenizer.kind != "library" and ids != library.encode_batch(batch, False):
                return False
            for text, text_ids in zip(batch, ids, strict=True):
                if tokenizer.unk_token_id not in text_ids and tokenizer.decode(text_ids) != tokenizer.normalize(text):
                    raise TokenizerError("the trained tokenizer does not give its text back; report this with the text")
        return True

    def _tell(self, tokenizer: Tokenizer) -> None:
        wanted = self.request.vocab_size
        if self.plan.kind in ("bpe", "wordpiece"):
            if wanted is not None and tokenizer.vocab_size < wanted:
                self.on_notice(
                    f"the text gives only {tokenizer.vocab_size} of {wanted} tokens; "
                    "more text or a smaller --min-frequency gives more"
                )
            if self.plan.pretokenizer == "gpt2" and self.texts.marks:
                self.on_notice(
                    f"the text has combining marks ({len(self.texts.marks)} different), which gpt2's words cut off "
                    "their letters; --pretokenizer devanagari keeps them together"
                )


def _save(folder: Path, document: Document, kind: Kind, *, needs_library: bool = False) -> Tokenizer:
    unknown = UNKNOWN if kind == "wordpiece" else None
    config = config_bytes(END_OF_TEXT, END_OF_TEXT, unknown, needs_library=needs_library)
    (folder / TOKENIZER_FILE).write_bytes(to_json_bytes(document))
    (folder / CONFIG_FILE).write_bytes(config)
    return Tokenizer.load(folder)


def _check_special_tokens(tokenizer: Tokenizer, special: tuple[str, ...]) -> None:
    """Raises RecipeError for a special token that ordinary text would produce, alone or inside a sentence."""
    for token in special:
        token_id = tokenizer.special_tokens[token]
        for text in (token, f" {token}", f"a {token} b"):
            try:
                ids = tokenizer.encode(text, add_special=False)
            except TokenizerError:  # characters that the vocabulary lacks
                continue
            if token_id in ids:
                raise special_token_clash(token)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, _BATCH_TEXTS)):
        yield batch


def _require_replaceable(folder: Path, force: bool) -> None:
    """Raises RecipeError unless the folder is new, empty, or an older tokenizer that `force` gives up."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file():
        raise RecipeError(f"--out {folder} is a file; name a folder")
    if names - {TOKENIZER_FILE, CONFIG_FILE}:
        raise RecipeError(f"--out {folder} holds more than a tokenizer; choose a new folder")
    if names and not force:
        raise RecipeError(f"--out {folder} holds a tokenizer already; choose another folder or pass --force")
