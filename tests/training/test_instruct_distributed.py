"""Examples and adapters on several ranks: one process with the accumulation of all ranks is the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.training.conftest import train
from tests.training.instructions import make_rows, save_tiny_llama, write_rows
from tests.training.test_distributed import final_tensors, launch, losses
from training.config import TrainConfig
from training.recipe import build_config, config_to_tree
from training.tasks.instruct_data import InstructDataRequest, prepare_instructions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    base = save_tiny_llama(folder / "base")
    rows = write_rows(folder / "rows.json", make_rows(60))
    prepare_instructions(InstructDataRequest((str(rows),), folder / "data", str(base), "chat", 0.3))
    return folder


def recipe(folder: Path, name: str, **changes: object) -> TrainConfig:
    tree: dict[str, dict[str, object]] = {
        "data": {"dir": str(folder / "data"), "loader": "padded"},
        "model": {"init_from": str(folder / "base")},
        "train": {"max_steps": 10, "batch_size": 2, "seq_len": 100, "grad_accum_steps": 2, "lr": 3e-3,
                  "warmup_steps": 2, "grad_clip": 0.5, "schedule": "constant", "dtype": "float32", "device": "cpu",
                  "log_interval": 1, "eval_first": True, "eval_interval": 5, "save_interval": 5},
        "run": {"dir": str(folder / name)},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, item = key.partition("__")
        tree[section][item] = value
    return build_config(tree)


def test_two_ranks_equal_one_with_doubled_accumulation(folder: Path) -> None:
    plan: dict[str, dict[str, object]] = {
        "padded": {}, "packed": {"data__loader": "packed", "train__seq_len": 200}, "lora": {"train__lora_rank": 2},
    }  # fmt: skip
    jobs = [
        config_to_tree(recipe(folder, f"{parallel}-{name}", train__parallel=parallel, **changes))
        for parallel in ("ddp", "fsdp")
        for name, changes in plan.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch("-m", "tests.training.distributed_worker", str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr
    for name, changes in plan.items():
        train(recipe(folder, name, train__grad_accum_steps=4, **changes))
        assert len(losses(folder / name)) == 10
        assert len(losses(folder / name, "val")) == 3
        for parallel in ("ddp", "fsdp"):
            run = folder / f"{parallel}-{name}"
            assert losses(run) == pytest.approx(losses(folder / name), abs=1e-5)
            assert losses(run, "val") == pytest.approx(losses(folder / name, "val"), abs=1e-5)
            ours, theirs = final_tensors(run), final_tensors(folder / name)
            assert ours.keys() == theirs.keys()
            for tensor in ours:
                torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=1e-3, atol=2e-5, msg=f"{run} {tensor}")


def test_torchrun_prepares_once_and_tells_once(folder: Path) -> None:
    done = launch(
        "-m", "training", "finetune", "instruct", "--init-from", str(folder / "base"), "--input",
        str(folder / "rows.json"), "--out", str(folder / "command"), "--template", "chat", "--max-seq-len", "100",
        "--epochs", "0.5", "--test-fraction", "0.1", "--json", "train.dtype=float32", "train.device=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["finished"]
    assert result["after"] < result["before"]
    assert result["test"] is not None
    done = launch("-m", "training", "finetune", "instruct", "--init-from", str(folder / "base"), "--input",
                  str(folder / "absent.json"), "--out", str(folder / "none"))  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "absent.json: no such file" in done.stderr
    assert not (folder / "none").exists()
