"""Write a GPT-2 checkpoint folder in the peers' formats, with the same weights.

    python -m benchmarks.peers.convert --model HF_FOLDER --out DIR

Makes `DIR/bf16.gguf` and `DIR/q8_0.gguf` for llama.cpp and `DIR/ct2/` for CTranslate2 (float32, quantised when
it loads). GGUF names and keys: the `gguf` package's own tables.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec
from safetensors.numpy import load_file

Weights = dict[str, np.ndarray]

# Hugging Face's name inside a layer → (GGUF's name, whether Conv1D stores it transposed).
LAYER_TENSORS = {
    "ln_1": ("attn_norm", False),
    "attn.c_attn": ("attn_qkv", True),
    "attn.c_proj": ("attn_output", True),
    "ln_2": ("ffn_norm", False),
    "mlp.c_fc": ("ffn_up", True),
    "mlp.c_proj": ("ffn_down", True),
}


def write_gguf(model: Path, path: Path) -> None:
    """GPT-2 in bfloat16 (matrices) and float32 (vectors and positions), as llama.cpp's own converter chooses."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_tokenizer(writer, model, config)
    for name, array in _gguf_tensors(load_file(model / "model.safetensors"), config["n_layer"]).items():
        _add_tensor(writer, name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(weights: Weights, num_layers: int) -> Weights:
    tensors = {
        "token_embd.weight": weights["transformer.wte.weight"],
        "position_embd.weight": weights["transformer.wpe.weight"],
        "output_norm.weight": weights["transformer.ln_f.weight"],
        "output_norm.bias": weights["transformer.ln_f.bias"],
    }
    for layer in range(num_layers):
        for source, (target, transposed) in LAYER_TENSORS.items():
            weight = weights[f"transformer.h.{layer}.{source}.weight"]
            tensors[f"blk.{layer}.{target}.weight"] = weight.T if transposed else weight
            tensors[f"blk.{layer}.{target}.bias"] = weights[f"transformer.h.{layer}.{source}.bias"]
    if "lm_head.weight" in weights:
        tensors["output.weight"] = weights["lm_head.weight"]
    return tensors


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray) -> None:
    array = np.ascontiguousarray(array, dtype=np.float32)
    if array.ndim == 1 or name == "position_embd.weight":
        writer.add_tensor(name, array)
        return
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def _vocabulary(model: Path, vocab_size: int) -> tuple[list[str], set[str]]:
    """The token strings in the order of their ids, and which of them are special."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    by_id = {index: text for text, index in (tokenizer["model"]["vocab"] | special).items()}
    return [by_id[index] for index in range(vocab_size)], set(special)


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, config: dict[str, Any]) -> None:
    tokens, special = _vocabulary(model, config["vocab_size"])
    merges = json.loads((model / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def quantize_gguf(source: Path, target: Path) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status}")


def write_ctranslate2(model: Path, folder: Path) -> None:
    """GPT-2 in CTranslate2's format, through its specification classes (its converter would need transformers)."""
    config = json.loads((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["n_layer"], config["n_head"], activation=common_spec.Activation.GELUTanh
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["transformer.wte.weight"]
    decoder.position_encodings.encodings = weights["transformer.wpe.weight"]
    decoder.projection.weight = weights.get("lm_head.weight", decoder.embeddings.weight)
    _set_norm(decoder.layer_norm, weights, "transformer.ln_f")
    for index, layer in enumerate(decoder.layer):
        prefix = f"transformer.h.{index}."
        _set_norm(layer.self_attention.layer_norm, weights, prefix + "ln_1")
        _set_linear(layer.self_attention.linear[0], weights, prefix + "attn.c_attn")
        _set_linear(layer.self_attention.linear[1], weights, prefix + "attn.c_proj")
        _set_norm(layer.ffn.layer_norm, weights, prefix + "ln_2")
        _set_linear(layer.ffn.linear_0, weights, prefix + "mlp.c_fc")
        _set_linear(layer.ffn.linear_1, weights, prefix + "mlp.c_proj")
    tokens, _ = _vocabulary(model, config["vocab_size"])
    spec.register_vocabulary(tokens)
    spec.config.bos_token = tokens[config["bos_token_id"]]
    spec.config.eos_token = spec.config.unk_token = tokens[config["eos_token_id"]]
    spec.validate()
    spec.optimize()
    folder.mkdir()
    spec.save(str(folder))


def _set_norm(spec: common_spec.LayerNormSpec, weights: Weights, name: str) -> None:
    spec.gamma, spec.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]


def _set_linear(spec: common_spec.LinearSpec, weights: Weights, name: str) -> None:
    spec.weight, spec.bias = np.ascontiguousarray(weights[f"{name}.weight"].T), weights[f"{name}.bias"]


def convert(model: Path, out: Path) -> None:
    """Write all formats into the empty or absent folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_gguf(model, out / "bf16.gguf")
    quantize_gguf(out / "bf16.gguf", out / "q8_0.gguf")
    write_ctranslate2(model, out / "ct2")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    convert(arguments.model, arguments.out)
