"""Hugging Face's tensor names: one table per family, read in both directions.

Ours fuse q, k, v and gate, up into one matrix each; GPT-1 and GPT-2 files store theirs as Conv1D, [in, out], the
transpose of ours. CONTRIBUTING.md lists our parameter names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import Architecture, ModelConfig
from model.errors import CheckpointError, ConfigError

Shape = tuple[int, ...]
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Family:
    """`modules` maps a module of our layer to the file's modules that make up its rows, in order."""

    prefix: str
    layers: str
    top: Mapping[str, str]
    modules: Mapping[str, tuple[str, ...]]
    conv1d: bool


_GPT_MODULES = {
    "attn_norm": ("ln_1",),
    "attn.qkv_proj": ("attn.c_attn",),
    "attn.o_proj": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.up_proj": ("mlp.c_fc",),
    "mlp.down_proj": ("mlp.c_proj",),
}
_LLAMA_MODULES = {
    "attn_norm": ("input_layernorm",),
    "attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.o_proj": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
_GPT2_TOP = {"embed_tokens": "wte", "embed_positions": "wpe", "final_norm": "ln_f"}
_GPT1_TOP = {"embed_tokens": "tokens_embed", "embed_positions": "positions_embed"}
_LLAMA_TOP = {"embed_tokens": "embed_tokens", "final_norm": "norm"}
_LLAMA = _Family("model.", "layers", _LLAMA_TOP, _LLAMA_MODULES, conv1d=False)
_FAMILIES: dict[Architecture, _Family] = {
    "gpt2": _Family("transformer.", "h", _GPT2_TOP, _GPT_MODULES, conv1d=True),
    "openai-gpt": _Family("transformer.", "h", _GPT1_TOP, _GPT_MODULES, conv1d=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}

# Constants that older versions saved beside the weights: causal masks and rotary frequencies.
_BUFFERS = re.compile(r"\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")
_HEAD = "lm_head.weight"
SCORE = "score.weight"
"""The head of a classifier, in the file and in ours."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the file, with its shape there, and how many rows of ours it fills."""

    name: str
    shape: Shape
    rows: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One of our parameters and the file's tensors that make up its rows, in order."""

    parameter: str
    shape: Shape
    parts: tuple[Part, ...]
    transposed: bool


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every parameter of `Transformer(config)`."""
    hidden, qkv = config.hidden_size, config.q_size + 2 * config.kv_size
    shapes: dict[str, Shape] = {"embed_tokens.weight": (config.vocab_size, hidden)}
    if config.position == "learned":
        shapes["embed_positions.weight"] = (config.max_seq_len, hidden)
    for index in range(config.num_layers):
        layer = f"layers.{index}."
        shapes |= _norm(config, f"{layer}attn_norm")
        shapes |= _linear(f"{layer}attn.qkv_proj", qkv, hidden, config.qkv_bias)
        if config.qk_norm:
            shapes |= {f"{layer}attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
        shapes |= _linear(f"{layer}attn.o_proj", hidden, config.q_size, config.o_bias)
        shapes |= _norm(config, f"{layer}mlp_norm")
        up = ("gate_up_proj", 2) if config.gated_mlp else ("up_proj", 1)
        shapes |= _linear(f"{layer}mlp.{up[0]}", up[1] * config.intermediate_size, hidden, config.mlp_bias)
        shapes |= _linear(f"{layer}mlp.down_proj", hidden, config.intermediate_size, config.mlp_bias)
    if config.norm_first:
        shapes |= _norm(config, "final_norm")
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _norm(config: ModelConfig, name: str) -> dict[str, Shape]:
    has_bias = config.norm == "layernorm" and config.norm_bias
    return {f"{name}.{kind}": (config.hidden_size,) for kind in (("weight", "bias") if has_bias else ("weight",))}


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def tensor_table(config: ModelConfig) -> list[Entry]:
    """Every parameter of the model with the file's tensors it corresponds to."""
    family = _FAMILIES[config.architecture]
    return [_entry(config, family, name, shape) for name, shape in parameter_shapes(config).items()]


def score_entry(config: ModelConfig, num_labels: int) -> Entry:
    """The head of a classifier, which is no part of `tensor_table`."""
    shape = (num_labels, config.hidden_size)
    return Entry(SCORE, shape, (Part(SCORE, shape, num_labels),), transposed=False)


def _entry(config: ModelConfig, family: _Family, parameter: str, shape: Shape) -> Entry:
    module, _, kind = parameter.rpartition(".")
    if parameter == _HEAD:
        return Entry(parameter, shape, (Part(_HEAD, shape, shape[0]),), transposed=False)
    if not module.startswith("layers."):
        name = f"{family.prefix}{family.top[module]}.{kind}"
        return Entry(parameter, shape, (Part(name, shape, shape[0]),), transposed=False)
    _, index, module = module.split(".", 2)
    names = [f"{family.prefix}{family.layers}.{index}.{name}.{kind}" for name in family.modules[module]]
    transposed = family.conv1d and len(shape) == 2
    parts = [
        Part(name, (*shape[1:], rows) if transposed else (rows, *shape[1:]), rows)
        for name, rows in zip(names, _split_rows(config, shape[0], len(names)), strict=True)
    ]
    return Entry(parameter, shape, tuple(parts), transposed)


def _split_rows(config: ModelConfig, rows: int, num_parts: int) -> list[int]:
    if num_parts == 3:
        return [config.q_size, config.kv_size, config.kv_size]
    return [rows // num_parts] * num_parts


def resolve_names(config: ModelConfig, file_names: Iterable[str]) -> dict[str, str]:
    """{name in our table: name in the file}, for files with or without the family's prefix.

    Saved constants that are no weights are left out.
    """
    prefix = _FAMILIES[config.architecture].prefix
    names = [name for name in file_names if not _BUFFERS.search(name)]
    if any(name.startswith(prefix) for name in names):
        return {name: name for name in names}
    return {name if name in (_HEAD, SCORE) else prefix + name: name for name in names}


def check_tensors(config: ModelConfig, table: list[Entry], found: Mapping[str, tuple[Shape, str]]) -> None:
    """Raise CheckpointError unless the file has exactly the table's tensors, in their shapes and a float type.

    `found` maps names to (shape, safetensors type). A head saved although it is tied is allowed.
    """
    expected = {part.name: part.shape for entry in table for part in entry.parts}
    if config.tie_word_embeddings and _HEAD in found:
        expected[_HEAD] = (config.vocab_size, config.hidden_size)
    _refuse("lacks the tensors", [name for name in expected if name not in found])
    _refuse("holds tensors that config.json does not describe:", [name for name in found if name not in expected])
    wrong = [
        f"{name} {list(found[name][0])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found[name][0] != shape
    ]
    _refuse("holds tensors whose shape does not fit config.json:", wrong)
    types = [f"{name} ({found[name][1]})" for name in expected if found[name][1] not in FLOAT_TYPES]
    _refuse("holds tensors that are not float32, float16 or bfloat16:", types)


def _refuse(what: str, names: list[str], shown: int = 5) -> None:
    if names:
        rest = f" and {len(names) - shown} more" if len(names) > shown else ""
        raise CheckpointError(f"the checkpoint {what} {', '.join(names[:shown])}{rest}")


def from_hf(entry: Entry, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """Our parameter as a new contiguous CPU tensor, from the file's tensors.

    Raises CheckpointError for values that are NaN or infinite, in the file or in `dtype`.
    """
    out = torch.empty(entry.shape, dtype=dtype)
    start = 0
    for part in entry.parts:
        tensor = read(part.name)
        out[start : start + part.rows].copy_(tensor.t() if entry.transposed else tensor)
        start += part.rows
    low, high = out.aminmax()  # one pass without a temporary; NaN propagates
    if not (torch.isfinite(low) and torch.isfinite(high)):
        names = ", ".join(part.name for part in entry.parts)
        raise CheckpointError(f"{names} holds values that are not finite in {str(dtype).removeprefix('torch.')}")
    return out


def export_config(config: ModelConfig, vocab_size: int | None = None) -> ModelConfig:
    """What the file will describe: GPT classes always have biases, and padding rows of the vocabulary are cut off.

    Raises ConfigError if `vocab_size` exceeds the model's or cuts off a special token.
    """
    if vocab_size is not None and not 0 < vocab_size <= config.vocab_size:
        raise ConfigError(f"vocab_size must lie between 1 and the model's {config.vocab_size}")
    if vocab_size is not None and any(token >= vocab_size for token in _special_tokens(config)):
        raise ConfigError("vocab_size must exceed bos_token_id and eos_token_id")
    exported = replace(config, vocab_size=vocab_size or config.vocab_size)
    if _FAMILIES[config.architecture].conv1d:
        return replace(exported, qkv_bias=True, o_bias=True, mlp_bias=True, norm_bias=True)
    return exported


def _special_tokens(config: ModelConfig) -> tuple[int, ...]:
    return config.eos_token_ids + (() if config.bos_token_id is None else (config.bos_token_id,))


def to_hf(
    config: ModelConfig, exported: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(name, contiguous CPU tensor) of each tensor of the file, for `exported = export_config(config, …)`.

    Biases that the model lacks are zeros. Raises CheckpointError for a state dict that is not the model's, and for
    NaN or infinity.
    """
    shapes = parameter_shapes(config)
    _refuse_state("lacks", [name for name in shapes if name not in state])
    _refuse_state("misshapes", [name for name, shape in shapes.items() if tuple(state[name].shape) != shape])
    for entry in tensor_table(exported):
        if entry.parameter in shapes:
            ours = state[entry.parameter].detach()[: entry.shape[0]].to("cpu", dtype)
        else:
            ours = torch.zeros(entry.shape, dtype=dtype)
        _require_finite(entry.parameter, ours)
        start = 0
        for part in entry.parts:
            rows = ours[start : start + part.rows]
            yield part.name, (rows.t() if entry.transposed else rows).contiguous()
            start += part.rows


def score_to_hf(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A classifier's head for the file. Raises CheckpointError for NaN or infinity."""
    weight = weight.detach().to("cpu", dtype).contiguous()
    _require_finite(SCORE, weight)
    return weight


def _require_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise CheckpointError(f"{name} holds values that are not finite; the model is not saved")


def _refuse_state(what: str, names: list[str]) -> None:
    if names:
        raise CheckpointError(
            f"the state to save {what} {names[0]}; save the plain Transformer, neither compiled, wrapped nor packed"
        )
