"""litgpt's checkpoint folders: lit_model.pth, model_config.yaml and the tokenizer's files.

lit_model.pth holds the weights by name, or under "model" beside the training state. Of litgpt's model families those
are imported whose arithmetic is Llama's, Mistral's, Qwen2's or Qwen3's; everything that would change it is refused by
its field. q, k and v share one matrix: `attn.qkv`, whose rows come in that order, or `attn.attn` of older versions,
where they come group by group, each with its queries, its key and its value.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from model.config import Architecture, ModelConfig, RopeScaling, llama_config
from model.errors import CheckpointError, ConfigError
from model.hf_config import GENERATION_CONFIG_FILE
from model.json_file import JsonFields, read_json_object
from training.importers.foreign import ForeignModel, Layout, assemble, tensors_of
from training.importers.torch_file import read_torch_file
from training.importers.yaml_file import read_yaml

WEIGHTS_FILE = "lit_model.pth"
CONFIG_FILE = "model_config.yaml"
_LAYOUT = Layout(
    prefix="transformer.h.",
    top={"embed_tokens": "transformer.wte", "final_norm": "transformer.ln_f", "lm_head": "lm_head"},
    layers={
        "attn_norm": ("norm_1",), "attn.qkv_proj": ("attn.qkv",), "attn.q_norm": ("attn.norm_q",),
        "attn.k_norm": ("attn.norm_k",), "attn.o_proj": ("attn.proj",), "mlp_norm": ("norm_2",),
        "mlp.gate_up_proj": ("mlp.fc_1", "mlp.fc_2"), "mlp.down_proj": ("mlp.proj",),
    },
)  # fmt: skip
# Fields with the one value that Llama's arithmetic has, and litgpt's default where the file leaves them out.
_REQUIRED: dict[str, tuple[object, object]] = {
    "norm_class_name": ("RMSNorm", "LayerNorm"), "mlp_class_name": ("LLaMAMLP", "GptNeoxMLP"),
    "parallel_residual": (False, True), "rotary_percentage": (1.0, 0.25), "rope_condense_ratio": (1, 1),
    "rope_interleave": (False, False), "shared_attention_norm": (False, False), "norm_1": (True, True),
    "norm_2": (True, True), "post_attention_norm": (False, False), "post_mlp_norm": (False, False),
    "scale_embeddings": (False, False), "lm_head_bias": (False, False), "n_expert": (0, 0),
    "attention_logit_softcapping": (None, None), "final_logit_softcapping": (None, None),
    "latent_attention": (None, None), "rope_local_base_freq": (None, None), "rope_indices": (None, None),
}  # fmt: skip
_LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}


def read_litgpt(folder: Path) -> ForeignModel:
    """Raises CheckpointError for files that are absent or not whole, ConfigError for a model that is not Llama-like."""
    path = folder / WEIGHTS_FILE
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder of shards; run litgpt's consolidation on it first")
    fields = JsonFields(read_yaml(folder / CONFIG_FILE), str(folder / CONFIG_FILE), ConfigError)
    config = _config(fields)
    config = replace(config, eos_token_id=_eos_token_id(folder, config.vocab_size))
    weights, step = _weights(read_torch_file(path))
    tensors = tensors_of(path, weights)
    state = _assemble(path, config, tensors)
    if torch.equal(state["lm_head.weight"], state["embed_tokens.weight"]):  # litgpt writes a tied head out
        config = replace(config, tie_word_embeddings=True)
        del state["lm_head.weight"]
    return ForeignModel(config, state, step=step)


def _weights(content: object) -> tuple[object, int | None]:
    """The state dict and the step, of a file that holds weights alone or a whole training state."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        return content, None
    step = content.get("step_count")
    return content["model"], step if type(step) is int and step >= 0 else None


def _config(fields: JsonFields) -> ModelConfig:
    _require_llama(fields)
    heads, hidden = _size(fields, "n_head"), _size(fields, "n_embd")
    if hidden % heads:
        fields.fail("n_embd", "must be a multiple of n_head")
    groups = _size(fields, "n_query_groups", heads)
    if heads % groups:
        fields.fail("n_query_groups", "must divide n_head")
    config = llama_config(
        _size(fields, "n_layer", most=1_024), heads, groups, hidden, _size(fields, "intermediate_size"),
        vocab_size=_size(fields, "padded_vocab_size", most=2**24),
        max_seq_len=_size(fields, "block_size", most=2**21), tie_word_embeddings=False,
    )  # fmt: skip
    bias = fields.boolean("bias", True)
    qk_norm, window = fields.boolean("norm_qk", False), _sliding_window(fields, config.num_layers)
    qkv_bias = bias or fields.boolean("attn_bias", False)
    head_dim = _size(fields, "head_size", config.head_dim)
    if fields.optional_number("attention_scores_scalar") not in (None, head_dim):
        _refuse(fields, "attention_scores_scalar")
    if qk_norm and fields.string("norm_qk_type", "default") != "default":
        _refuse(fields, "norm_qk_type")
    return replace(
        config, architecture=_architecture(fields, bias, qkv_bias, qk_norm, window), head_dim=head_dim,
        norm_eps=fields.number("norm_eps", 1e-5), rope_theta=fields.number("rope_base", 10_000.0),
        rope_scaling=_rope_scaling(fields), qkv_bias=qkv_bias, o_bias=bias, mlp_bias=bias, qk_norm=qk_norm,
        sliding_window=window,
    )  # fmt: skip


