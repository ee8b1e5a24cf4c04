"""Exports load in a fresh transformers, compute what their source computes, and tell where they come from."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import training.export
from model.checkpoint import Provenance, load_model, read_manifest, save_model
from model.config import ModelConfig, gpt2_config, llama_config
from model.errors import CheckpointError, ConfigError, QuillError
from model.hf import export_config, to_hf
from model.hf_config import config_to_hf
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from tests.training.conftest import Command, ConfigMaker, train
from training.errors import RecipeError
from training.export import export_checkpoint, parse_size

TEXT = "A quill writes; naïve ink, 1234 times!\n"
TOKENIZERS = {"gpt2": Tokenizer.gpt2, "characters": lambda: Tokenizer.characters(TEXT), "bytes": Tokenizer.bytes}
FACTS = Provenance(step=12_000, run="run-1a2b", data="sha256:" + "ab" * 32, validation_loss=1.25, bits_per_byte=1.8)


def make_model(family: str, tokenizer: Tokenizer, vocab_size: int) -> Transformer:
    """Random weights, biases and norms too; GPT without biases, which its files always have."""
    if family == "gpt2":
        config = dataclasses.replace(
            gpt2_config(2, 2, 16, vocab_size=vocab_size, max_seq_len=48), activation="gelu",
            qkv_bias=False, o_bias=False, mlp_bias=False, norm_bias=False,
        )  # fmt: skip
    else:
        config = llama_config(2, 4, 2, 16, 24, vocab_size=vocab_size, max_seq_len=48, tie_word_embeddings=False)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return randomised(dataclasses.replace(config, **ids))  # type: ignore[arg-type]


def randomised(config: ModelConfig) -> Transformer:
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.5 * (parameter.dim() == 1))
    return model


def logits_of(model: Transformer, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.compute_logits(model(ids))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small Llama of characters whose vocabulary is padded."""
    tokenizer = TOKENIZERS["characters"]()
    save_model(tmp_path / "source", make_model("llama", tokenizer, 64), tokenizer=tokenizer, provenance=FACTS)
    return tmp_path / "source"


