"""A checkpoint of nanoGPT, litgpt or llm.c as a Hugging Face folder that the server and transformers load.

python -m training import out/ckpt.pt --out checkpoints/shakespeare --characters data/shakespeare_char/input.txt
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from model.checkpoint import Manifest, Provenance, save_state_dict
from model.config import ModelConfig
from model.errors import CheckpointError, TokenizerError
from model.tokenizer import Tokenizer
from model.tokenizer.files import TOKENIZER_FILE
from training.errors import RecipeError
from training.importers import litgpt
from training.importers.foreign import ForeignModel
from training.importers.litgpt import read_litgpt
from training.importers.llmc import is_llmc, read_llmc
from training.importers.nanogpt import read_nanogpt
from training.importers.vocabulary import character_tokenizer, named_tokenizer
from training.out_folder import require_free

Format = Literal["nanogpt", "litgpt", "llmc"]
NANOGPT_FILE = "ckpt.pt"
# Rows that trainers add to round a vocabulary up; more of them mean that the tokenizer is another model's.
_MAX_PADDING = 1_024


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What `import_model` is asked for. `format` and `tokenizer` None: by what the source holds; `dtype` None: its own.

    `tokenizer` is `gpt2` or a path; `characters` names a text or JSON file in its place.
    """

    source: Path
    out: Path
    format: Format | None = None
    tokenizer: str | None = None
    characters: Path | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class ImportResult:
    """`config` is the model's as written; `padding` the vocabulary rows that were cut off."""

    format: Format
    config: ModelConfig
    padding: int
    dtype: torch.dtype
    manifest: Manifest


def import_model(request: ImportRequest) -> ImportResult:
    """Writes `request.out`, a new or empty folder, whole or not at all.

    Raises RecipeError, CheckpointError, ConfigError or TokenizerError, naming the file or field.
    """
    require_free(request.out)
    if request.tokenizer is not None and request.characters is not None:
        raise RecipeError("--tokenizer and --characters are both given; leave one of them out")
    source, kind = locate(request.source, request.format)
    # The tokenizer first: a mistake in it is told before gigabytes are read.
    tokenizer = _given_tokenizer(request)
    model = _read(source, kind)
    tokenizer = tokenizer or _usual_tokenizer(source, kind, model)
    _check_vocabulary(model, tokenizer, request, kind)
    stops = tuple(i for i in model.config.eos_token_ids if i < tokenizer.vocab_size)
    eos = stops if len(stops) > 1 else stops[0] if stops else tokenizer.eos_token_id
    config = replace(model.config, bos_token_id=tokenizer.bos_token_id, eos_token_id=eos)
    provenance = Provenance(step=model.step, run=f"{kind}:{source.name}", validation_loss=model.validation_loss)
    dtype = request.dtype or model.dtype
    manifest = save_state_dict(
        request.out, config, model.state,
        dtype=dtype, tokenizer=tokenizer, provenance=provenance, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    written = replace(config, vocab_size=tokenizer.vocab_size)
    return ImportResult(kind, written, config.vocab_size - tokenizer.vocab_size, dtype, manifest)


def locate(source: Path, kind: Format | None) -> tuple[Path, Format]:
    """The file or folder to read and its format, by names and first bytes where it is not given."""
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; give a checkpoint of {', '.join(get_args(Format))}")
    if source.name == litgpt.WEIGHTS_FILE and kind in (None, "litgpt"):
        return source.parent, "litgpt"
    if not source.is_dir():
        if kind == "litgpt":
            raise CheckpointError(f"{source} is a file; give the folder that holds {litgpt.WEIGHTS_FILE}")
        return source, kind or ("llmc" if is_llmc(source) else "nanogpt")
    if kind == "nanogpt" or (kind is None and (source / NANOGPT_FILE).is_file()):
        return source / NANOGPT_FILE, "nanogpt"
    if kind == "llmc":
        raise CheckpointError(f"{source} is a folder; give one of llm.c's model files")
    if kind is None and not (source / litgpt.WEIGHTS_FILE).exists():
        raise CheckpointError(f"{source} holds neither {NANOGPT_FILE} nor {litgpt.WEIGHTS_FILE}; give the checkpoint")
    return source, "litgpt"


def _read(source: Path, kind: Format) -> ForeignModel:
    match kind:
        case "nanogpt":
            return read_nanogpt(source)
        case "litgpt":
            return read_litgpt(source)
        case "llmc":
            return read_llmc(source)


def _given_tokenizer(request: ImportRequest) -> Tokenizer | None:
    if request.characters is not None:
        return character_tokenizer(request.characters)
    return None if request.tokenizer is None else named_tokenizer(request.tokenizer)


def _usual_tokenizer(source: Path, kind: Format, model: ForeignModel) -> Tokenizer:
    """litgpt's lies in the folder; the others use GPT-2's, unless the vocabulary has another size."""
    if kind == "litgpt":
        if not (source / TOKENIZER_FILE).is_file():
            raise TokenizerError(f"{source} holds no {TOKENIZER_FILE}; copy it there or give --tokenizer")
        return Tokenizer.load(source)
    gpt2 = Tokenizer.gpt2()
    if 0 <= model.config.vocab_size - gpt2.vocab_size < _MAX_PADDING:
        return gpt2
    raise TokenizerError(
        f"{source} has a vocabulary of {model.config.vocab_size}, which is not GPT-2's; give --characters with the "
        "text that the model was trained on, or --tokenizer"
    )


def _check_vocabulary(model: ForeignModel, tokenizer: Tokenizer, request: ImportRequest, kind: Format) -> None:
    """Raise TokenizerError unless every token has its row and no more rows are left than padding explains.

    The tokenizer that lies in litgpt's folder is the model's own, however many rows are left.
    """
    rows, tokens = model.num_tokens or model.config.vocab_size, tokenizer.vocab_size
    if request.characters is not None and tokens != rows and kind != "litgpt":
        raise TokenizerError(
            f"--characters {request.characters} has {tokens} characters but the model has {rows}; give the text that "
            "it was trained on"
        )
    exact, own = model.num_tokens is not None, kind == "litgpt" and request.tokenizer is None
    if tokens > rows or (exact and tokens < rows) or (rows - tokens >= _MAX_PADDING and not own):
        raise TokenizerError(
            f"the tokenizer has {tokens} tokens but the model has {rows}; give the tokenizer that it was trained with"
        )
