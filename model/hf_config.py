"""Hugging Face's config.json to ModelConfig and back, for the six architectures of this package.

Free of torch. What would change the arithmetic and is not implemented is refused by name, never ignored. Field names
and defaults are those of transformers' configuration classes (versions 4 and 5).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from model.config import Activation, Architecture, ModelConfig, RopeScaling
from model.errors import ConfigError
from model.json_file import JsonFields, read_json_object

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

MODEL_CLASSES: dict[str, Architecture] = {
    "GPT2LMHeadModel": "gpt2",
    "OpenAIGPTLMHeadModel": "openai-gpt",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_CLASS_NAMES = {architecture: name for name, architecture in MODEL_CLASSES.items()}
# The same transformers with a head for labels; `model.classifier_config` reads them.
CLASSIFIER_CLASSES: dict[str, Architecture] = {
    re.sub("LMHeadModel|ForCausalLM", "ForSequenceClassification", name): architecture
    for name, architecture in MODEL_CLASSES.items()
}

_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")
_ACTIVATIONS: dict[str, Activation] = {
    **dict.fromkeys(_GELU_TANH, "gelu_tanh"),
    "gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
# OpenAIGPTLMHeadModel has its own table, in which "gelu" is the tanh form.
_GPT1_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
_ACTIVATION_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}

# Bounds far above any published model: they keep a damaged file from asking for absurd amounts of work.
_MAX_LAYERS = 1_024
_MAX_WIDTH = 2**20
_MAX_POSITIONS = 2**21
_MAX_VOCABULARY = 2**24


def load_config(folder: str | Path) -> ModelConfig:
    """The model's configuration; end-of-sequence ids come from generation_config.json where it names them.

    Raises ConfigError for files that are absent, malformed or describe a model that cannot be run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give a model folder in Hugging Face's format")
    config = config_from_hf(read_json_object(folder / CONFIG_FILE, ConfigError))
    generation_file = folder / GENERATION_CONFIG_FILE
    if not generation_file.exists():
        return config
    fields = JsonFields(read_json_object(generation_file, ConfigError), GENERATION_CONFIG_FILE, ConfigError)
    if not fields.has("eos_token_id"):
        return config
    return replace(config, eos_token_id=_eos_token_id(fields, None, config.vocab_size))