def _size(fields: JsonFields, name: str, default: int | None = None, *, most: int = 2**20) -> int:
    return fields.integer(name, default, minimum=1, maximum=most)


def _require_llama(fields: JsonFields) -> None:
    for name, (needed, default) in _REQUIRED.items():
        value = fields.value(name) if name in fields else default
        if value != needed or isinstance(value, bool) != isinstance(needed, bool):
            _refuse(fields, name, value)
    if "Gemma" in fields.string("name", ""):  # decides, in litgpt, what its RMSNorm multiplies by
        _refuse(fields, "name")


def _refuse(fields: JsonFields, name: str, value: object = None) -> NoReturn:
    shown = fields.value(name) if value is None else value
    fields.fail(
        name,
        f"is {shown!r}, and such a model has no place here; only litgpt's Llama, Mistral, Qwen2 and Qwen3 "
        "families (RMSNorm, LLaMAMLP, fully rotated heads, residuals in sequence) can be imported",
    )


def _architecture(fields: JsonFields, bias: bool, qkv_bias: bool, qk_norm: bool, window: int | None) -> Architecture:
    """The family that has these switches. `save_state_dict` refuses combinations that none has."""
    if qk_norm:
        if bias or qkv_bias or window is not None:
            _refuse(fields, "norm_qk")
        return "qwen3"
    if qkv_bias and not bias:
        return "qwen2"
    if window is None:
        return "llama"
    if bias:
        _refuse(fields, "sliding_window_size")
    return "mistral"


def _sliding_window(fields: JsonFields, num_layers: int) -> int | None:
    """The window of all layers: litgpt's default where no layers are named."""
    if not fields.has("sliding_window_size"):
        return None
    layers = fields.value("sliding_window_indices")
    if layers is not None and (not isinstance(layers, list) or len(layers) < num_layers):
        fields.fail("sliding_window_indices", "must be a list with an entry for each layer")
    kinds = {1} if layers is None else set(layers[:num_layers])
    if kinds == {0}:
        return None
    if kinds != {1}:
        fields.fail("sliding_window_indices", "must be the same for all layers: mixed windows are not supported")
    return fields.integer("sliding_window_size", minimum=1)


def _rope_scaling(fields: JsonFields) -> RopeScaling | None:
    if not fields.has("rope_adjustments"):
        return None
    values = fields.mapping("rope_adjustments")
    if set(values) != _LLAMA3_ROPE:
        fields.fail("rope_adjustments", f"must be Llama 3's ({', '.join(sorted(_LLAMA3_ROPE))}) or null")
    scaling = JsonFields(values, f"{CONFIG_FILE}: rope_adjustments", ConfigError)
    return RopeScaling(
        factor=scaling.number("factor"), low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
        original_max_seq_len=scaling.integer("original_max_seq_len", minimum=1),
    )  # fmt: skip


def _eos_token_id(folder: Path, vocab_size: int) -> tuple[int, ...] | None:
    """The ids that end a sequence by the folder's generation_config.json, which chat models need; else None."""
    path = folder / GENERATION_CONFIG_FILE
    value = read_json_object(path, ConfigError).get("eos_token_id") if path.is_file() else None
    ids = value if isinstance(value, list) else [value]
    return tuple(i for i in ids if type(i) is int and 0 <= i < vocab_size) or None


def _assemble(path: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not any(".attn.attn." in name for name in tensors):
        return assemble(path, config, _LAYOUT, tensors)
    older = replace(_LAYOUT, layers={**_LAYOUT.layers, "attn.qkv_proj": ("attn.attn",)})
    state = assemble(path, config, older, tensors)
    return {name: _ungrouped(config, rows) if ".qkv_proj." in name else rows for name, rows in state.items()}


def _ungrouped(config: ModelConfig, rows: Tensor) -> Tensor:
    """Rows [K·(H/K + 2)·d, …], group by group, in the order q, k, v."""
    per_group = config.num_heads // config.num_kv_heads + 2
    grouped = rows.reshape(config.num_kv_heads, per_group, config.head_dim, *rows.shape[1:])
    parts = (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])
    return torch.cat([part.flatten(0, 2) for part in parts])
