"""Checkpoints as nanoGPT, litgpt and llm.c write them, made from transformers' models with random weights."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

CHARACTERS = "\n !,.abcdefghijklmnopqrstuvwxyzé"
CONTEXT = 24


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Every tensor random, biases and norms too, and large enough that a confusion of two shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (0.5 * (parameter.dim() == 1)))
    return model.eval()


def make_gpt2(vocab_size: int, activation: str, *, seed: int = 0) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=CONTEXT, n_embd=24, n_layer=3, n_head=4, activation_function=activation,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return randomise(GPT2LMHeadModel(config), seed)


def make_llama(**changes: Any) -> LlamaForCausalLM:
    values: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "bos_token_id": None,
        "eos_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    return randomise(LlamaForCausalLM(LlamaConfig(**(values | changes))), 1)


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


# nanoGPT: GPT-2's names, weights [out, in], the tied head beside the embedding.


def nanogpt_content(model: GPT2LMHeadModel, *, bias: bool = True, prefix: str = "") -> dict[str, Any]:
    weights = {}
    for name, tensor in model.state_dict().items():
        is_product = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[f"{prefix}{name}"] = tensor.t().contiguous() if is_product else tensor
    weights[f"{prefix}lm_head.weight"] = weights[f"{prefix}transformer.wte.weight"]
    if not bias:
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".bias")}
    config = model.config
    return {
        "model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "model_args": {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "bias": bias,
                       "block_size": config.n_positions, "vocab_size": config.vocab_size, "dropout": 0.1},
        "iter_num": 20,
        "best_val_loss": torch.tensor(2.5),
        "config": {"out_dir": "out", "dataset": "shakespeare_char"},
    }  # fmt: skip


def without_biases(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    return model


# litgpt: q, k and v in one matrix, fc_1 the gate and fc_2 what it gates.


def litgpt_settings(model: LlamaForCausalLM, **changes: Any) -> dict[str, Any]:
    config = model.config
    return {
        "name": "tiny", "hf_config": {"name": "tiny", "org": "me"}, "block_size": config.max_position_embeddings,
        "n_layer": config.num_hidden_layers, "n_embd": config.hidden_size, "vocab_size": config.vocab_size,
        "padding_multiple": 64, "padded_vocab_size": config.vocab_size, "norm_class_name": "RMSNorm",
        "norm_eps": config.rms_norm_eps, "norm_qk": False, "norm_qk_type": "default", "post_attention_norm": False,
        "parallel_residual": False, "shared_attention_norm": False, "n_head": config.num_attention_heads,
        "head_size": config.head_dim, "n_query_groups": config.num_key_value_heads, "attn_bias": False,
        "attention_scores_scalar": None, "sliding_window_size": None, "sliding_window_indices": None,
        "rope_base": 10000, "rotary_percentage": 1.0, "rope_condense_ratio": 1, "rope_adjustments": None,
        "intermediate_size": config.intermediate_size, "bias": False, "mlp_class_name": "LLaMAMLP",
        "gelu_approximate": "none", "n_expert": 0, "scale_embeddings": False, "lm_head_bias": False,
    } | changes  # fmt: skip


def litgpt_weights(model: LlamaForCausalLM, *, grouped: bool = False) -> dict[str, Tensor]:
    """`grouped`: the older placement, each group's queries, key and value together under `attn.attn`."""
    theirs = {"self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2",
              "mlp.down_proj": "mlp.proj", "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2",
              "self_attn.q_norm": "attn.norm_q", "self_attn.k_norm": "attn.norm_k"}  # fmt: skip
    weights, config = model.state_dict(), model.config
    result = {"transformer.wte.weight": weights["model.embed_tokens.weight"],
              "transformer.ln_f.weight": weights["model.norm.weight"],
              "lm_head.weight": weights["lm_head.weight"].clone()}  # fmt: skip
    for index in range(config.num_hidden_layers):
        old, new = f"model.layers.{index}.", f"transformer.h.{index}."
        kinds = ("weight", "bias") if f"{old}self_attn.q_proj.bias" in weights else ("weight",)
        for kind in kinds:
            q, k, v = (weights[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv")
            if grouped:
                groups = config.num_key_value_heads
                rows = [piece for group in zip(*(x.chunk(groups) for x in (q, k, v)), strict=True) for piece in group]
                result[f"{new}attn.attn.{kind}"] = torch.cat(rows)
            else:
                result[f"{new}attn.qkv.{kind}"] = torch.cat([q, k, v])
        for ours, name in theirs.items():
            for kind in ("weight", "bias"):
                if f"{old}{ours}.{kind}" in weights:
                    result[f"{new}{name}.{kind}"] = weights[f"{old}{ours}.{kind}"]
    return result


def write_litgpt(folder: Path, weights: object, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    torch.save(weights, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.dump(settings))
    return folder


# llm.c: a header of 256 int32, then 16 kinds of parameters, each for all layers in turn.


def llmc_header(model: GPT2LMHeadModel, version: int, padded: int) -> list[int]:
    config = model.config
    return [20240326, version, config.n_positions, config.vocab_size, config.n_layer, config.n_head, config.n_embd,
            padded]  # fmt: skip


def llmc_bytes(model: GPT2LMHeadModel, version: int, padded: int) -> bytes:
    weights, layers = model.state_dict(), range(model.config.n_layer)
    wte = weights["transformer.wte.weight"]
    wte = torch.cat([wte, torch.zeros(padded - len(wte), wte.shape[1])])
    tensors = [wte, weights["transformer.wpe.weight"]]
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            tensors += [weights[f"transformer.h.{i}.{module}.{kind}"].t() for i in layers]
    tensors += [weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]]
    header = struct.pack("<256i", *llmc_header(model, version, padded), *[0] * 248)
    return header + b"".join(_encode(tensor, version) for tensor in tensors)


def _encode(tensor: Tensor, version: int) -> bytes:
    values = tensor.contiguous()
    if version == 3:
        return values.numpy().astype("<f4").tobytes()
    return values.to(torch.bfloat16).view(torch.int16).numpy().astype(np.dtype("<i2")).tobytes()
