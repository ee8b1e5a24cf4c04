"""From the model section to weights: transformers says what each family computes, closed forms how large it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from model.checkpoint import save_model
from model.config import ModelConfig, count_parameters
from model.errors import CheckpointError
from model.hf import parameter_shapes
from model.presets import PRESETS
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.build import make_model, make_model_config
from training.config import TrainConfig
from training.errors import RecipeError
from training.recipe import build_config

SIZES: dict[str, object] = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "max_seq_len": 24}
FAMILIES = ("gpt2", "openai-gpt", "llama", "mistral", "qwen2", "qwen3")
BYTES = Tokenizer.bytes()


def recipe(model: dict[str, object], **train: object) -> TrainConfig:
    return build_config({"data": {"dir": "d"}, "run": {"dir": "r"}, "model": model, "train": {"seq_len": 16} | train})


def config_of(model: dict[str, object], tokenizer: Tokenizer = BYTES) -> ModelConfig:
    return make_model_config(recipe(model), tokenizer)


def logits(model: Transformer, ids: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model.compute_logits(model(ids))


def some_ids() -> Tensor:
    return torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(3))


def randomised(model: Transformer, seed: int = 5) -> Transformer:
    """No parameter at its initial value, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.2, generator=generator)
    return model


# --- families ---


@pytest.mark.parametrize(
    ("model", "class_name"),
    [
        ({"architecture": "gpt2"}, "GPT2LMHeadModel"),
        ({"architecture": "gpt2", "activation": "silu", "bias": False, "intermediate_size": 48}, "GPT2LMHeadModel"),
        ({"architecture": "openai-gpt", "activation": "relu"}, "OpenAIGPTLMHeadModel"),
        ({"architecture": "llama", "num_kv_heads": 2, "rope_theta": 500.0}, "LlamaForCausalLM"),
        ({"architecture": "llama", "bias": True, "tie_word_embeddings": False}, "LlamaForCausalLM"),
        ({"architecture": "mistral", "num_kv_heads": 1, "sliding_window": 4}, "MistralForCausalLM"),
        ({"architecture": "qwen2", "num_kv_heads": 2, "sliding_window": 5}, "Qwen2ForCausalLM"),
        ({"architecture": "qwen3", "num_kv_heads": 2, "activation": "gelu_tanh"}, "Qwen3ForCausalLM"),
        ({"architecture": "qwen3", "bias": True, "vocab_multiple": 64}, "Qwen3ForCausalLM"),
    ],
)
def test_transformers_computes_what_a_recipe_of_each_family_computes(
    model: dict[str, object], class_name: str, tmp_path: Path
) -> None:
    config = recipe(SIZES | model)
    ours = randomised(make_model(config, make_model_config(config, BYTES)))
    save_model(tmp_path / "saved", ours, tokenizer=BYTES, vocab_size=BYTES.vocab_size)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert type(theirs).__name__ == class_name
    with torch.no_grad():
        expected = theirs(some_ids()).logits
    torch.testing.assert_close(logits(ours, some_ids())[..., :257], expected, rtol=2e-4, atol=2e-4)


def test_the_vocabulary_is_padded_behind_the_special_tokens() -> None:
    config = config_of(SIZES | {"architecture": "llama", "vocab_multiple": 128})
    assert (config.vocab_size, config.eos_token_id) == (384, 256)
    gpt2 = config_of({"preset": "gpt2", "vocab_multiple": 128}, Tokenizer.gpt2())
    assert (gpt2.vocab_size, gpt2.bos_token_id, gpt2.eos_token_id) == (50_304, 50_256, 50_256)


def test_a_gated_mlp_is_by_default_as_large_as_a_plain_one_of_four_times_the_width() -> None:
    plain, gated = (config_of(SIZES | {"architecture": name, "hidden_size": 384}) for name in ("gpt2", "llama"))
    assert 3 * gated.intermediate_size == 2 * plain.intermediate_size == 2 * 4 * 384


# Closed forms by hand, and the sizes that the seeds state: gpt2 124M, untied 163M, GPT-1 117M, medium 355M,
# large 774M, tiny to large 6.03M, 16.42M, 116.41M, 398.51M.
PRESET_SIZES = {
    "gpt2": 124_439_808, "gpt2-untied": 163_037_184, "openai-gpt": 116_534_784,
    "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "llama-tiny": 6_031_616, "llama-small": 16_421_760, "llama-medium": 116_411_136, "llama-large": 398_509_056,
    "tiny": 6_031_616, "large": 398_509_056,
    # nanoGPT's 10.65M leaves the 256 positions out.
    "shakespeare-char": 10_646_784 + 256 * 384,
}  # fmt: skip


