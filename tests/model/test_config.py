"""ModelConfig's own rules, its parameter count, and the reading of config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig, RopeScaling, count_parameters, gpt2_config, llama_config
from model.errors import ConfigError
from model.hf import parameter_shapes
from model.hf_config import MODEL_CLASSES, config_from_hf, config_to_hf, load_config
from model.transformer import Transformer

GPT2 = gpt2_config(2, 4, 32, vocab_size=96, max_seq_len=64)
LLAMA = llama_config(2, 4, 2, 32, 48, vocab_size=96, max_seq_len=64)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
VARIANTS = {
    "gpt2": GPT2,
    "gpt2-untied": replace(GPT2, tie_word_embeddings=False),
    "gpt2-no-bias": replace(GPT2, qkv_bias=False, o_bias=False, mlp_bias=False, norm_bias=False),
    "gpt1": replace(GPT2, architecture="openai-gpt", norm_first=False),
    "llama": LLAMA,
    "llama-wide-heads": replace(LLAMA, head_dim=16, tie_word_embeddings=False),
    "llama-biases": replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True),
    "llama3": replace(LLAMA, rope_scaling=SCALING, rope_theta=500_000.0, eos_token_id=(3, 5)),
    "mistral": replace(LLAMA, architecture="mistral", sliding_window=8),
    "qwen2": replace(LLAMA, architecture="qwen2", qkv_bias=True),
    "qwen2-window": replace(LLAMA, architecture="qwen2", qkv_bias=True, sliding_window=8),
    "qwen3": replace(LLAMA, architecture="qwen3", qk_norm=True, head_dim=16),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0), ("hidden_size", True), ("num_layers", "2"), ("num_heads", 2.0), ("max_seq_len", -1),
        ("num_kv_heads", 3), ("norm", "batchnorm"), ("position", "alibi"), ("activation", "tanh"),
        ("architecture", "bert"), ("dropout", 1.0), ("dropout", float("nan")), ("norm_eps", 0.0),
        ("rope_theta", float("inf")), ("sliding_window", 0), ("sliding_window", 1.5), ("gated_mlp", 1),
        ("bos_token_id", -1), ("eos_token_id", (1, -1)), ("eos_token_id", [1, 2]),
    ],
)  # fmt: skip
def test_values_that_cannot_be_run_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(GPT2, **{field: value})


def test_rotary_heads_are_even() -> None:
    with pytest.raises(ConfigError, match="head_dim"):
        replace(LLAMA, head_dim=7)


@pytest.mark.parametrize(
    ("field", "value"),
    [("factor", 0.0), ("factor", "8"), ("low_freq_factor", float("nan")), ("high_freq_factor", 1.0),
     ("original_max_seq_len", 0)],
)  # fmt: skip
def test_rope_scaling_is_checked(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(SCALING, **{field: value})


@pytest.mark.parametrize("name", VARIANTS)
def test_the_closed_form_counts_what_the_module_holds(name: str) -> None:
    config = VARIANTS[name]
    with torch.device("meta"):
        held = {key: tuple(value.shape) for key, value in Transformer(config).state_dict().items()}
    assert parameter_shapes(config) == held
    assert count_parameters(config) == sum(map(prod, held.values()))


@pytest.mark.parametrize("name", VARIANTS)
def test_config_json_comes_back_as_it_was(name: str) -> None:
    config = VARIANTS[name]
    expected = config
    if name == "gpt2-no-bias":  # the classes of GPT-1 and GPT-2 always have biases
        expected = GPT2
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written) == expected


def test_gpt2_json_names_the_context_for_every_reader() -> None:
    written = config_to_hf(GPT2, "bfloat16")
    assert written["n_positions"] == written["n_ctx"] == 64
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["n_inner"] is None


def test_rope_is_written_for_transformers_4_and_5() -> None:
    written = config_to_hf(VARIANTS["llama3"])
    assert written["rope_theta"] == 500_000.0
    parameters, scaling = written["rope_parameters"], written["rope_scaling"]
    assert isinstance(parameters, dict)
    assert isinstance(scaling, dict)
    assert parameters["rope_theta"] == 500_000.0
    assert parameters["rope_type"] == scaling["rope_type"] == "llama3"
    for spelling in ("rope_parameters", "rope_scaling"):
        only = {key: value for key, value in written.items() if key == spelling or not key.startswith("rope_p")}
        if spelling == "rope_parameters":
            only = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
        assert config_from_hf(only) == VARIANTS["llama3"]


GPT2_JSON = config_to_hf(GPT2)
GPT1_JSON = config_to_hf(VARIANTS["gpt1"])
LLAMA_JSON = config_to_hf(LLAMA)
MISTRAL_JSON = config_to_hf(VARIANTS["mistral"])
QWEN2_JSON = config_to_hf(VARIANTS["qwen2-window"])


@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        (GPT2_JSON, "architectures", ["BertForMaskedLM"]),
        (GPT2_JSON, "architectures", None),
        (GPT2_JSON, "architectures", ["GPT2LMHeadModel", "GPT2Model"]),
        (GPT2_JSON, "model_type", "llama"),
        (GPT2_JSON, "auto_map", {"AutoModelForCausalLM": "modeling.Evil"}),
        (GPT2_JSON, "quantization_config", {"bits": 4}),
        (GPT2_JSON, "scale_attn_by_inverse_layer_idx", True),
        (GPT2_JSON, "scale_attn_weights", False),
        (GPT2_JSON, "add_cross_attention", True),
        (GPT2_JSON, "activation_function", "quick_gelu"),
        (GPT2_JSON, "n_embd", 33),
        (GPT2_JSON, "n_embd", None),
        (GPT2_JSON, "n_layer", 10**12),
        (GPT2_JSON, "n_layer", 0),
        (GPT2_JSON, "n_positions", 2.5),
        (GPT2_JSON, "vocab_size", "96"),
        (GPT2_JSON, "layer_norm_epsilon", "small"),
        (GPT2_JSON, "tie_word_embeddings", 1),
        (GPT2_JSON, "eos_token_id", "end"),
        (GPT2_JSON, "eos_token_id", [1, -2]),
        (GPT1_JSON, "afn", "gelu_new"),
        (LLAMA_JSON, "hidden_act", "xielu"),
        (LLAMA_JSON, "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        (LLAMA_JSON, "rope_scaling", {"type": "linear", "factor": 2.0}),
        (LLAMA_JSON, "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        (LLAMA_JSON, "rope_parameters", {"full_attention": {"rope_type": "default"}}),
        (LLAMA_JSON, "rope_theta", 10**400),
        (LLAMA_JSON, "partial_rotary_factor", 0.5),
        (MISTRAL_JSON, "num_key_value_heads", 3),
        (QWEN2_JSON, "layer_types", ["full_attention", "sliding_attention"]),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_by_its_field(base: dict[str, object], field: str, value: object) -> None:
    config_from_hf(base)
    with pytest.raises(ConfigError) as caught:
        config_from_hf(base | {field: value})
    named = {"rope_parameters": "rope_type"}.get(field, field)
    assert str(caught.value).startswith("config.json: ")
    assert f": {named}" in str(caught.value)


@pytest.mark.parametrize("spelling", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_spellings_of_the_tanh_gelu(spelling: str) -> None:
    assert config_from_hf(GPT2_JSON | {"activation_function": spelling}).activation == "gelu_tanh"


def test_gpt1_calls_the_tanh_form_gelu() -> None:
    assert config_from_hf(GPT1_JSON | {"afn": "gelu"}).activation == "gelu_tanh"
    assert config_from_hf(GPT1_JSON | {"afn": "relu"}).activation == "relu"


def test_absent_and_null_differ_where_the_classes_say_so() -> None:
    without = {key: value for key, value in MISTRAL_JSON.items() if key != "sliding_window"}
    assert config_from_hf(without).sliding_window == 4_096
    assert config_from_hf(MISTRAL_JSON | {"sliding_window": None}).sliding_window is None
    no_ids = {key: value for key, value in LLAMA_JSON.items() if key not in ("bos_token_id", "eos_token_id")}
    assert config_from_hf(no_ids).eos_token_ids == (2,)
    assert config_from_hf(no_ids | {"eos_token_id": None}).eos_token_ids == ()


def test_old_llama_files_name_neither_kv_heads_nor_rope() -> None:
    old = {key: value for key, value in LLAMA_JSON.items() if not key.startswith("rope")}
    del old["num_key_value_heads"], old["head_dim"]
    config = config_from_hf(old)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 8, 10_000.0)


def test_windows_follow_qwens_switches() -> None:
    assert config_from_hf(QWEN2_JSON).sliding_window == 8
    assert config_from_hf(QWEN2_JSON | {"use_sliding_window": False}).sliding_window is None
    assert config_from_hf(QWEN2_JSON | {"max_window_layers": 2}).sliding_window is None
    with pytest.raises(ConfigError, match="layer_types"):
        config_from_hf(QWEN2_JSON | {"max_window_layers": 1})


def test_ids_beyond_the_vocabulary_are_dropped() -> None:
    assert config_from_hf(GPT2_JSON | {"eos_token_id": [7, 50_256]}).eos_token_id == 7
    assert config_from_hf(GPT2_JSON | {"bos_token_id": 50_256}).bos_token_id is None


def test_generation_config_names_further_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_JSON | {"eos_token_id": 3}))
    assert load_config(tmp_path).eos_token_id == 3
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 9]}))
    assert load_config(tmp_path).eos_token_ids == (3, 9)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '"x"', "{", '{"n_embd": NaN}', "[" * 100_000, '{"a": ' * 100_000, "\x00", '{"a":' + "9" * 5_000 + "}"],
)
def test_files_that_are_not_a_json_object_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_config(tmp_path)


def test_absent_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (replace(LLAMA, norm="layernorm"), "norm"),
        (replace(LLAMA, gated_mlp=False, activation="gelu"), "gated_mlp"),
        (replace(LLAMA, position="learned"), "position"),
        (replace(LLAMA, qkv_bias=True), "qkv_bias"),
        (replace(LLAMA, qk_norm=True), "qk_norm"),
        (replace(LLAMA, sliding_window=8), "sliding_window"),
        (replace(LLAMA, num_heads=6, num_kv_heads=2), "hidden_size"),
        (replace(GPT2, norm="rmsnorm"), "norm"),
        (replace(GPT2, num_kv_heads=2), "num_kv_heads"),
        (replace(GPT2, norm_first=False), "norm_first"),
        (replace(GPT2, sliding_window=8), "sliding_window"),
        (replace(VARIANTS["gpt1"], intermediate_size=64), "intermediate_size"),
        (replace(VARIANTS["gpt1"], activation="gelu"), "activation"),
        (replace(VARIANTS["mistral"], o_bias=True), "o_bias"),
    ],
)
def test_models_without_an_equivalent_are_not_exported(config: ModelConfig, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}.*cannot be exported"):
        config_to_hf(config)


def test_every_family_can_be_read_and_written() -> None:
    assert {config.architecture for config in VARIANTS.values()} == set(MODEL_CLASSES.values())


def test_the_configuration_modules_import_no_torch() -> None:
    code = "import sys, model.hf_config, model.presets, model.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
