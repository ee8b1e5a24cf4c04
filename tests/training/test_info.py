"""What `info` tells, against closed forms, the objects themselves and a card that is not here."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from model.transformer import Transformer
from tests.training.conftest import ConfigMaker
from training.build import make_model
from training.errors import DataError
from training.estimate import Estimate, estimate
from training.hardware import Hardware, detect_hardware
from training.optim import build_optimizers
from training.recipe import config_to_toml


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return detect_hardware()


def test_the_cpu_is_told_as_it_is(hardware: Hardware) -> None:
    cpu = hardware.devices[-1]
    assert (cpu.name, cpu.backend, cpu.trains, cpu.peak_source) == ("cpu", "cpu", True, "measured")
    assert cpu.memory_bytes == psutil.virtual_memory().total
    assert f"{len(psutil.Process().cpu_affinity())} cores" in cpu.description
    assert cpu.peak_float32 is not None
    assert cpu.peak_float32 > 1e8
    assert hardware.torch == torch.__version__
    json.dumps(asdict(hardware), allow_nan=False)


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, name: str, major: int, memory: int) -> None:
    card = SimpleNamespace(name=name, major=major, minor=0, total_memory=memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)


@pytest.mark.parametrize(
    ("name", "major", "bfloat16", "peak"),
    [("NVIDIA H200", 9, True, 989e12), ("Tesla T4", 7, False, 65e12), ("Brand New", 12, True, None)],
)
def test_a_gpu_comes_first_with_its_data_sheet(
    name: str, major: int, bfloat16: bool, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cuda(monkeypatch, name, major, 80 * 2**30)
    gpu, *_, cpu = detect_hardware().devices
    assert (gpu.name, gpu.backend, gpu.memory_bytes) == ("cuda:0", "cuda", 80 * 2**30)
    assert gpu.description.startswith(f"{name}, compute capability {major}.0, CUDA")
    assert (gpu.bfloat16, gpu.peak_bfloat16) == (bfloat16, peak)
    assert gpu.peak_source == ("data sheet" if peak else None)
    assert cpu.name == "cpu"


def test_amd_cards_are_told_as_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, "AMD Instinct MI300X", 9, 192 * 2**30)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    gpu = detect_hardware().devices[0]
    assert (gpu.backend, gpu.bfloat16, gpu.peak_bfloat16) == ("rocm", True, 1307e12)
    assert gpu.description.endswith("ROCm 6.2")


def test_no_compiler_no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.hardware.shutil.which", lambda _: None)
    assert detect_hardware().compiles == []


def real_bytes(needs: Estimate, optimizer: str, make_config: ConfigMaker) -> tuple[int, int, int]:
    """Weights, gradients and optimiser state of one real step, counted tensor by tensor."""
    config = make_config(train__optimizer=optimizer)
    model: Transformer = make_model(config, needs.model)
    optimizers = build_optimizers(model, config.train)
    inputs = torch.zeros(1, 8, dtype=torch.int64)
    model.compute_logits(model(inputs)).square().mean().backward()
    for each in optimizers:
        each.step()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    states = [value for each in optimizers for state in each.state.values() for value in state.values()]
    moments = sum(v.numel() * v.element_size() for v in states if isinstance(v, torch.Tensor) and v.dim())
    return size, gradients, moments


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_memory_is_that_of_a_real_step(optimizer: str, make_config: ConfigMaker) -> None:
    needs = estimate(make_config(train__optimizer=optimizer))
    weights, gradients, moments = real_bytes(needs, optimizer, make_config)
    assert (needs.weights_bytes, needs.gradients_bytes, needs.optimizer_bytes) == (weights, gradients, moments)
    assert needs.state_bytes == weights + gradients + moments


def test_parameters_steps_and_passes_follow_from_the_recipe(make_config: ConfigMaker) -> None:
    config = make_config(train__grad_accum_steps=3, train__max_steps=10)
    needs = estimate(config)
    width, inner, vocab, layers = 16, needs.model.intermediate_size, needs.model.vocab_size, 2
    embeddings = {"embeddings": vocab * width, "head": 0 if needs.model.tie_word_embeddings else vocab * width}
    assert needs.parameters == {
        **embeddings, "attention": layers * (width * (16 + 2 * 8) + width * width),
        "mlp": layers * 3 * width * inner, "norms": (2 * layers + 1) * width,
    }  # fmt: skip
    assert needs.tokens_per_step == 4 * 16 * 3
    assert needs.train_tokens == 10 * needs.tokens_per_step
    manifest = json.loads((Path(config.data.dir) / "manifest.json").read_text())
    assert needs.data_tokens == manifest["splits"]["train"]["tokens"]
    assert needs.epochs == pytest.approx(needs.train_tokens / needs.data_tokens)
    products = needs.num_parameters - (0 if needs.model.tie_word_embeddings else vocab * width)
    assert needs.flops_per_token == 6 * products + 12 * layers * 16 * 16
    assert needs.train_flops == needs.flops_per_token * needs.train_tokens


def test_a_model_larger_than_any_memory_is_only_counted(make_config: ConfigMaker) -> None:
    needs = estimate(make_config(model__num_layers=80, model__num_heads=64, model__num_kv_heads=8,
                                 model__hidden_size=65_536))  # fmt: skip
    assert needs.state_bytes > 2**44
    assert not math.isnan(needs.train_flops)


def test_a_recipe_that_cannot_be_trained_is_refused(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config()
    with pytest.raises(DataError, match="absent"):
        estimate(replace(config, data=replace(config.data, dir=str(tmp_path / "absent"))))


def test_the_command_tells_the_machine_and_the_recipe(
    make_config: ConfigMaker, tmp_path: Path, printed: Callable[..., str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(config_to_toml(make_config()))
    plain = printed("info")
    assert plain.startswith("Linux" if sys.platform == "linux" else "")
    assert "\ncpu: " in plain
    assert "model:" not in plain
    needs = estimate(make_config())
    told = printed("info", recipe, "train.max_steps=20")
    assert f"model: llama, {needs.num_parameters:,} parameters" in told
    assert "run: 20 steps of 64 tokens on each rank: 1,280 tokens" in told
    assert "at the peak of cpu" in told
    values: dict[str, Any] = json.loads(printed("info", recipe, "--json"))
    assert values["hardware"]["devices"][-1]["name"] == "cpu"
    assert values["recipe"]["num_parameters"] == needs.num_parameters
    assert values["recipe"]["device"] == "cpu"
    assert set(json.loads(printed("info", "--json"))) == {"hardware"}