@pytest.mark.parametrize(("preset", "parameters"), PRESET_SIZES.items())
def test_presets_have_the_published_sizes(preset: str, parameters: int) -> None:
    vocab_size = {"tiny": 8_192, "large": 32_768}.get(preset) or PRESETS[preset].vocab_size
    tokenizer = Tokenizer.characters((chr(0xE000 + i) for i in range(vocab_size)), end_of_text=False)
    config = config_of({"preset": preset}, tokenizer)
    assert config.vocab_size == vocab_size
    assert count_parameters(config) == parameters
    assert sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values()) == parameters


def test_every_preset_has_its_size_tested() -> None:
    assert PRESETS.keys() <= PRESET_SIZES.keys()


# --- initial weights ---


def test_new_weights_are_decided_by_the_seed_alone() -> None:
    config = recipe(SIZES | {"architecture": "qwen3"}, seed=1)
    model_config = make_model_config(config, BYTES)
    torch.manual_seed(11)
    first = make_model(config, model_config).state_dict()
    torch.manual_seed(12)
    second = make_model(config, model_config).state_dict()
    other = make_model(recipe(SIZES | {"architecture": "qwen3"}, seed=2), model_config).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])
    assert {(tensor.dtype, tensor.device.type) for tensor in first.values()} == {(torch.float32, "cpu")}


HF_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "max_position_embeddings": 24, "head_dim": 8}  # fmt: skip
GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
IDS = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "tie_word_embeddings": True}
HF_CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(**GPT_SIZES, **IDS),
    "openai-gpt": OpenAIGPTConfig(**GPT_SIZES, **IDS),
    "llama": LlamaConfig(**HF_SIZES, **IDS),
    "mistral": MistralConfig(**HF_SIZES, **IDS, sliding_window=6),
    "qwen2": Qwen2Config(**HF_SIZES, **(IDS | {"tie_word_embeddings": False})),
    "qwen3": Qwen3Config(**HF_SIZES, **IDS),
}


def hf_folder(folder: Path, family: str = "gpt2", tokenizer: Tokenizer | None = BYTES) -> Path:
    torch.manual_seed(8)
    AutoModelForCausalLM.from_config(HF_CONFIGS[family]).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_from_the_weights_of_a_hugging_face_folder(family: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", family)
    config = recipe({"init_from": str(folder), "dropout": 0.25, "vocab_multiple": 64})
    model = make_model(config, make_model_config(config, BYTES))
    assert (model.config.dropout, model.config.vocab_size, model.training) == (0.25, 320, True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()(some_ids()).logits
    torch.testing.assert_close(logits(model, some_ids())[..., :257], expected, rtol=1e-4, atol=1e-5)
    head = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    for weight in (model.embed_tokens.weight, head):  # rows that no token has: see test_resize.py
        spread, mean = torch.std_mean(weight[:257], dim=0)
        assert ((weight[257:] - mean).abs() < 0.05 * spread).all()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_folder_decides_what_the_recipe_leaves_open(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    config = config_of({"init_from": str(folder)})
    assert (config.num_layers, config.dropout, config.vocab_size) == (2, 0.1, 257)
    repeated = {"architecture": "gpt2", "num_layers": 2, "max_seq_len": 24, "bias": True, "activation": "gelu_tanh"}
    assert config_of({"init_from": str(folder)} | repeated) == config


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("num_layers", 3, 2), ("num_heads", 2, 4), ("hidden_size", 64, 32), ("max_seq_len", 32, 24),
        ("activation", "relu", "gelu_tanh"), ("bias", False, True), ("tie_word_embeddings", False, True),
        ("architecture", "llama", "gpt2"), ("sliding_window", 8, None),
    ],
)  # fmt: skip
def test_a_key_that_contradicts_the_folder_is_named(key: str, value: object, found: object, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    with pytest.raises(RecipeError, match=f"model.{key} is {value} but {found} in {folder}"):
        config_of({"init_from": str(folder), key: value})


def test_a_preset_beside_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.preset is gpt2 but model\.init_from gives every size"):
        config_of({"init_from": str(hf_folder(tmp_path / "hf")), "preset": "gpt2"})


def test_the_data_must_have_the_folder_s_tokenizer(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", tokenizer=BYTES)
    model: dict[str, object] = {"init_from": str(folder)}
    assert config_of(model, Tokenizer.load(folder)).eos_token_id == 256
    with pytest.raises(RecipeError, match=r"another tokenizer .* prepare it with --tokenizer"):
        config_of(model, Tokenizer.characters("abc"))
    with pytest.raises(RecipeError, match="token ids beyond the vocabulary: its tokenizer has 50257 tokens"):
        config_of(model, Tokenizer.gpt2())


def test_without_a_tokenizer_in_the_folder_the_sizes_must_fit(tmp_path: Path) -> None:
    model: dict[str, object] = {"init_from": str(hf_folder(tmp_path / "hf", tokenizer=None))}
    assert config_of(model, BYTES).vocab_size == 257
    with pytest.raises(RecipeError, match="another tokenizer"):  # its end-of-text token is beyond these 250
        config_of(model, Tokenizer.characters(chr(0xE000 + i) for i in range(249)))
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 320}))
    (tmp_path / "hf" / "generation_config.json").unlink()
    assert config_of(model, BYTES).vocab_size == 320  # a padded vocabulary
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 2_000}))
    with pytest.raises(RecipeError, match="another tokenizer"):
        config_of(model, BYTES)


