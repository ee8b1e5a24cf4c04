"""Imported models compute what transformers computes with the same weights, to the last tokens of their vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from model.checkpoint import load_model, read_manifest
from model.hf_config import load_config
from model.tokenizer import Tokenizer
from tests.training.foreign_checkpoints import (
    CHARACTERS,
    CONTEXT,
    litgpt_settings,
    litgpt_weights,
    llmc_bytes,
    logits_of,
    make_gpt2,
    make_llama,
    nanogpt_content,
    randomise,
    without_biases,
    write_litgpt,
)
from training.importers.convert import ImportRequest, ImportResult, import_model

GPT2_TOKENS = 50_257


def imported_logits(folder: Path, ids: Tensor) -> Tensor:
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.compute_logits(model(ids))


def tokens(vocab_size: int) -> Tensor:
    """Two rows over the whole context, with the first and the last token of the vocabulary."""
    ids = torch.randint(vocab_size, (2, CONTEXT), generator=torch.Generator().manual_seed(5))
    ids[0, 0], ids[1, 0] = 0, vocab_size - 1
    return ids


def assert_same(folder: Path, expected: Tensor, ids: Tensor) -> None:
    """Ours and transformers' reading of the folder against the logits of the model it was made from."""
    ours = imported_logits(folder, ids)
    assert ours.shape == expected.shape
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits_of(theirs, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def characters(tmp_path: Path) -> Path:
    path = tmp_path / "input.txt"
    path.write_text("".join(reversed(CHARACTERS)) * 3, encoding="utf-8")
    return path


def bring_in(source: Path, out: Path, **options: Any) -> ImportResult:
    return import_model(ImportRequest(source, out, **options))


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_nanogpt_of_characters(bias: bool, prefix: str, tmp_path: Path, characters: Path) -> None:
    model = make_gpt2(len(CHARACTERS), "gelu")
    if not bias:
        without_biases(model)
    torch.save(nanogpt_content(model, bias=bias, prefix=prefix), tmp_path / "ckpt.pt")
    result = bring_in(tmp_path / "ckpt.pt", tmp_path / "out", characters=characters)
    ids = tokens(len(CHARACTERS))
    assert_same(tmp_path / "out", logits_of(model, ids), ids)
    assert (result.format, result.padding, result.dtype) == ("nanogpt", 0, torch.float32)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest.provenance.step, manifest.provenance.validation_loss) == (20, 2.5)
    config = load_config(tmp_path / "out")
    assert (config.dropout, config.eos_token_ids) == (0.1, ())
    text = "naïf, a jazz!".replace("ï", "é")
    expected = [sorted(CHARACTERS).index(char) for char in text]
    assert Tokenizer.load(tmp_path / "out").encode(text) == expected
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.decode(expected) == text


def test_nanogpt_of_gpt2_tokens_loses_its_padding(tmp_path: Path) -> None:
    model = make_gpt2(50_304, "gelu")
    torch.save(nanogpt_content(model), tmp_path / "ckpt.pt")
    result = bring_in(tmp_path, tmp_path / "out")  # the run folder, with GPT-2's tokenizer understood
    assert result.padding == 50_304 - GPT2_TOKENS
    ids = tokens(GPT2_TOKENS)
    assert_same(tmp_path / "out", logits_of(model, ids)[..., :GPT2_TOKENS], ids)
    assert load_config(tmp_path / "out").eos_token_id == 50_256
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Hello world")["input_ids"] == [15496, 995]


def test_nanogpt_of_an_older_torch(tmp_path: Path, characters: Path) -> None:
    """A file of the kind before zip archives, with the causal masks of a torch without fused attention."""
    model = make_gpt2(len(CHARACTERS), "gelu")
    content = nanogpt_content(model)
    content["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril()
    torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    bring_in(tmp_path / "ckpt.pt", tmp_path / "out", characters=characters, dtype=torch.bfloat16)
    assert load_model(tmp_path / "out").dtype == torch.bfloat16
    rounded = model.bfloat16().float()
    ids = tokens(len(CHARACTERS))
    torch.testing.assert_close(imported_logits(tmp_path / "out", ids), logits_of(rounded, ids), rtol=1e-4, atol=1e-4)


ORDER = list("cab")


@pytest.mark.parametrize(
    "vocabulary",
    [
        ORDER,
        {"stoi": {"c": 0, "a": 1, "b": 2}},
        {"stoi": {"b": 2, "c": 0, "a": 1}, "itos": {"0": "c"}, "vocab_size": 3},
        {"itos": {"2": "b", "0": "c", "1": "a"}},
        {"itos": ORDER},
    ],
    ids=["list", "stoi", "meta", "itos", "itos list"],
)
def test_a_character_vocabulary_in_json_keeps_its_order(vocabulary: object, tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(vocabulary))
    torch.save(nanogpt_content(make_gpt2(3, "gelu")), tmp_path / "ckpt.pt")
    bring_in(tmp_path / "ckpt.pt", tmp_path / "out", characters=path)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.encode("abc") == [1, 2, 0]
    assert (tokenizer.decode([0, 1, 2]), tokenizer.kind) == ("cab", "characters")


def test_a_vocabulary_from_text_reads_line_ends_as_python_does(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"ab\r\na\r\n")
    torch.save(nanogpt_content(make_gpt2(3, "gelu")), tmp_path / "ckpt.pt")
    bring_in(tmp_path / "ckpt.pt", tmp_path / "out", characters=path)
    assert Tokenizer.load(tmp_path / "out").encode("\nab") == [0, 1, 2]


@pytest.fixture
def lit_tokenizer() -> Tokenizer:
    return Tokenizer.characters(CHARACTERS)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8}


