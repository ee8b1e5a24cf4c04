"""The logits that are stored with a checkpoint: torch's own forward pass says what they are, and JSON keeps them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.checkpoint import load_model, read_manifest, save_model
from model.config import ModelConfig, gpt2_config, llama_config
from model.errors import CheckpointError
from model.manifest import manifest_json
from model.self_check import MAX_PROMPT, SelfCheck, choose_ids, tolerance
from model.transformer import Transformer

GPT2 = gpt2_config(2, 4, 64, vocab_size=96, max_seq_len=64)
LLAMA = llama_config(2, 4, 2, 64, 160, vocab_size=96, max_seq_len=64)


def random_model(config: ModelConfig, seed: int = 1) -> Transformer:
    model = Transformer(config).eval()
    model.init_weights(seed)
    return model


def stored(folder: Path) -> SelfCheck:
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.self_check is not None
    return manifest.self_check


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_stored_logits_are_those_that_transformers_computes(
    config: ModelConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_model(tmp_path / "m", random_model(config), dtype=dtype)
    check = stored(tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    logits = theirs(torch.tensor([check.prompt])).logits[0, -3:][:, list(check.token_ids)]
    assert check.error(logits.tolist()) < 1e-5
    torch.testing.assert_close(torch.tensor(check.logits), logits, rtol=1e-4, atol=1e-5)


def test_padding_of_the_vocabulary_is_not_asked_for(tmp_path: Path) -> None:
    config = replace(GPT2, bos_token_id=89, eos_token_id=89)
    save_model(tmp_path / "m", random_model(config), vocab_size=90)
    check = stored(tmp_path / "m")
    assert max(check.prompt) == max(check.token_ids) == 89
    model = load_model(tmp_path / "m")
    with torch.no_grad():
        found = model.compute_logits(model(torch.tensor([check.prompt])))[0, -3:][:, list(check.token_ids)]
    assert check.error(found.tolist()) < 1e-5


@torch.no_grad()
def test_weights_of_another_model_are_off_by_more_than_any_rounding(tmp_path: Path) -> None:
    save_model(tmp_path / "m", random_model(LLAMA))
    check = stored(tmp_path / "m")
    other = random_model(LLAMA, seed=2)
    found = other.compute_logits(other(torch.tensor([check.prompt])))[0, -3:][:, list(check.token_ids)]
    assert check.error(found.tolist()) > 5 * max(tolerance("bfloat16"), tolerance("bfloat16", "int8"))


def test_the_error_is_relative_to_the_spread_of_the_logits() -> None:
    check = SelfCheck((0,), (0, 1), ((1.0, 3.0),))  # around 2, a root mean square of 1
    assert check.error([[1.0, 3.0]]) == 0.0
    assert check.error([[1.3, 3.3]]) == pytest.approx(0.3)
    assert check.error([[1.0, math.nan]]) == math.inf
    assert check.error([[1.0, -math.inf]]) == math.inf
    flat = SelfCheck((0,), (0, 1), ((5.0, 5.0),))
    assert flat.error([[5.001, 4.999]]) == pytest.approx(0.1)


@pytest.mark.parametrize(("vocab_size", "context"), [(1, 2), (2, 3), (257, 8), (50257, 1024)])
def test_ids_are_of_the_vocabulary_and_leave_room_in_the_context(vocab_size: int, context: int) -> None:
    prompt, token_ids = choose_ids(vocab_size, context)
    assert 1 <= len(prompt) <= min(MAX_PROMPT, context - 1)
    assert len(set(token_ids)) == len(token_ids) <= 16
    assert {*prompt, *token_ids} <= set(range(vocab_size))
    assert {0, vocab_size - 1} <= set(token_ids)


def test_a_context_of_one_token_and_endless_logits_have_no_check(tmp_path: Path) -> None:
    save_model(tmp_path / "one", random_model(replace(GPT2, max_seq_len=1)))
    model = random_model(GPT2)
    with torch.no_grad():
        model.embed_tokens.weight.fill_(3e38)
    save_model(tmp_path / "endless", model)
    for name in ("one", "endless"):
        manifest = read_manifest(tmp_path / name)
        assert manifest is not None
        assert manifest.self_check is None


def test_the_manifest_keeps_what_was_found(tmp_path: Path) -> None:
    written = save_model(tmp_path / "m", random_model(LLAMA))
    assert read_manifest(tmp_path / "m") == written
    assert (tmp_path / "m" / "manifest.json").read_text() == manifest_json(written)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, -2, 3]}, "prompt"),
        ({"prompt": [True, 2, 3]}, "prompt"),
        ({"prompt": list(range(65))}, "prompt"),
        ({"token_ids": ["1"]}, "token_ids"),
        ({"logits": []}, "logits"),
        ({"logits": [[0.5]] * 4}, "logits"),
        ({"logits": [[0.5, 1.0]]}, "logits"),
        ({"logits": [["a"]]}, "logits"),
        ({"logits": [[1e39]]}, "logits"),
        ({"logits": 7}, "logits"),
    ],
)
def test_a_malformed_check_is_refused_with_its_name(tmp_path: Path, changes: dict[str, object], names: str) -> None:
    save_model(tmp_path / "m", random_model(GPT2))
    path = tmp_path / "m" / "manifest.json"
    content = json.loads(path.read_text())
    content["self_check"] = {"prompt": [1, 2, 3, 4], "token_ids": [5], "logits": [[0.5]]} | changes
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"^manifest\.json: self_check: {names} must [^\n]+$"):
        read_manifest(tmp_path / "m")
    path.write_text(json.dumps(content | {"self_check": [1]}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: self_check must be an object"):
        read_manifest(tmp_path / "m")