def test_a_folder_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.init_from: .*absent is neither a folder"):
        config_of({"init_from": str(tmp_path / "absent")})
    folder = hf_folder(tmp_path / "hf")
    with pytest.raises(RecipeError, match=r"train\.seq_len is 99 but the model's max_seq_len is only 24"):
        make_model_config(recipe({"init_from": str(folder)}, seq_len=99), BYTES)
    config = recipe({"init_from": str(folder)})
    model_config = make_model_config(config, BYTES)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        make_model(config, model_config)


# --- what cannot be trained or saved ---


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"architecture": "gpt2", "num_kv_heads": 2}, r"\[model\] num_kv_heads and head_dim must follow .*GPT2LMHead"),
        ({"architecture": "gpt2", "sliding_window": 8}, r"sliding_window is 8, and GPT2LMHeadModel has no such form"),
        ({"architecture": "llama", "sliding_window": 8}, r"sliding_window is 8, and LlamaForCausalLM has no such form"),
        ({"architecture": "mistral", "bias": True}, r"qkv_bias is True, and MistralForCausalLM has no such form"),
        ({"architecture": "qwen2", "bias": False}, r"qkv_bias is False, and Qwen2ForCausalLM has no such form"),
        ({"architecture": "openai-gpt", "activation": "gelu"}, r"activation is 'gelu', and OpenAIGPTLMHeadModel"),
        ({"architecture": "openai-gpt", "intermediate_size": 64}, "intermediate_size is not 4 times hidden_size"),
        ({"architecture": "llama", "num_kv_heads": 3}, r"\[model\] num_heads must be a multiple of num_kv_heads"),
        ({"architecture": "llama", "num_heads": 32}, r"\[model\] head_dim must be even"),
        ({"architecture": "llama", "num_layers": 0}, "model.num_layers is 0 but must be at least 1"),
        ({"architecture": "llama", "dropout": 1.5}, r"\[model\] dropout must lie in"),
        ({"architecture": "llama", "intermediate_size": -4}, r"\[model\] intermediate_size must be a positive integer"),
        ({"architecture": "llama", "rope_theta": -1.0}, r"\[model\] rope_theta must be a positive number"),
        ({"architecture": "llama", "num_layers": 5_000}, r"\[model\] .*num_hidden_layers"),
        ({"preset": "gpt3"}, r"\[model\] preset 'gpt3' is unknown; choose one of gpt2,"),
        ({"preset": "gpt2", "hidden_size": 100}, r"\[model\] hidden_size must be a multiple of num_heads"),
        ({"preset": "gpt2", "architecture": "llama"}, r"model.architecture is llama but model.preset gpt2 is a gpt2"),
        ({}, "model.preset is not set"),
    ],
)
def test_a_model_that_could_not_be_saved_is_refused_before_it_is_trained(
    model: dict[str, object], message: str
) -> None:
    sizes = {} if "preset" in model or not model else SIZES
    with pytest.raises(RecipeError, match=message):
        config_of(sizes | model)
