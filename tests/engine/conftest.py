"""Small checkpoints that the engine's tests load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_model
from model.config import ModelConfig, gpt2_config, llama_config
from model.transformer import Transformer

VOCAB_SIZE = 211
MODELS: dict[str, ModelConfig] = {
    # Inner dimensions of 1,600 and more are where a product with one row adds in another order.
    "gpt2": gpt2_config(2, 4, 448, vocab_size=VOCAB_SIZE, max_seq_len=160),
    "llama": replace(
        llama_config(3, 8, 2, 128, 320, vocab_size=VOCAB_SIZE, max_seq_len=160), eos_token_id=7, bos_token_id=7
    ),
}


@pytest.fixture(scope="session", params=sorted(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random model, for each architecture in turn."""
    return make_checkpoint(MODELS[request.param], tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="session")
def llama_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(MODELS["llama"], tmp_path_factory.mktemp("one") / "model")


def make_checkpoint(config: ModelConfig, folder: Path) -> Path:
    model = Transformer(config)
    model.init_weights(seed=3)
    with torch.no_grad():
        # Wider embeddings give logits with clear preferences, so that greedy and filtered sequences vary.
        model.embed_tokens.weight.mul_(8.0)
    save_model(folder, model, dtype=torch.float32)
    return folder
