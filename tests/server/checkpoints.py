"""Checkpoints of one shape that predict a text better or worse, as the steps of a training would."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from model.checkpoint import save_model
from model.config import llama_config
from model.manifest import Provenance
from model.tokenizer import Tokenizer
from model.transformer import Transformer

# Wider than the tokenizer's 257 ids, as padded checkpoints are.
VOCAB_SIZE = 272
CONFIG = llama_config(2, 4, 2, 64, 160, vocab_size=VOCAB_SIZE, max_seq_len=256, tie_word_embeddings=False)


def save_step(folder: Path, step: int, *, sharpness: float, seed: int = 5, tokenizer: Tokenizer | None = None) -> Path:
    """Random weights, which are wrong about any text, and the more so the sharper their distributions are."""
    model = Transformer(CONFIG)
    model.init_weights(seed=seed)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(20.0)
        assert model.lm_head is not None
        model.lm_head.weight.mul_(8.0 * sharpness)
    save_model(
        folder, model, tokenizer=tokenizer or Tokenizer.bytes(), dtype=torch.float32,
        provenance=Provenance(step=step, run="test-run", data="sha256:1", validation_loss=sharpness),
    )  # fmt: skip
    return folder


def touch_later(folder: Path, seconds: float) -> None:
    """Let a checkpoint have arrived so much later than it did: files made in one test have nearly equal times."""
    path = folder / "manifest.json"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + int(seconds * 1e9)))