@pytest.mark.parametrize("grouped", [False, True], ids=["qkv", "attn"])
@pytest.mark.parametrize("heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("whole_state", [False, True], ids=["weights", "state"])
def test_litgpt_llama(grouped: bool, heads: int, whole_state: bool, tmp_path: Path, lit_tokenizer: Tokenizer) -> None:
    model = make_llama(num_key_value_heads=heads)
    weights: dict[str, Any] = litgpt_weights(model, grouped=grouped)
    if whole_state:
        weights = {"model": {f"_orig_mod.{n}": t for n, t in weights.items()}, "step_count": 12, "iter_num": 48}
    folder = write_litgpt(tmp_path / "lit", weights, litgpt_settings(model))
    lit_tokenizer.save(folder)
    result = bring_in(folder / "lit_model.pth", tmp_path / "out")
    count = lit_tokenizer.vocab_size
    ids = tokens(count)
    assert_same(tmp_path / "out", logits_of(model, ids)[..., :count], ids)
    assert (result.format, result.padding, result.config.architecture) == ("litgpt", 64 - count, "llama")
    assert result.manifest.provenance.step == (12 if whole_state else None)
    assert load_config(tmp_path / "out").eos_token_id == lit_tokenizer.eos_token_id


def test_litgpt_llama_3_with_a_tied_head_and_several_stop_tokens(tmp_path: Path, lit_tokenizer: Tokenizer) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8}  # fmt: skip
    model = make_llama(tie_word_embeddings=True, rope_parameters=rope, head_dim=16, num_attention_heads=2)
    settings = litgpt_settings(model, rope_adjustments=LLAMA3, rope_base=500)
    folder = write_litgpt(tmp_path / "lit", litgpt_weights(model), settings)
    lit_tokenizer.save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5, 63]}))
    bring_in(folder, tmp_path / "out", format="litgpt")
    ids = tokens(lit_tokenizer.vocab_size)
    assert_same(tmp_path / "out", logits_of(model, ids)[..., : lit_tokenizer.vocab_size], ids)
    config = load_config(tmp_path / "out")
    assert (config.tie_word_embeddings, config.eos_token_id) == (True, (3, 5))  # 63 is a row of padding


def test_litgpt_with_biases(tmp_path: Path, lit_tokenizer: Tokenizer) -> None:
    model = make_llama(attention_bias=True, mlp_bias=True)
    folder = write_litgpt(tmp_path / "lit", litgpt_weights(model, grouped=True), litgpt_settings(model, bias=True))
    lit_tokenizer.save(folder)
    bring_in(folder, tmp_path / "out")
    ids = tokens(lit_tokenizer.vocab_size)
    assert_same(tmp_path / "out", logits_of(model, ids)[..., : lit_tokenizer.vocab_size], ids)


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "head_dim": 8,
         "bos_token_id": None, "eos_token_id": None}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_litgpt_relatives_of_llama(family: str, tmp_path: Path, lit_tokenizer: Tokenizer) -> None:
    changes: dict[str, Any]
    if family == "qwen2":
        model, changes = Qwen2ForCausalLM(Qwen2Config(**SMALL)), {"attn_bias": True}
        model.config.head_dim = 8
    elif family == "qwen3":
        model, changes = Qwen3ForCausalLM(Qwen3Config(**SMALL)), {"norm_qk": True}
    else:
        from transformers import MistralConfig, MistralForCausalLM

        model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6, attn_implementation="eager"))
        changes = {"sliding_window_size": 6, "sliding_window_indices": [1] * 5}
    randomise(model, 2)
    folder = write_litgpt(tmp_path / "lit", litgpt_weights(model), litgpt_settings(model, **changes))
    lit_tokenizer.save(folder)
    assert bring_in(folder, tmp_path / "out").config.architecture == family
    ids = tokens(lit_tokenizer.vocab_size)
    assert_same(tmp_path / "out", logits_of(model, ids)[..., : lit_tokenizer.vocab_size], ids)


@pytest.mark.parametrize("version", [3, 5], ids=["float32", "bfloat16"])
def test_llmc(version: int, tmp_path: Path) -> None:
    model = make_gpt2(GPT2_TOKENS, "gelu_new")
    if version == 5:
        model = model.bfloat16().float()
    path = tmp_path / "model_00000020.bin"
    path.write_bytes(llmc_bytes(model, version, 50_304))
    result = bring_in(path, tmp_path / "out")
    assert (result.format, result.padding) == ("llmc", 47)
    assert load_model(tmp_path / "out").dtype == {3: torch.float32, 5: torch.bfloat16}[version]
    ids = tokens(GPT2_TOKENS)
    assert_same(tmp_path / "out", logits_of(model, ids), ids)
