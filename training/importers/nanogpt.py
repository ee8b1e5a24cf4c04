"""nanoGPT's ckpt.pt: GPT-2's shape with the exact GELU, biases or none, and a vocabulary that may be padded to 50,304.

The file is a dict: "model" (weights, [out, in]; a copy of the tied head), "model_args" (sizes), "config" (the command
line), "iter_num", "best_val_loss", the loss of these very weights, and "optimizer", which is left where it is.
Checkpoints made before nanoGPT's switch to torch's GELU in 2023 used the tanh form, which they do not record.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig, gpt2_config
from model.errors import CheckpointError, ConfigError
from model.json_file import JsonFields
from training.importers.foreign import ForeignModel, Layout, assemble, tensors_of
from training.importers.torch_file import read_torch_file

_LAYOUT = Layout(
    prefix="transformer.h.",
    top={"embed_tokens": "transformer.wte", "embed_positions": "transformer.wpe", "final_norm": "transformer.ln_f"},
    layers={
        "attn_norm": ("ln_1",), "attn.qkv_proj": ("attn.c_attn",), "attn.o_proj": ("attn.c_proj",),
        "mlp_norm": ("ln_2",), "mlp.up_proj": ("mlp.c_fc",), "mlp.down_proj": ("mlp.c_proj",),
    },
)  # fmt: skip
_MAX = {"n_layer": 1_024, "n_head": 2**16, "n_embd": 2**20, "vocab_size": 2**24, "block_size": 2**21}
_HEAD = "lm_head.weight"
_MASK = re.compile(r"transformer\.h\.\d+\.attn\.bias")  # the causal mask that old versions of torch needed


def read_nanogpt(path: Path) -> ForeignModel:
    """Raises CheckpointError for a file that is not whole or not nanoGPT's, ConfigError for impossible sizes."""
    content = read_torch_file(path)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise CheckpointError(f"{path} has no model and model_args as nanoGPT's ckpt.pt has; give such a file")
    tensors = tensors_of(path, content["model"])
    tensors = {name: tensor for name, tensor in tensors.items() if not _MASK.fullmatch(name)}
    config = _config(path, content["model_args"])
    state = assemble(path, config, _LAYOUT, _without_tied_head(path, tensors))
    return ForeignModel(config, state, step=_step(content.get("iter_num")), validation_loss=_loss(content))


def _config(path: Path, model_args: object) -> ModelConfig:
    if not isinstance(model_args, dict):
        raise CheckpointError(f"{path}: model_args must be a dict of sizes; give nanoGPT's own ckpt.pt")
    fields = JsonFields(model_args, f"{path}: model_args", ConfigError)
    sizes = {name: fields.integer(name, minimum=1, maximum=most) for name, most in _MAX.items()}
    if sizes["n_embd"] % sizes["n_head"]:
        fields.fail("n_embd", "must be a multiple of n_head")
    bias = fields.boolean("bias", True)
    config = gpt2_config(
        sizes["n_layer"], sizes["n_head"], sizes["n_embd"],
        vocab_size=sizes["vocab_size"], max_seq_len=sizes["block_size"],
    )  # fmt: skip
    return replace(
        config, activation="gelu", dropout=fields.number("dropout", 0.0), bos_token_id=None, eos_token_id=None,
        qkv_bias=bias, o_bias=bias, mlp_bias=bias, norm_bias=bias,
    )  # fmt: skip


def _without_tied_head(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """nanoGPT ties the head always, and saves it beside the embedding it shares."""
    head, embedding = tensors.get(_HEAD), tensors.get("transformer.wte.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise CheckpointError(f"{path}: {_HEAD} differs from transformer.wte.weight, which nanoGPT ties; save it again")
    return {name: tensor for name, tensor in tensors.items() if name != _HEAD}


def _step(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _loss(content: dict[object, object]) -> float | None:
    """`best_val_loss`, a tensor or a number; none before the first validation."""
    value = content.get("best_val_loss")
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    usable = isinstance(value, (int, float)) and math.isfinite(value) and content.get("iter_num") != 0
    return float(value) if usable else None  # type: ignore[arg-type]
