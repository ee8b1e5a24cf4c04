"""A whole run with Muon and the wsd schedule, through the public entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.conftest import ConfigMaker, train
from training.config import TrainConfig
from training.schedule import lr_factor
from training.step import Stepper

FILES = (
    "checkpoints/last/model.safetensors",
    "checkpoints/best/model.safetensors",
    "state/step-8/training.safetensors",
)


def muon_recipe(make_config: ConfigMaker, run_dir: Path) -> TrainConfig:
    return make_config(run__dir=str(run_dir), train__optimizer="muon", train__schedule="wsd", train__decay_fraction=0.5)


def test_a_muon_run_resumes_bit_for_bit(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (muon_recipe(make_config, tmp_path / name) for name in ("whole", "parts"))
    train(whole)
    original = Stepper.step

    def failing(self: Stepper, step: int, sequences: int, *, stop: bool = False) -> object:
        if step == 6:
            raise ConnectionError("power cut")
        return original(self, step, sequences, stop=stop)

    monkeypatch.setattr(Stepper, "step", failing)
    with pytest.raises(ConnectionError):
        train(parts)
    monkeypatch.setattr(Stepper, "step", original)
    assert "from step 4" in train(parts)
    for name in FILES:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_log_has_the_schedules_rates(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = muon_recipe(make_config, tmp_path / "run")
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["split"] == "train"]
    assert rates == pytest.approx([config.train.lr * lr_factor(step, config.train) for step in range(8)])
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 7.75e-3, 5.5e-3, 3.25e-3, 1e-3])