@pytest.fixture
def run_folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A run that has been trained: every checkpoint tells its own step."""
    tokenizer = Tokenizer.load(checkpoint)
    model = load_model(checkpoint)
    for name, step in (("best", 8), ("last", 12), ("step-12", 12)):
        facts = dataclasses.replace(FACTS, step=step)
        save_model(tmp_path / "run" / "checkpoints" / name, model, tokenizer=tokenizer, provenance=facts)
    (tmp_path / "run" / "config.toml").write_text(
        '[data]\ndir = "somebody/data"\n\n[train]\nlr = 1e-3\nbatch_size = 8\n\n[run]\ndir = "somebody/run"\n'
    )
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("family", "kind"), [("gpt2", "gpt2"), ("gpt2", "characters"), ("llama", "characters"), ("llama", "bytes")]
)
def test_a_fresh_transformers_loads_it(kind: str, family: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    padded = -(-tokenizer.vocab_size // 64) * 64
    model = make_model(family, tokenizer, padded)
    save_model(tmp_path / "source", model, tokenizer=tokenizer, provenance=FACTS)
    result = export_checkpoint(tmp_path / "source", tmp_path / "out")
    assert (result.padding, result.dtype, result.rounding_error) == (padded - tokenizer.vocab_size, torch.float32, 0.0)
    if kind == "gpt2":
        check_what_llama_cpp_reads(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.encode(TEXT)
    assert their_tokenizer(TEXT)["input_ids"] == ids
    assert their_tokenizer.decode(ids) == TEXT
    assert their_tokenizer.eos_token_id == tokenizer.eos_token_id == theirs.generation_config.eos_token_id
    prompt = torch.tensor([[*ids[:20], tokenizer.vocab_size - 1]])
    with torch.no_grad():
        found = theirs(prompt).logits
    assert found.shape[-1] == len(their_tokenizer) == tokenizer.vocab_size
    expected = logits_of(model, prompt)[..., : tokenizer.vocab_size]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def check_what_llama_cpp_reads(folder: Path) -> None:
    """The fields and names of checkpoints by transformers 4, for which its converter was made."""
    config = json.loads((folder / "config.json").read_text())
    read = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_ctx": 48, "n_positions": 48,
            "n_embd": 16, "n_head": 2, "layer_norm_epsilon": 1e-5, "vocab_size": 50_257, "torch_dtype": "float32",
            "eos_token_id": 50_256, "bos_token_id": 50_256}  # fmt: skip
    assert {name: config[name] for name in read} == read
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("transformer.wte.weight").get_shape() == [50_257, 16]
        assert file.get_slice("transformer.h.0.attn.c_attn.weight").get_shape() == [16, 48]
        assert not file.get_tensor("transformer.h.1.mlp.c_fc.bias").any()
    document = json.loads((folder / "tokenizer.json").read_text())
    assert (document["model"]["type"], len(document["model"]["merges"])) == ("BPE", 50_000)


@pytest.mark.parametrize(("name", "least"), [("bfloat16", 1e-4), ("float16", 1e-6)])
def test_rounding_is_measured_and_told_from_faults(name: str, least: float, checkpoint: Path, tmp_path: Path) -> None:
    dtype = getattr(torch, name)
    result = export_checkpoint(checkpoint, tmp_path / "out", dtype=dtype)
    assert load_model(tmp_path / "out").dtype == dtype
    assert least < result.rounding_error < 0.05
    assert result.export_error < 1e-6
    source, rounded = load_model(checkpoint), load_model(checkpoint, dtype=dtype)
    ids = torch.linspace(0, Tokenizer.load(checkpoint).vocab_size - 1, 32).round().long()[None]
    exact, less = (logits_of(model.float(), ids)[..., : result.vocab_size] for model in (source, rounded))
    assert result.rounding_error == pytest.approx(((exact - less).abs().max() / exact.abs().max()).item(), rel=1e-3)


def test_an_export_that_computes_something_else_is_not_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(folder: Path, config: ModelConfig, state: Mapping[str, Tensor], **options: Any) -> Any:
        name = "layers.1.attn.o_proj.weight"
        return save(folder, config, {**state, name: state[name].flip(0)}, **options)

    save = training.export.save_state_dict
    monkeypatch.setattr(training.export, "save_state_dict", faulty)
    with pytest.raises(CheckpointError, match="does not compute what its source does"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_large_weights_are_split(checkpoint: Path, tmp_path: Path) -> None:
    result = export_checkpoint(checkpoint, tmp_path / "out", max_shard_bytes=parse_size("4KB"))
    shards = [name for name in result.manifest.files if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert "model.safetensors.index.json" in result.manifest.files
    ids = torch.arange(10)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(theirs, logits_of(load_model(tmp_path / "out"), ids), rtol=1e-4, atol=1e-5)


def test_the_facts_travel_with_the_model(run_folder: Path, tmp_path: Path) -> None:
    export_checkpoint(run_folder, tmp_path / "out", dtype=torch.bfloat16)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.provenance == dataclasses.replace(FACTS, step=8)
    assert set(manifest.files) == {path.name for path in (tmp_path / "out").iterdir()} - {"manifest.json"}
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        *("# out\n", "LlamaForCausalLM", "4 heads of 4 over 2", "bfloat16", "| training steps | 8 |", "1.2500 nats"),
        *("1.8000", "run-1a2b", "sha256:abab", "lr = 0.001", "batch_size = 8"),
    ):
        assert fact in card
    assert "somebody" not in card
    parameters = sum(tensor.numel() for tensor in load_model(tmp_path / "out").parameters())
    assert f"{parameters:,} parameters" in card


def test_a_card_states_only_what_is_known(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    export_checkpoint(checkpoint, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vocabulary" in card
    assert not any(word in card for word in ("None", "training steps", "loss", "Recipe"))


@pytest.mark.parametrize(("which", "step"), [(None, 8), ("best", 8), ("last", 12), ("step-12", 12)])
def test_a_runs_checkpoints(which: str | None, step: int, run_folder: Path, tmp_path: Path) -> None:
    result = export_checkpoint(run_folder, tmp_path / "out", which=which)
    assert result.source == run_folder / "checkpoints" / (which or "best")
    assert result.manifest.provenance.step == step


def test_a_trained_run_through_the_command_line(
    make_config: ConfigMaker, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(model__vocab_multiple=64)
    train(config)
    capsys.readouterr()
    arguments = ["export", config.run.dir, "--out", str(tmp_path / "out"), "--which", "last", "--dtype", "bfloat16"]
    status, out, _ = command(*arguments, "--json")
    assert status == 0
    values = json.loads(out)
    assert (values["step"], values["vocab_size"], values["dtype"]) == (8, 257, "bfloat16")
    assert "tokenizer.json" in values["files"]
    run_the_cards_example(tmp_path / "out", "the quill")
    assert capsys.readouterr().out.startswith("the quill")
    status, out, err = command(*arguments)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {tmp_path / 'out'} is not empty")


def run_the_cards_example(folder: Path, prompt: str) -> None:
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(code[1].replace(f'"{folder.name}"', repr(str(folder))).replace('"..."', repr(prompt)), {})


def refusal(source: Path, out: Path, **options: Any) -> str:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(QuillError) as caught:
        export_checkpoint(source, out, **options)
    assert sorted(out.parent.rglob("*")) == before
    return str(caught.value)


def test_sources_that_cannot_be_exported(checkpoint: Path, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    out.parent.mkdir()
    assert "holds neither config.json nor checkpoints" in refusal(tmp_path / "nowhere", out)
    assert "is a checkpoint itself" in refusal(checkpoint, out, which="best")
    assert "holds no step-3; give --which best, last, step-12" in refusal(run_folder, out, which="step-3")
    assert "holds no ..; give --which" in refusal(run_folder, out, which="..")
    (tmp_path / "fresh" / "checkpoints").mkdir(parents=True)
    assert "holds no best; train until it saves one" in refusal(tmp_path / "fresh", out)
    assert "is not empty" in refusal(checkpoint, tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(checkpoint, tmp_path / "file")
    Tokenizer.bytes().save(checkpoint)
    (checkpoint / "manifest.json").unlink()
    assert "has a tokenizer of 257 tokens but a model of only 64" in refusal(checkpoint, out)
    (checkpoint / "tokenizer.json").unlink()
    assert "tokenizer.json does not exist" in refusal(checkpoint, out)


def test_a_damaged_source_is_told_from_its_manifest(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert "model.safetensors differs from its sha256" in refusal(checkpoint, tmp_path / "new" / "out")


def test_weights_beyond_float16_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(checkpoint)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[0, 0] = 1e6
    save_model(checkpoint, model, tokenizer=Tokenizer.load(checkpoint))
    out = tmp_path / "new" / "out"
    out.parent.mkdir()
    assert "layers.1.mlp.down_proj.weight holds values that are not finite" in refusal(
        checkpoint, out, dtype=torch.float16
    )


def test_a_model_that_no_class_of_transformers_computes(tmp_path: Path) -> None:
    """Three heads of 8 on a width of 32: this package runs it, transformers' Llama does not."""
    config = llama_config(1, 4, 1, 32, 24, vocab_size=64, max_seq_len=16)
    odd = dataclasses.replace(config, num_heads=3)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, "float32") | {"num_attention_heads": 3}))
    tensors = to_hf(odd, export_config(odd), randomised(odd).state_dict(), torch.float32)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    Tokenizer.characters(TEXT).save(folder)
    assert load_model(folder).config == odd
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no such form, so this model cannot be exported"):
        export_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "500mb": 5 * 10**8, "1.5 KB": 1_500, "2GiB": 2**31, "4096": 4096}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "GB", "5 parsecs", "-1GB", "0", "1e3"):
        with pytest.raises(RecipeError, match="--max-shard-size is"):
            parse_size(text)
