"""Instructions that a tiny model can learn to follow, and a tiny model that has not."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from model.checkpoint import save_model
from model.config import llama_config
from model.tokenizer import Tokenizer
from model.transformer import Transformer

CONTEXT = 320
ANIMALS = ("cat", "owl", "fox", "heron", "newt", "otter", "wren", "hare", "crane", "vole")


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Half of the rows have an input."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        animal = f"{rng.choice(ANIMALS)} {number}"
        row = {"instruction": f"Greet the {animal}.", "input": "", "output": f"Hello, {animal}!"}
        if number % 2:
            row |= {"instruction": "Greet who is named.", "input": f"The {animal}"}
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """A JSON array, or JSON lines where the name says so."""
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def save_tiny_llama(folder: Path) -> Path:
    """A model with random weights and the tokenizer of bytes."""
    tokenizer = Tokenizer.bytes()
    end = tokenizer.eos_token_id
    config = llama_config(2, 2, 1, 32, 64, max_seq_len=CONTEXT, vocab_size=tokenizer.vocab_size)
    config = replace(config, bos_token_id=end, eos_token_id=end)
    model = Transformer(config)
    model.init_weights(3)
    save_model(folder, model, tokenizer=tokenizer)
    return folder
