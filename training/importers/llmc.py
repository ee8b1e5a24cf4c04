"""llm.c's model files: GPT-2 in one flat binary.

256 int32 of header (magic 20240326; version: 3 = float32, 5 = bfloat16; max_seq_len, vocab_size, num_layers,
num_heads, channels, padded_vocab_size; zeros), then the parameters, little-endian and without gaps: the two
embeddings, each kind of layer parameter for all layers in turn ([out, in]), the final norm. The head is tied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig, gpt2_config
from model.errors import CheckpointError
from model.hf import parameter_shapes
from training.importers.foreign import ForeignModel

MAGIC = 20240326
_STATE_MAGICS = (20240327, 20240527)
_HEADER_BYTES = 256 * 4
_DTYPES = {3: torch.float32, 5: torch.bfloat16}
_EMBEDDINGS = ("embed_tokens.weight", "embed_positions.weight")
_LAYER_ORDER = (
    "attn_norm.weight", "attn_norm.bias", "attn.qkv_proj.weight", "attn.qkv_proj.bias", "attn.o_proj.weight",
    "attn.o_proj.bias", "mlp_norm.weight", "mlp_norm.bias", "mlp.up_proj.weight", "mlp.up_proj.bias",
    "mlp.down_proj.weight", "mlp.down_proj.bias",
)  # fmt: skip
_FINAL_NORM = ("final_norm.weight", "final_norm.bias")
_MAX = {"max_seq_len": 2**21, "vocab_size": 2**24, "num_layers": 1_024, "num_heads": 2**16, "channels": 2**20,
        "padded_vocab_size": 2**24}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Header:
    dtype: torch.dtype
    max_seq_len: int
    vocab_size: int
    num_layers: int
    num_heads: int
    channels: int
    padded_vocab_size: int


def is_llmc(path: Path) -> bool:
    """Whether the file begins with the magic number of a model."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read_llmc(path: Path) -> ForeignModel:
    """The weights are mapped from the file. Raises CheckpointError for a file that is absent, foreign or not whole."""
    header = _read_header(path)
    config = gpt2_config(
        header.num_layers, header.num_heads, header.channels,
        vocab_size=header.padded_vocab_size, max_seq_len=header.max_seq_len,
    )  # fmt: skip
    config = replace(config, bos_token_id=None, eos_token_id=None)
    return ForeignModel(config, _read_parameters(path, config, header.dtype), num_tokens=header.vocab_size)


def _read_header(path: Path) -> _Header:
    try:
        with path.open("rb") as file:
            data = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the model file's path") from None
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from None
    magic, version, *sizes = np.frombuffer(data.ljust(_HEADER_BYTES, b"\0"), "<i4")[:8].tolist()
    if magic in _STATE_MAGICS:
        raise CheckpointError(f"{path} is a file of llm.c's training state; give the model_*.bin file beside it")
    if magic != MAGIC:
        raise CheckpointError(f"{path} does not begin with llm.c's magic number {MAGIC}; give one of its model files")
    if len(data) < _HEADER_BYTES:
        raise CheckpointError(f"{path} is truncated inside its header; copy it again")
    if version not in _DTYPES:
        raise CheckpointError(
            f"{path} has version {version}, and only 3 (float32) and 5 (bfloat16) are known; write it again with llm.c"
        )
    for (name, maximum), value in zip(_MAX.items(), sizes, strict=True):
        if not 1 <= value <= maximum:
            raise CheckpointError(f"{path}: {name} is {value} but must lie between 1 and {maximum}; copy it again")
    header = _Header(_DTYPES[version], *sizes)
    if header.channels % header.num_heads or header.padded_vocab_size < header.vocab_size:
        raise CheckpointError(f"{path}: the sizes in its header contradict each other; copy it again")
    return header


def _read_parameters(path: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = parameter_shapes(config)
    per_layer = [f"layers.{index}.{name}" for name in _LAYER_ORDER for index in range(config.num_layers)]
    order = [*_EMBEDDINGS, *per_layer, *_FINAL_NORM]
    assert sorted(order) == sorted(shapes)
    sizes = [math.prod(shapes[name]) for name in order]
    expected = _HEADER_BYTES + sum(sizes) * dtype.itemsize
    if (actual := path.stat().st_size) != expected:
        raise CheckpointError(f"{path} has {actual} bytes where its header describes {expected}; copy it again")
    header_items = _HEADER_BYTES // dtype.itemsize
    flat = torch.from_file(str(path), shared=False, size=header_items + sum(sizes), dtype=dtype)[header_items:]
    return {name: part.view(shapes[name]) for name, part in zip(order, torch.split(flat, sizes), strict=True)}
