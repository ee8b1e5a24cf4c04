"""Checkpoints that transformers wrote: tiny, random, with the tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from model.tokenizer import Tokenizer

# Wide enough that the likely and the unlikely differ by more than rounding.
_SPREAD = 0.3


def save_tiny_model(folder: Path, family: str, *, context: int = 48, vocab_size: int = 257) -> Path:
    """`family` is gpt2 or llama (with grouped queries)."""
    disable_progress_bar()
    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=vocab_size, n_positions=context, n_embd=64, n_layer=2, n_head=4, bos_token_id=256,
            eos_token_id=256, initializer_range=_SPREAD,
        ))  # fmt: skip
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab_size, max_position_embeddings=context, hidden_size=64, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, bos_token_id=256, eos_token_id=256,
            initializer_range=_SPREAD,
        ))  # fmt: skip
    model.save_pretrained(folder)
    Tokenizer.bytes().save(folder)
    return folder