def config_from_hf(values: Mapping[str, object]) -> ModelConfig:
    """ModelConfig from the content of config.json. Raises ConfigError, naming the field."""
    fields = JsonFields(values, CONFIG_FILE, ConfigError)
    architecture = _architecture(fields)
    for name in ("auto_map", "quantization_config", "pruned_heads"):
        if fields.value(name):
            fields.fail(name, "is not supported: only plain weights of the built-in architectures are run")
    return _READERS[architecture](fields, architecture)


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, object]:
    """The content of config.json. Raises ConfigError if no Hugging Face class computes what this model computes.

    GPT classes always have biases, so a model without them is written with `qkv_bias` and the others on and
    zeros for weights; see `model.hf.export_config`.
    """
    _check_exportable(config)
    writer = _gpt_to_hf if config.architecture in ("gpt2", "openai-gpt") else _llama_to_hf
    eos = list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id
    return {
        "architectures": [_CLASS_NAMES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        **writer(config),
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name that transformers 4 and llama.cpp read
    }


def _architecture(fields: JsonFields) -> Architecture:
    names = fields.value("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        fields.fail("architectures", f"must name one of {', '.join(MODEL_CLASSES)}")
    if names[0] in CLASSIFIER_CLASSES:
        fields.fail("architectures", f"names {names[0]}, which labels texts and writes none; give a language model")
    if names[0] not in MODEL_CLASSES:
        fields.fail("architectures", f"must name one of {', '.join(MODEL_CLASSES)}")
    architecture = MODEL_CLASSES[names[0]]
    if fields.string("model_type", architecture) != architecture:
        fields.fail("model_type", f"must be {architecture} for {names[0]}")
    return architecture


def _read_gpt(fields: JsonFields, architecture: Architecture) -> ModelConfig:
    is_gpt2 = architecture == "gpt2"
    if is_gpt2:
        _require(fields, "scale_attn_weights", expected=True)
        _require(fields, "scale_attn_by_inverse_layer_idx", expected=False)
        _require(fields, "add_cross_attention", expected=False)
    hidden = _size(fields, "n_embd")
    heads = _size(fields, "n_head")
    if hidden % heads:
        fields.fail("n_embd", "must be a multiple of n_head")
    inner = _size(fields, "n_inner", 4 * hidden) if is_gpt2 else 4 * hidden
    vocab_size = _size(fields, "vocab_size", maximum=_MAX_VOCABULARY)
    default_token = 50_256 if is_gpt2 else None
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=_size(fields, "n_layer", maximum=_MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=inner,
        max_seq_len=_size(fields, "n_positions", maximum=_MAX_POSITIONS),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        norm_first=is_gpt2,
        activation=_activation(fields, "activation_function", "gelu_new", _ACTIVATIONS) if is_gpt2
        else _activation(fields, "afn", "gelu", _GPT1_ACTIVATIONS),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        dropout=fields.number("resid_pdrop", 0.1),
        bos_token_id=_token_id(fields, "bos_token_id", default_token, vocab_size),
        eos_token_id=_eos_token_id(fields, default_token, vocab_size),
    )  # fmt: skip


def _read_llama(fields: JsonFields, architecture: Architecture) -> ModelConfig:
    hidden = _size(fields, "hidden_size")
    heads = _size(fields, "num_attention_heads")
    vocab_size = _size(fields, "vocab_size", maximum=_MAX_VOCABULARY)
    max_seq_len = _size(fields, "max_position_embeddings", maximum=_MAX_POSITIONS)
    theta, scaling = _read_rope(fields, max_seq_len)
    if architecture != "llama" and "num_key_value_heads" not in fields:
        fields.fail("num_key_value_heads", "is missing")  # the class defaults differ and fit no small model
    kv_heads = _size(fields, "num_key_value_heads", heads)
    if heads % kv_heads:
        fields.fail("num_key_value_heads", "must divide num_attention_heads")
    attention_bias = architecture in ("llama", "qwen3") and fields.boolean("attention_bias", False)
    mlp_bias = architecture == "llama" and fields.boolean("mlp_bias", False)
    bos, eos = (1, 2) if architecture in ("llama", "mistral") else (None, None)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=_size(fields, "num_hidden_layers", maximum=_MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(fields, architecture, hidden, heads),
        intermediate_size=_size(fields, "intermediate_size"),
        max_seq_len=max_seq_len,
        norm="rmsnorm",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        activation=_activation(fields, "hidden_act", "silu", _ACTIVATIONS),
        gated_mlp=True,
        qkv_bias=attention_bias or architecture == "qwen2",
        o_bias=attention_bias,
        mlp_bias=mlp_bias,
        norm_bias=False,
        qk_norm=architecture == "qwen3",
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        sliding_window=_sliding_window(fields, architecture),
        dropout=fields.number("attention_dropout", 0.0),
        bos_token_id=_token_id(fields, "bos_token_id", bos, vocab_size),
        eos_token_id=_eos_token_id(fields, eos, vocab_size),
    )


def _size(fields: JsonFields, name: str, default: int | None = None, *, maximum: int = _MAX_WIDTH) -> int:
    return fields.integer(name, default, minimum=1, maximum=maximum)


def _require(fields: JsonFields, name: str, *, expected: bool) -> None:
    if fields.boolean(name, expected) is not expected:
        fields.fail(name, f"must be {str(expected).lower()}: the other form of attention is not supported")


def _activation(fields: JsonFields, name: str, default: str, table: Mapping[str, Activation]) -> Activation:
    value = fields.string(name, default)
    if value not in table:
        fields.fail(name, f"must be one of {', '.join(table)}")
    return table[value]


def _token_id(fields: JsonFields, name: str, default: int | None, vocab_size: int) -> int | None:
    """An id beyond the vocabulary, as small models inherit from the class defaults, can never occur: None.

    An explicit null stays null.
    """
    if name in fields and not fields.has(name):
        return None
    if default is None and name not in fields:
        return None
    value = fields.integer(name, default)
    return value if value < vocab_size else None


def _eos_token_id(fields: JsonFields, default: int | None, vocab_size: int) -> int | tuple[int, ...] | None:
    value = fields.value("eos_token_id")
    if not isinstance(value, list):
        return _token_id(fields, "eos_token_id", default, vocab_size)
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value):
        fields.fail("eos_token_id", "must be a token id or a list of them")
    ids = tuple(item for item in value if item < vocab_size)
    return None if not ids else ids[0] if len(ids) == 1 else ids


def _head_dim(fields: JsonFields, architecture: Architecture, hidden: int, heads: int) -> int:
    if fields.has("head_dim"):
        return _size(fields, "head_dim")
    if architecture == "qwen3":
        return 128
    if hidden % heads:
        fields.fail("hidden_size", "must be a multiple of num_attention_heads where head_dim is not given")
    return hidden // heads


def _sliding_window(fields: JsonFields, architecture: Architecture) -> int | None:
    """The window of all layers. Models that mix windowed and full layers are refused."""
    if architecture == "llama":
        return None
    if architecture == "mistral":
        if "sliding_window" in fields and not fields.has("sliding_window"):
            return None
        return fields.integer("sliding_window", 4_096, minimum=1)
    if not fields.boolean("use_sliding_window", False) or not fields.has("sliding_window"):
        return None
    kinds = fields.value("layer_types")
    if not isinstance(kinds, list):
        first, num_layers = (
            fields.integer("max_window_layers", 28),
            _size(fields, "num_hidden_layers", maximum=_MAX_LAYERS),
        )
        kinds = ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * max(num_layers - first, 0)
    if all(kind == "full_attention" for kind in kinds):
        return None
    if any(kind != "sliding_attention" for kind in kinds):
        fields.fail("layer_types", "must be the same for all layers: mixed windows are not supported")
    return fields.integer("sliding_window", minimum=1)


def _read_rope(fields: JsonFields, max_seq_len: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    name = "rope_scaling" if fields.value("rope_scaling") else "rope_parameters"
    values = fields.mapping(name) if fields.has(name) else {}
    rope = JsonFields(values, f"{CONFIG_FILE}: {name}", ConfigError)
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        rope.fail("partial_rotary_factor", "must be 1: partly rotated heads are not supported")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    kind = rope.string("rope_type", rope.string("type", "default"))
    if any(isinstance(value, dict) for value in values.values()) or kind not in ("default", "llama3"):
        rope.fail("rope_type", "must be default or llama3, the same for all layers")
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_seq_len=rope.integer("original_max_position_embeddings", max_seq_len),
    )


_GPT_FORM: dict[str, object] = {"norm": "layernorm", "position": "learned", "gated_mlp": False, "qk_norm": False,
                                "sliding_window": None}  # fmt: skip
_LLAMA_FORM: dict[str, object] = {"norm": "rmsnorm", "position": "rope", "gated_mlp": True, "norm_first": True}
_FORMS: dict[Architecture, dict[str, object]] = {
    "gpt2": {**_GPT_FORM, "norm_first": True},
    "openai-gpt": {**_GPT_FORM, "norm_first": False},
    "llama": {**_LLAMA_FORM, "qk_norm": False, "sliding_window": None},
    "mistral": {**_LLAMA_FORM, "qk_norm": False, "qkv_bias": False, "o_bias": False, "mlp_bias": False},
    "qwen2": {**_LLAMA_FORM, "qk_norm": False, "qkv_bias": True, "o_bias": False, "mlp_bias": False},
    "qwen3": {**_LLAMA_FORM, "qk_norm": True, "mlp_bias": False},
}


def _check_exportable(config: ModelConfig) -> None:
    """Raise ConfigError unless the Hugging Face class of this architecture computes the same function."""
    target = f"{_CLASS_NAMES[config.architecture]} has no such form, so this model cannot be exported"
    for name, expected in _FORMS[config.architecture].items():
        if getattr(config, name) != expected:
            raise ConfigError(f"{name} is {getattr(config, name)!r}, and {target}")
    is_gpt = config.architecture in ("gpt2", "openai-gpt")
    if is_gpt and not config.num_heads == config.num_kv_heads == config.hidden_size / config.head_dim:
        raise ConfigError(f"num_kv_heads and head_dim must follow from num_heads and hidden_size: {target}")
    if not is_gpt and config.qkv_bias != config.o_bias and config.architecture != "qwen2":
        raise ConfigError(f"qkv_bias and o_bias differ, and {target}")
    if not is_gpt and config.hidden_size % config.num_heads:
        raise ConfigError(f"hidden_size is not a multiple of num_heads, and {target}")
    if config.architecture == "openai-gpt" and config.intermediate_size != 4 * config.hidden_size:
        raise ConfigError(f"intermediate_size is not 4 times hidden_size, and {target}")
    if config.architecture == "openai-gpt" and config.activation == "gelu":
        raise ConfigError(f"activation is 'gelu', and {target}; gelu_tanh can be")


def _gpt_to_hf(config: ModelConfig) -> dict[str, object]:
    values: dict[str, object] = {
        "n_positions": config.max_seq_len,
        "n_ctx": config.max_seq_len,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
    }
    if config.architecture == "openai-gpt":
        return values | {"afn": "gelu" if config.activation == "gelu_tanh" else config.activation}
    inner = None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size
    return values | {"n_inner": inner, "activation_function": _ACTIVATION_NAMES[config.activation]}


def _llama_to_hf(config: ModelConfig) -> dict[str, object]:
    values: dict[str, object] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _ACTIVATION_NAMES[config.activation],
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.dropout,
        **_rope_to_hf(config),
    }
    if config.architecture in ("llama", "qwen3"):
        values["attention_bias"] = config.o_bias
    if config.architecture == "llama":
        values["mlp_bias"] = config.mlp_bias
    if config.architecture == "mistral":
        values["sliding_window"] = config.sliding_window
    if config.architecture in ("qwen2", "qwen3"):
        windowed = config.sliding_window is not None
        values |= {"use_sliding_window": windowed, "sliding_window": config.sliding_window}
        values["max_window_layers"] = 0 if windowed else config.num_layers
    return values


def _rope_to_hf(config: ModelConfig) -> dict[str, object]:
    """Both spellings: transformers 5 reads `rope_parameters`, 4 reads `rope_theta` and `rope_scaling`."""
    if config.rope_scaling is None:
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        return {"rope_theta": config.rope_theta, "rope_parameters": rope}
    scaling = {
        "rope_type": "llama3",
        "factor": config.rope_scaling.factor,
        "low_freq_factor": config.rope_scaling.low_freq_factor,
        "high_freq_factor": config.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
    }
    return {
        "rope_theta": config.rope_theta,
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
        "rope_scaling": scaling,
    }


_READERS: dict[Architecture, Callable[[JsonFields, Architecture], ModelConfig]] = {
    "gpt2": _read_gpt,
    "openai-gpt": _read_gpt,
    "llama": _read_llama,
    "mistral": _read_llama,
    "qwen2": _read_llama,
    "qwen3": _read_llama,
}
