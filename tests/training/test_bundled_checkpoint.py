"""The checkpoint that the package ships with: whole, small, what its card says, and at home in transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import model
from model.checkpoint import load_model, read_manifest
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from training.evaluate import evaluate_checkpoint
from training.generate import generate_from_checkpoint

FOLDER = Path(model.__file__).parent / "data" / "shakespeare"

# Not in the training text, which holds plays only.
SONNET_18 = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
"""


def test_the_folder_is_whole_and_below_ten_megabytes() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "manifest.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10_000_000
    assert load_model(FOLDER, verify=True).dtype == torch.bfloat16


def test_the_card_states_the_figures_of_the_manifest() -> None:
    manifest = read_manifest(FOLDER)
    assert manifest is not None
    provenance = manifest.provenance
    assert provenance.validation_loss is not None
    assert provenance.bits_per_byte is not None
    assert provenance.bits_per_byte < 2.05
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"^loss +(\d\.\d+) .*^bits per byte +(\d\.\d+) ", card, re.MULTILINE | re.DOTALL)
    assert stated is not None
    # The manifest's figures are those of the run, in bfloat16 products; the card's those of `evaluate`, in float32.
    assert float(stated[1]) == pytest.approx(provenance.validation_loss, abs=2e-3)
    assert float(stated[2]) == pytest.approx(provenance.bits_per_byte, abs=3e-3)
    assert f"step {provenance.step}" in card


def test_it_has_learnt_the_language(tmp_path: Path) -> None:
    (tmp_path / "sonnet.txt").write_text(SONNET_18)
    assert evaluate_checkpoint(FOLDER, text=tmp_path / "sonnet.txt", device="cpu").bits_per_byte < 2.9


def test_transformers_loads_it_and_computes_the_same() -> None:
    ours, theirs = load_model(FOLDER, dtype=torch.float32), AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer(SONNET_18, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == Tokenizer.load(FOLDER).encode(SONNET_18)
    assert tokenizer.decode(ids[0]) == SONNET_18
    with torch.no_grad():
        expected = theirs.float()(ids[:, :256]).logits
        torch.testing.assert_close(ours.compute_logits(ours(ids[:, :256])), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", ["ROMEO:", "", "नमस्ते 🖋"])
def test_it_continues_any_prompt(prompt: str) -> None:
    params = [SamplingParams(max_tokens=40, temperature=0.8, seed=seed) for seed in range(2)]
    first, second = generate_from_checkpoint(FOLDER, prompt, params, device="cpu", dtype=torch.float32)
    assert first.text != second.text
    assert len(first.token_ids) == 40 or first.finish_reason == "stop"
    json.dumps(first.text)
