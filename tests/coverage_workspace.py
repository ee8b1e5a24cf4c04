"""The folder that docs/seeds.md speaks of, made small: texts, prepared data, a run, a GPT-2 as on the Hub."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model.tokenizer import Tokenizer
from tests.training.conftest import make_text, train
from training.data.prepare import PrepareRequest, prepare
from training.recipe import load_config

# What makes a recipe's run a matter of a second. The recipes' own sizes are checked by `info`.
SMALL_MODEL = (
    "model.num_layers=1 model.num_heads=2 model.num_kv_heads=1 model.hidden_size=32 model.intermediate_size=64 "
    "model.max_seq_len=64"
)
SMALL_RUN = (
    "train.max_steps=2 train.batch_size=2 train.grad_accum_steps=1 train.seq_len=16 train.warmup_steps=1 "
    "train.eval_interval=1 train.eval_tokens=64 train.save_interval=2 train.log_interval=1 train.device=cpu "
    "train.dtype=float32"
)
HINDI = ("स्याही से लिखी कहानी", "नदी के पार पुरानी नाव", "बारिश में भीगता आँगन", "क्षितिज पर ज्ञान की रेखा")


def make_workspace(folder: Path) -> None:
    """Fill an existing, empty folder."""
    _write_texts(folder)
    for tokenizer, name in [("bytes", "shakespeare"), ("gpt2", "book")]:
        prepare(PrepareRequest((str(folder / "book.txt"),), folder / "data" / name, tokenizer))
    overrides = [f"data.dir={folder / 'data' / 'shakespeare'}", f"run.dir={folder / 'runs' / 'cpu-smoke'}"]
    train(load_config("cpu-smoke", [*SMALL_MODEL.split(), *SMALL_RUN.split(), *overrides]))
    _write_gpt2(folder / "models" / "gpt2")


def _write_texts(folder: Path) -> None:
    rng = random.Random(0)
    (folder / "book.txt").write_bytes(make_text(2_000).encode())
    (folder / "names.txt").write_text("".join(f"{rng.choice('klmn')}{rng.choice('aeio')}ra\n" for _ in range(200)))
    (folder / "corpus").mkdir()
    for number in range(3):
        (folder / "corpus" / f"{number}.txt").write_bytes(make_text(400, seed=number).encode())
    (folder / "hindi.txt").write_bytes("\n".join(rng.choice(HINDI) for _ in range(100)).encode())
    sms = [("spam", f"WIN {n} coins now") if n % 3 == 0 else ("ham", f"see you at {n % 12} then") for n in range(60)]
    (folder / "sms.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in sms))
    (folder / "prompts.txt").write_text("the\nink\nand\n")
    counting = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n + 1)))}
        for n in range(1, 21)
    ]
    (folder / "instructions.json").write_text(json.dumps(counting))
    for name, rows in _rows().items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / name).write_bytes("".join(lines).encode())


def _rows() -> dict[str, list[dict[str, object]]]:
    """The files of JSON lines."""
    poems = [
        {"text": f"{HINDI[n % 4]} {n}", "meter": ("doha", "chaupai")[n % 2], "theme": ("rain", "river")[n // 2 % 2]}
        for n in range(80)
    ]
    endings = ["writes a line.", "eats it.", "sings.", "sleeps."]
    return {
        "poems.jsonl": poems,
        "hellaswag.jsonl": [{"ctx": "A hand takes a quill. It", "endings": endings, "label": 0}] * 2,
        "prompts.jsonl": [{"prompt": "the", "reference": "the quill writes what a hand has thought"}] * 2,
        "samples.jsonl": [{"text": "the quill writes"}, {"text": "the ink remembers"}],
    }


def _write_gpt2(folder: Path) -> None:
    """A GPT-2 as transformers writes it, small and with random weights, with GPT-2's own tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=1_024, vocab_size=50_257)
    GPT2LMHeadModel(config).save_pretrained(folder)
    Tokenizer.gpt2().save(folder)
