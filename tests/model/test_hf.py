"""Parity with transformers in both directions, on small random models of every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import load_model, save_model
from model.config import ModelConfig, RopeScaling
from model.errors import CheckpointError, ConfigError
from model.hf import export_config, parameter_shapes, tensor_table
from model.hf_config import load_config
from model.presets import create_config
from model.transformer import Transformer

TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("quiet_transformers")
VOCAB = 96
_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}

THEIRS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**_GPT),
    "gpt2-untied": lambda: transformers.GPT2Config(**_GPT, tie_word_embeddings=False),
    "gpt2-inner-relu": lambda: transformers.GPT2Config(**_GPT, n_inner=40, activation_function="relu"),
    "gpt2-gelu": lambda: transformers.GPT2Config(**_GPT, activation_function="gelu"),
    "gpt2-upcast": lambda: transformers.GPT2Config(**_GPT, reorder_and_upcast_attn=True),
    "gpt1": lambda: transformers.OpenAIGPTConfig(**_GPT),
    "gpt1-relu": lambda: transformers.OpenAIGPTConfig(**_GPT, afn="relu"),
    "llama": lambda: transformers.LlamaConfig(**_LLAMA),
    "llama-tied-biases": lambda: transformers.LlamaConfig(
        **_LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama-wide-heads": lambda: transformers.LlamaConfig(**_LLAMA, head_dim=16),
    "llama3": lambda: transformers.LlamaConfig(**_LLAMA, rope_parameters=dict(_LLAMA3)),
    "llama-theta": lambda: transformers.LlamaConfig(
        **_LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 99.0}
    ),
    "llama-geglu": lambda: transformers.LlamaConfig(**_LLAMA, hidden_act="gelu"),
    "mistral": lambda: transformers.MistralConfig(**_LLAMA, sliding_window=None),
    "mistral-window": lambda: transformers.MistralConfig(**_LLAMA, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA),
    "qwen2-window": lambda: transformers.Qwen2Config(**_LLAMA, **_WINDOW),
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA, head_dim=16),
    "qwen3-bias-window": lambda: transformers.Qwen3Config(**_LLAMA, **_WINDOW, attention_bias=True),
}

_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_heads": 4, "num_layers": 2, "max_seq_len": 64}
_SMALL_LLAMA = create_config("llama-tiny", **_SMALL, num_kv_heads=2)
_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
OURS: dict[str, ModelConfig] = {
    "gpt2": create_config("gpt2", **_SMALL),
    "gpt2-untied": create_config("gpt2-untied", **_SMALL),
    "gpt2-no-bias": create_config("gpt2", **_SMALL, bias=False, activation="gelu", intermediate_size=40),
    "gpt1": create_config("openai-gpt", **_SMALL),
    "gpt1-no-bias-relu": create_config("openai-gpt", **_SMALL, bias=False, activation="relu"),
    "llama": _SMALL_LLAMA,
    "llama-biases": replace(_SMALL_LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama3": replace(_SMALL_LLAMA, rope_scaling=_SCALING, rope_theta=5e5, eos_token_id=(3, 5)),
    "mistral-window": replace(_SMALL_LLAMA, architecture="mistral", sliding_window=6),
    "qwen2": replace(_SMALL_LLAMA, architecture="qwen2", qkv_bias=True),
    "qwen2-window": replace(_SMALL_LLAMA, architecture="qwen2", qkv_bias=True, sliding_window=6),
    "qwen3-window": replace(_SMALL_LLAMA, architecture="qwen3", qk_norm=True, head_dim=16, sliding_window=6),
}


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))


def _randomise(model: torch.nn.Module) -> None:
    """Move every parameter off its initial value: zero biases and unit norms would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def _save_theirs(config: Any, folder: Path, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    _randomise(model)
    model.save_pretrained(folder, **options)
    return model


def _make_ours(config: ModelConfig) -> Transformer:
    model = Transformer(config).eval()
    model.init_weights()
    _randomise(model)
    return model


@torch.no_grad()
def _our_logits(model: Transformer, input_ids: Tensor) -> Tensor:
    return model.compute_logits(model(input_ids))


@torch.no_grad()
def _our_logits_with_cache(model: Transformer, input_ids: Tensor, prompt: int = 9) -> Tensor:
    """The prompt at once, then a token at a time."""
    cache = model.new_dense_cache(batch_size=input_ids.shape[0])
    pieces = [input_ids[:, :prompt], *input_ids[:, prompt:].split(1, dim=1)]
    return torch.cat([model.compute_logits(model(piece, cache)) for piece in pieces], dim=1)


@torch.no_grad()
def _their_logits(model: Any, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids).logits


@pytest.mark.parametrize("name", THEIRS)
def test_their_models_run_in_ours(name: str, tmp_path: Path, input_ids: Tensor) -> None:
    theirs = _save_theirs(THEIRS[name](), tmp_path)
    expected = _their_logits(theirs, input_ids)
    ours = load_model(tmp_path)
    assert expected.std() > 0.1
    torch.testing.assert_close(_our_logits(ours, input_ids), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(_our_logits_with_cache(ours, input_ids), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", OURS)
def test_our_models_run_in_theirs(name: str, tmp_path: Path, input_ids: Tensor) -> None:
    ours = _make_ours(OURS[name])
    save_model(tmp_path / "saved", ours)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = _our_logits(ours, input_ids)
    torch.testing.assert_close(_their_logits(theirs.eval(), input_ids), expected, atol=TOLERANCE, rtol=0)
    back = load_model(tmp_path / "saved")
    torch.testing.assert_close(_our_logits(back, input_ids), expected, atol=1e-6, rtol=0)
    eos = theirs.generation_config.eos_token_id
    assert back.config.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))


@pytest.mark.parametrize("name", ["gpt2", "gpt1", "llama", "qwen3"])
def test_what_transformers_saves_again_is_what_we_saved(name: str, tmp_path: Path) -> None:
    """Same tensors under the same names: nothing was renamed, transposed or invented on the way."""
    config = OURS[name] if name in OURS else replace(OURS["qwen3-window"], sliding_window=None)
    save_model(tmp_path / "ours", _make_ours(config))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_shards_travel_both_ways(tmp_path: Path, input_ids: Tensor) -> None:
    theirs = _save_theirs(THEIRS["llama"](), tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    expected = _their_logits(theirs, input_ids)
    ours = load_model(tmp_path / "theirs")
    torch.testing.assert_close(_our_logits(ours, input_ids), expected, atol=TOLERANCE, rtol=0)
    save_model(tmp_path / "ours", ours, max_shard_bytes=20_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(_their_logits(again, input_ids), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(_our_logits(load_model(tmp_path / "ours"), input_ids), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "gpt1", "llama"])
def test_files_without_the_prefix_and_with_saved_constants(name: str, tmp_path: Path, input_ids: Tensor) -> None:
    """As OpenAI's own files are: base-model names, and the causal mask beside the weights."""
    theirs = _save_theirs(THEIRS[name](), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key.removeprefix("transformer.").removeprefix("model."): value for key, value in load_file(file).items()}
    if name == "llama":
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    else:
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril().to(torch.uint8)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file, metadata={"format": "pt"})
    expected = _their_logits(theirs, input_ids)
    torch.testing.assert_close(_our_logits(load_model(tmp_path), input_ids), expected, atol=TOLERANCE, rtol=0)


def test_transformers_4_spelling_of_rope(tmp_path: Path, input_ids: Tensor) -> None:
    theirs = _save_theirs(THEIRS["llama3"](), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    parameters = values.pop("rope_parameters")
    values |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters, "torch_dtype": "float32"}
    path.write_text(json.dumps(values))
    assert load_config(tmp_path).rope_scaling == _SCALING
    expected = _their_logits(theirs, input_ids)
    torch.testing.assert_close(_our_logits(load_model(tmp_path), input_ids), expected, atol=TOLERANCE, rtol=0)


def test_a_padded_vocabulary_is_cut_on_export(tmp_path: Path, input_ids: Tensor) -> None:
    for tied in (True, False):
        ours = _make_ours(create_config("gpt2", **_SMALL | {"vocab_size": 128}, tie_word_embeddings=tied))
        save_model(tmp_path / "cut", ours, vocab_size=VOCAB)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
        assert theirs.config.vocab_size == VOCAB
        expected = _our_logits(ours, input_ids)[..., :VOCAB]
        torch.testing.assert_close(_their_logits(theirs, input_ids), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("vocab_size", [0, -1, 97])
def test_the_exported_vocabulary_is_part_of_the_models(vocab_size: int) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        export_config(OURS["gpt2"], vocab_size)


def test_special_tokens_are_not_cut_off() -> None:
    with pytest.raises(ConfigError, match="eos_token_id"):
        export_config(replace(OURS["gpt2"], eos_token_id=90), 80)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    ours = _make_ours(OURS["gpt2"])
    save_model(tmp_path / "half", ours, dtype=dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert theirs.dtype == dtype
    back = load_model(tmp_path / "half")
    assert back.dtype == dtype
    for name, value in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.to(dtype))
    assert load_model(tmp_path / "half", dtype=torch.float32).dtype == torch.float32


def test_files_of_mixed_types_load_in_the_widest(tmp_path: Path) -> None:
    save_model(tmp_path / "m", _make_ours(OURS["llama"]), dtype=torch.bfloat16)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, file, metadata={"format": "pt"})
    assert load_model(tmp_path / "m", verify=False).dtype == torch.float32


@pytest.mark.parametrize("name", OURS)
def test_the_table_covers_every_parameter_once(name: str) -> None:
    config = export_config(OURS[name])
    table = tensor_table(config)
    assert {entry.parameter: entry.shape for entry in table} == parameter_shapes(config)
    names = [part.name for entry in table for part in entry.parts]
    assert len(names) == len(set(names))
    assert all(sum(part.rows for part in entry.parts) == entry.shape[0] for entry in table)


def test_gpt2_has_148_tensors_and_no_head() -> None:
    names = [part.name for entry in tensor_table(create_config("gpt2")) for part in entry.parts]
    assert len(names) == 148
    assert "lm_head.weight" not in names


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LN = "transformer.h.1.ln_1.bias"
STRICT: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(LN), rf"lacks the tensors {LN}"),
    "extra": (lambda t: t.update({"transformer.h.2.ln_1.bias": torch.ones(32)}), r"h\.2\.ln_1\.bias"),
    "misshapen": (lambda t: t.update({LN: torch.ones(31)}), rf"{LN} \[31\] instead of \[32\]"),
    "not transposed": (
        lambda t: t.update({"transformer.h.0.attn.c_attn.weight": torch.ones(96, 32)}),
        r"c_attn\.weight \[96, 32\] instead of \[32, 96\]",
    ),
    "integers": (lambda t: t.update({LN: torch.ones(32, dtype=torch.int32)}), rf"{LN} \(I32\)"),
    "float64": (lambda t: t.update({LN: torch.ones(32, dtype=torch.float64)}), rf"{LN} \(F64\)"),
    "nan": (lambda t: t[LN].fill_(float("nan")), f"{LN} holds values that are not finite"),
    "infinity": (lambda t: t[LN][3:4].fill_(float("-inf")), f"{LN} holds values that are not finite"),
    "another head": (lambda t: t.update({"lm_head.weight": torch.ones(VOCAB, 32)}), "tie_word_embeddings"),
}


