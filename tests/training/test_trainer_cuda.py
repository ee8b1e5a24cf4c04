"""The trainer on a GPU against the trainer on the CPU, and against itself after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.training.conftest import ConfigMaker, train
from training.config import TrainConfig
from training.step import Stepper

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def losses(config: TrainConfig, split: str = "train") -> list[float]:
    lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == split]


def test_float32_learns_what_the_cpu_learns(make_config: ConfigMaker, tmp_path: Path) -> None:
    """Eight steps of a tiny model without TF32; sums in another order part the losses by some 1e-6 a step."""
    found = {}
    for device in ("cpu", "cuda"):
        config = make_config(
            model__dropout=0.0, train__device=device, train__compile=False, train__tf32=False,
            run__dir=str(tmp_path / device),
        )  # fmt: skip
        train(config)
        found[device] = losses(config) + losses(config, "val")
    assert found["cuda"] == pytest.approx(found["cpu"], abs=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compiled_half_precision_learns_like_float32(
    dtype: str, optimizer: str, make_config: ConfigMaker, tmp_path: Path
) -> None:
    """Tolerance: 16-bit products, and updates that differ a little from the first step on."""
    found = {}
    for name in ("float32", dtype):
        config = make_config(
            model__dropout=0.0, model__hidden_size=64, train__device="cuda", train__dtype=name,
            train__compile=name != "float32", train__optimizer=optimizer, run__dir=str(tmp_path / name),
        )  # fmt: skip
        train(config)
        found[name] = losses(config)
    assert found[dtype] == pytest.approx(found["float32"], abs=0.1)
    assert found[dtype][-1] < found[dtype][0]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without compile and dropout. Kernels that add in no fixed order may differ in the last bits, hence 1e-4."""
    settings = {"model__dropout": 0.0, "train__device": "cuda", "train__compile": False}
    whole, parts = (make_config(run__dir=str(tmp_path / name), **settings) for name in ("whole", "parts"))
    train(whole)
    original = Stepper.step

    def failing(self: Stepper, step: int, *args: object, **more: object) -> object:
        if step == 6:
            raise ConnectionError("power cut")
        return original(self, step, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Stepper, "step", failing)
    with pytest.raises(ConnectionError):
        train(parts)
    monkeypatch.setattr(Stepper, "step", original)
    assert "from step 4" in train(parts)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)


def test_recomputing_layers_takes_less_memory(make_config: ConfigMaker, tmp_path: Path) -> None:
    peaks = {}
    for recompute in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        train(make_config(
            model__hidden_size=128, model__num_layers=8, model__max_seq_len=256, train__seq_len=256,
            train__batch_size=32, train__max_steps=2, train__device="cuda", train__compile=False,
            train__activation_checkpointing=recompute, run__dir=str(tmp_path / str(recompute)),
        ))  # fmt: skip
        peaks[recompute] = torch.cuda.max_memory_allocated()
    assert peaks[True] < 0.7 * peaks[False]
