"""Low-rank adapters: what is trained, what is saved, that the two compute the same."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model.checkpoint import load_model
from tests.training.conftest import config_of, train
from tests.training.instructions import save_tiny_llama
from training.checkpoint import step_folders
from training.config import TrainConfig, TrainSection
from training.errors import RecipeError, ResumeError
from training.lora import adapter_scale, add_adapters, merge_adapters
from training.optim import build_optimizers

SETTINGS = TrainSection(lora_rank=2, lora_alpha=6.0, seed=5, weight_decay=0.0, dtype="float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "model")


def recipe(data: Path, base: Path, run: Path, **changes: object) -> TrainConfig:
    tree: dict[str, dict[str, object]] = {
        "data": {"dir": str(data)},
        "model": {"init_from": str(base)},
        "train": {"max_steps": 6, "batch_size": 4, "seq_len": 32, "lr": 1e-2, "warmup_steps": 0, "dtype": "float32",
                  "device": "cpu", "log_interval": 1, "eval_interval": 3, "eval_tokens": 300, "save_interval": 3,
                  "lora_rank": 2, "lora_alpha": 6.0},
        "run": {"dir": str(run)},
    }  # fmt: skip
    return config_of(tree, changes)


def test_a_new_adapter_changes_nothing_and_is_all_that_has_gradients(base: Path) -> None:
    model = load_model(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(40)[None]
    expected = model(ids)
    add_adapters(model, SETTINGS)
    torch.testing.assert_close(model(ids), expected)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    products = [
        name.removesuffix(".weight") for name, t in before.items() if name.startswith("layers.") and t.dim() == 2
    ]
    assert set(trained) == {f"{name}.lora_{side}" for name in products for side in ("down", "up")}
    for name in products:
        rows, columns = before[f"{name}.weight"].shape
        assert trained[f"{name}.lora_down"].shape == (2, columns)
        assert trained[f"{name}.lora_up"].shape == (rows, 2)
    optimizer = build_optimizers(model, SETTINGS)[0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    model.compute_logits(model(ids)).logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.step()
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert all(bool(now[name].any()) for name in trained if name.endswith("up"))


def test_the_adapted_product_is_that_of_the_paper(base: Path) -> None:
    """(W + (alpha / r) B A) x + b by the closed form, and its merged weight too."""
    model = load_model(base)
    add_adapters(model, SETTINGS)
    torch.manual_seed(0)
    linear = model.layers[1].attn.qkv_proj
    down, up = linear.lora_down, linear.lora_up
    assert down.abs().max() <= 1 / math.sqrt(32)
    up.data.normal_()
    weight = linear.weight + 6.0 / 2 * up @ down
    x = torch.randn(3, 32)
    torch.testing.assert_close(linear(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    merged = merge_adapters(model.state_dict(), adapter_scale(SETTINGS))
    torch.testing.assert_close(merged["layers.1.attn.qkv_proj.weight"], weight.detach())
    assert merged.keys() == load_model(base).state_dict().keys()


def test_the_seed_decides_the_adapters(base: Path) -> None:
    model = load_model(base)
    states = []
    for seed in (1, 1, 2):
        adapted = copy.deepcopy(model)
        add_adapters(adapted, TrainSection(lora_rank=1, seed=seed))
        states.append(adapted.state_dict()["layers.0.mlp.down_proj.lora_down"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_run_trains_adapters_and_saves_whole_models(base: Path, data_dir: Path, tmp_path: Path) -> None:
    config = recipe(data_dir, base, tmp_path / "run")
    output = train(config)
    weights = sum(p.numel() for p in load_model(base).parameters())
    adapters = (
        2 * 2 * ((64 + 32) + (32 + 32) + (128 + 32) + (32 + 64))
    )  # rank and layers; q and k + v, o, gate + up, down
    assert f"{weights + adapters:,} parameters, of which {adapters:,} are trained, on cpu" in output
    state = load_file(step_folders(tmp_path / "run" / "state")[-1][1] / "training.safetensors")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in state if name.startswith("optimizer.")} == {
        *("lora_down", "lora_up"),
    }
    last = tmp_path / "run" / "checkpoints" / "last"
    ours, start = load_model(last), load_model(base)
    changed = {n for n, t in start.state_dict().items() if not torch.equal(t, ours.state_dict()[n])}
    assert changed == {n for n, t in start.state_dict().items() if n.startswith("layers.") and t.dim() == 2}
    theirs = AutoModelForCausalLM.from_pretrained(last).eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.compute_logits(ours(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    # What the checkpoint computes is what training validated.
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validations = [line["loss"] for line in lines if line["split"] == "val"]
    assert validations[-1] < validations[0]
    fresh = recipe(data_dir, last, tmp_path / "again", train__eval_first=True, train__max_steps=1)
    train(fresh)
    first = json.loads((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["step"], first["split"], first["lr"]) == (0, "val", 0.0)
    assert first["loss"] == pytest.approx(validations[-1], rel=1e-5)


def test_another_rank_is_another_run(base: Path, data_dir: Path, tmp_path: Path) -> None:
    train(recipe(data_dir, base, tmp_path / "run", train__max_steps=1))
    with pytest.raises(ResumeError, match=r"train\.lora_rank is 4 but this run was started with 2"):
        train(recipe(data_dir, base, tmp_path / "run", train__max_steps=2, train__lora_rank=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__optimizer": "muon"}, r"^train\.lora_rank is set but train\.optimizer is muon"),
        ({"model__init_from": None}, r"^train\.lora_rank is set but model\.init_from is not"),
        ({"train__lora_rank": -1}, r"^train\.lora_rank is -1 but must lie between"),
    ],
)
def test_what_does_not_fit_adapters_is_refused(
    changes: dict[str, object], message: str, base: Path, data_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(data_dir, base, tmp_path, **changes)