@pytest.mark.parametrize("case", STRICT)
def test_files_must_be_exactly_what_the_configuration_says(case: str, tmp_path: Path) -> None:
    change, message = STRICT[case]
    save_model(tmp_path / "m", _make_ours(OURS["gpt2"]))
    _edit(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m", verify=False)


def test_only_the_first_few_names_are_shown(tmp_path: Path) -> None:
    save_model(tmp_path / "m", _make_ours(OURS["gpt2"]))
    _edit(tmp_path / "m", lambda tensors: [tensors.pop(name) for name in list(tensors) if ".h.1." in name])
    with pytest.raises(CheckpointError, match="and 7 more") as caught:
        load_model(tmp_path / "m", verify=False)
    assert len(str(caught.value)) < 1_000


def test_a_tied_head_saved_twice_is_accepted(tmp_path: Path) -> None:
    ours = _make_ours(OURS["gpt2"])
    save_model(tmp_path / "m", ours)
    _edit(tmp_path / "m", lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert torch.equal(load_model(tmp_path / "m", verify=False).embed_tokens.weight, ours.embed_tokens.weight)


def test_values_too_large_for_the_wanted_type_are_refused(tmp_path: Path) -> None:
    ours = _make_ours(OURS["gpt2"])
    with torch.no_grad():
        ours.embed_tokens.weight[0, 0] = 1e6
    save_model(tmp_path / "m", ours)
    with pytest.raises(CheckpointError, match=r"wte\.weight holds values that are not finite in float16"):
        load_model(tmp_path / "m", dtype=torch.float16)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    ours = _make_ours(OURS["llama"])
    with torch.no_grad():
        ours.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        save_model(tmp_path / "m", ours)
    assert not (tmp_path / "m").exists()
