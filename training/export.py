"""A checkpoint made ready to leave the house: without padding, with its tokenizer and a model card, and checked.

    python -m training export runs/shakespeare --out exported/shakespeare --dtype bfloat16

The folder holds all that `from_pretrained` of a fresh transformers needs. Before it gets its name it is loaded again
and its logits on fixed tokens are compared with the source's. For that the source's weights are rounded to the exported
type and both sides are computed in float32: a difference of more than `_TOLERANCE` of the largest logit is then a fault
of the export, whatever the type. What the rounding itself costs is measured beside it and reported.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import MAX_SHARD_BYTES, Manifest, Provenance, load_model, save_state_dict
from model.errors import CheckpointError
from model.file_errors import naming_file
from model.hf_config import CONFIG_FILE
from model.manifest import read_manifest
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.errors import RecipeError
from training.model_card import CARD_FILE, ModelCard, read_recipe
from training.out_folder import require_free

DEFAULT_CHECKPOINT = "best"
_TOLERANCE = 1e-4
_PROMPT_TOKENS = 32
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)")


@dataclass(frozen=True, slots=True)
class ExportResult:
    """`padding` counts the vocabulary rows cut off.

    `rounding_error` is the largest difference that rounding the weights to `dtype` makes in a logit, `export_error`
    what is left once both sides are rounded; both are relative to the largest logit.
    """

    source: Path
    dtype: torch.dtype
    vocab_size: int
    padding: int
    rounding_error: float
    export_error: float
    manifest: Manifest


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    which: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportResult:
    """Writes `out`, a new or empty folder, from a checkpoint folder or from one of a run's (`which`, by default best).

    `dtype` None keeps the weights' own type. Raises RecipeError, CheckpointError, ConfigError (for a model that no
    Hugging Face class computes) or TokenizerError; `out` is then left as it was.
    """
    require_free(out)
    folder, run = find_checkpoint(source, which)
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    padding = model.config.vocab_size - tokenizer.vocab_size
    if padding < 0:
        raise CheckpointError(
            f"{folder} has a tokenizer of {tokenizer.vocab_size} tokens but a model of only {model.config.vocab_size}; "
            "restore the tokenizer that it was trained with"
        )
    dtype = dtype or model.dtype
    manifest = read_manifest(folder)
    provenance = manifest.provenance if manifest is not None else Provenance()
    recipe = None if run is None else read_recipe(run / "config.toml")
    config = replace(model.config, vocab_size=tokenizer.vocab_size)
    card = ModelCard(out.resolve().name, config, tokenizer, dtype, provenance, recipe)
    unchecked = out.resolve().with_name(f".{out.resolve().name}.unchecked")
    try:
        exported = save_state_dict(
            unchecked, model.config, model.state_dict(), dtype=dtype, tokenizer=_TokenizerAndCard(tokenizer, card),
            provenance=provenance, vocab_size=tokenizer.vocab_size, max_shard_bytes=max_shard_bytes,
        )  # fmt: skip
        rounding_error, export_error = _compare(model, unchecked, dtype)
        with naming_file(out, "written"):
            unchecked.rename(out.resolve())
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    return ExportResult(folder, dtype, tokenizer.vocab_size, padding, rounding_error, export_error, exported)


@dataclass(frozen=True, slots=True)
class _TokenizerAndCard:
    """What lies beside the weights, in the form in which `save_state_dict` takes a tokenizer."""

    tokenizer: Tokenizer
    card: ModelCard

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder)
        (folder / CARD_FILE).write_text(self.card.text(), encoding="utf-8")


def find_checkpoint(source: Path, which: str | None) -> tuple[Path, Path | None]:
    """The checkpoint folder, and the run folder it lies in, if it does."""
    if (source / CONFIG_FILE).is_file():
        if which is not None:
            raise RecipeError(f"--which {which} chooses among a run's checkpoints, but {source} is a checkpoint itself")
        parent = source.resolve().parent
        return source, parent.parent if parent.name == "checkpoints" else None
    checkpoints = source / "checkpoints"
    if not checkpoints.is_dir():
        raise CheckpointError(
            f"{source} holds neither {CONFIG_FILE} nor checkpoints; give a checkpoint or a run folder"
        )
    there = sorted(path.name for path in checkpoints.iterdir() if (path / CONFIG_FILE).is_file())
    name = which or DEFAULT_CHECKPOINT
    if name not in there:
        choice = f"give --which {', '.join(there)}" if there else "train until it saves one"
        raise CheckpointError(f"{checkpoints} holds no {name}; {choice}")
    return checkpoints / name, source


@torch.no_grad()
def _compare(model: Transformer, folder: Path, dtype: torch.dtype) -> tuple[float, float]:
    """(cost of rounding, fault of the export). Raises CheckpointError for a fault above the tolerance."""
    exported = load_model(folder, dtype=torch.float32)
    vocab_size = exported.config.vocab_size
    original = _logits(model.float(), vocab_size)
    rounded = _logits(model.to(dtype).float(), vocab_size)
    ours = _logits(exported, vocab_size)
    scale = original.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    rounding_error, export_error = (((a - rounded).abs().max() / scale).item() for a in (original, ours))
    if not export_error <= _TOLERANCE:  # also when it is no number
        raise CheckpointError(
            f"the export does not compute what its source does (logits differ by {export_error:.1e} of the largest) "
            "and was not kept; check the source with a plain load, then report this"
        )
    return rounding_error, export_error


def _logits(model: Transformer, vocab_size: int) -> Tensor:
    """Logits [T, V] after tokens spread evenly over the vocabulary, its first and last among them."""
    length = min(_PROMPT_TOKENS, model.config.max_seq_len)
    prompt = torch.linspace(0, vocab_size - 1, length).round().long()
    return model.compute_logits(model(prompt[None]))[0, :, :vocab_size]


def parse_size(text: str) -> int:
    """Bytes of `500MB`, `5GB`, `2GiB` or a plain number. Raises RecipeError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise RecipeError(f"--max-shard-size is {text!r} but must be a size such as 500MB, 5GB or 2GiB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise RecipeError(f"--max-shard-size is {text!r} but must be at least one byte")
    return size
