"""Several ranks against one: the same losses and weights, each other's states, one sentence when one fails.

The ranks are processes that torchrun starts. One process with the accumulation of all ranks is the oracle.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import config_of, train
from training.checkpoint import step_folders
from training.config import TrainConfig
from training.distributed import init_distributed
from training.errors import RecipeError
from training.launch import one_voice, share_cores
from training.recipe import config_to_toml, config_to_tree

ROOT = Path(__file__).parents[2]
STEPS = 20
Launcher = Callable[..., "subprocess.CompletedProcess[str]"]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *args]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning:training"}


def launch(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


def recipe(data: Path, run: Path, **changes: object) -> TrainConfig:
    """A small Llama with dropout, clipped gradients and four micro-batches of 2 sequences to a step of two ranks."""
    tree: dict[str, dict[str, object]] = {
        "data": {"dir": str(data)},
        "model": {"architecture": "llama", "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "hidden_size": 16,
                  "max_seq_len": 32, "dropout": 0.1},
        "train": {"max_steps": STEPS, "batch_size": 2, "seq_len": 16, "grad_accum_steps": 2, "lr": 3e-3,
                  "warmup_steps": 2, "grad_clip": 0.5, "schedule": "constant", "dtype": "float32", "device": "cpu",
                  "log_interval": 1, "eval_interval": 10, "eval_tokens": 300, "save_interval": 10},
        "run": {"dir": str(run)},
    }  # fmt: skip
    return config_of(tree, changes)


def losses(run: Path, split: str = "train") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == split]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the last state."""
    return load_file(step_folders(run / "state")[-1][1] / "training.safetensors")


def assert_same_run(run: Path, oracle: Path) -> None:
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(oracle), abs=1e-5)
    assert losses(run, "val") == pytest.approx(losses(oracle, "val"), abs=1e-5)
    ours, theirs = final_tensors(run), final_tensors(oracle)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5, msg=f"{name} differs")


@pytest.fixture(scope="module")
def runs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of finished runs, those of two ranks made in one go, which costs only one start of the processes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    plan: dict[str, dict[str, Any]] = {
        f"{parallel}-{optimizer}": {"train__parallel": parallel, "train__optimizer": optimizer}
        for parallel in ("ddp", "fsdp")
        for optimizer in ("adamw", "muon")
    }
    half = STEPS // 2
    plan["fsdp-then-one"] = {"train__parallel": "fsdp", "train__max_steps": half, "train__optimizer": "muon"}
    alone = {"train__grad_accum_steps": 4}
    train(recipe(data_dir, folder / "one-then-fsdp", train__max_steps=half, **alone))
    plan["one-then-fsdp"] = {"train__parallel": "fsdp", "run__sample_tokens": 4}
    jobs = [config_to_tree(recipe(data_dir, folder / name, **changes)) for name, changes in plan.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = launch("-m", "tests.training.distributed_worker", str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished at step") == len(plan)  # rank 0 alone prints
    assert done.stdout.count("sample: ") == 1  # from gathered weights
    for optimizer in ("adamw", "muon"):
        train(recipe(data_dir, folder / f"one-{optimizer}", train__optimizer=optimizer, **alone))
    train(recipe(data_dir, folder / "fsdp-then-one", train__optimizer="muon", **alone))
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_equal_one_with_doubled_accumulation(parallel: str, optimizer: str, runs: Path) -> None:
    assert_same_run(runs / f"{parallel}-{optimizer}", runs / f"one-{optimizer}")


@pytest.mark.parametrize(("name", "optimizer"), [("fsdp-then-one", "muon"), ("one-then-fsdp", "adamw")])
def test_a_run_goes_on_with_another_number_of_ranks(name: str, optimizer: str, runs: Path) -> None:
    assert_same_run(runs / name, runs / f"one-{optimizer}")


def test_ranks_write_what_one_writes(runs: Path) -> None:
    """The same folders with the same names in them, and the tokens of all ranks counted."""
    files = {name: sorted(p.relative_to(runs / name) for p in (runs / name).rglob("*") if "report" not in p.name)
             for name in ("one-adamw", "ddp-adamw", "fsdp-adamw")}  # fmt: skip
    assert files["ddp-adamw"] == files["one-adamw"] == files["fsdp-adamw"]
    last = json.loads((runs / "fsdp-adamw" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens"] == STEPS * 2 * 2 * 2 * 16


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    monkeypatch.setattr("training.distributed.resolve_device", torch.device)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(RecipeError, match=r"train\.device is cuda:1, one GPU for all ranks; use cuda"):
        init_distributed("cuda:1", environment)
    with pytest.raises(RecipeError, match="this machine has 2 GPUs; start torchrun with --nproc-per-node no larger"):
        init_distributed("cuda", environment)
    del environment["MASTER_PORT"]
    with pytest.raises(RecipeError, match="WORLD_SIZE is 4 but MASTER_PORT is not set; start the run by torchrun"):
        init_distributed("cuda", environment)
    alone = init_distributed("cpu", {"WORLD_SIZE": "1"})
    assert (alone.rank, alone.world_size, alone.is_main) == (0, 1, True)
    assert alone.from_main(7) == 7
    assert alone.sum(torch.ones(2)).tolist() == [1, 1]


def test_before_the_ranks_meet_one_on_a_machine_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for local_rank, expected in (("0", RecipeError), ("1", SystemExit)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(expected), one_voice():
            raise RecipeError("train.lr is wrong")


def test_idle_openmp_workers_sleep_soon_unless_the_user_says_otherwise() -> None:
    for before, after in (
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ):
        environment = dict(before)
        share_cores(environment)
        assert environment == after


def write_recipe(data_dir: Path, folder: Path, **changes: object) -> Path:
    path = folder / "recipe.toml"
    path.write_text(config_to_toml(recipe(data_dir, folder / "run", **changes)))
    return path


def own_errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if "error: " in line]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_half_precision_compiled_and_recomputed(parallel: str, data_dir: Path, tmp_path: Path) -> None:
    """What wraps the model twice still computes the same; float16's scale is one for all ranks."""
    common: dict[str, object] = {"train__max_steps": 6, "model__dropout": 0.0, "train__parallel": parallel}
    variants: dict[str, tuple[dict[str, object], float]] = {
        "float16": ({"train__dtype": "float16"}, 5e-3),
        "recomputed": ({"train__activation_checkpointing": True, "model__dropout": 0.1}, 1e-5),
        "compiled": ({"train__compile": True}, 1e-5),
    }
    jobs = {name: common | changes for name, (changes, _) in variants.items()}
    trees = [config_to_tree(recipe(data_dir, tmp_path / name, **changes)) for name, changes in jobs.items()]
    (tmp_path / "jobs.json").write_text(json.dumps(trees))
    done = launch("-m", "tests.training.distributed_worker", str(tmp_path / "jobs.json"))
    assert done.returncode == 0, done.stderr
    for name, (_, tolerance) in variants.items():
        oracle = jobs[name] | {"train__grad_accum_steps": 4, "train__compile": False}
        train(recipe(data_dir, tmp_path / "one" / name, **oracle))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one" / name), abs=tolerance)


@pytest.mark.slow
def test_an_error_of_all_ranks_is_told_once(data_dir: Path, tmp_path: Path) -> None:
    path = write_recipe(data_dir, tmp_path)
    for override, message in [
        ("train.lrr=1", "error: unknown key train.lrr; did you mean train.lr?"),
        ("train.device=tpu", "error: device 'tpu' is unknown; use auto, cpu, cuda or cuda:N"),
        ("data.dir=absent", "error: absent: no manifest.json"),
    ]:
        done = launch("-m", "training", "train", str(path), override)
        assert done.returncode != 0
        assert len(own_errors(done.stderr)) == 1, done.stderr
        assert message in own_errors(done.stderr)[0]
    assert not (tmp_path / "run").exists()


def launch_altered(folder: Path, program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """The command line on two ranks, after `program` has changed something in one of them."""
    before = "import os, signal, model.checkpoint, training.step\nrank = int(os.environ['RANK'])\n"
    after = "from training.cli import main\nmain()\n"
    (folder / "altered.py").write_text(before + program + after)
    return subprocess.run(
        command(str(folder / "altered.py"), *args), cwd=ROOT, capture_output=True, text=True, timeout=240,
        env=environment() | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_rank_is_missed_by_the_others_in_one_sentence(data_dir: Path, tmp_path: Path) -> None:
    """Afterwards one process goes on from the last state."""
    path = write_recipe(data_dir, tmp_path)
    program = (
        "update = training.step.Stepper._update\n"
        "def killed(self, step, *args):\n"
        "    if step == 12 and rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    update(self, step, *args)\n"
        "training.step.Stepper._update = killed\n"
    )
    done = launch_altered(tmp_path, program, "train", str(path))
    assert done.returncode != 0
    assert own_errors(done.stderr) == ["error: rank 0 lost the others; start the run again, it resumes"]
    assert "from step 10" in train(recipe(data_dir, tmp_path / "run", train__grad_accum_steps=4))
    assert len(losses(tmp_path / "run")) == STEPS


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_the_others(data_dir: Path, tmp_path: Path) -> None:
    """Rank 0 finds the disk full while rank 1 trains on; the earlier state stays."""
    path = write_recipe(data_dir, tmp_path)
    assert launch("-m", "training", "train", str(path), "train.max_steps=10").returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run" / "state" / "step-10").iterdir()}
    full = "def full(*args, **kwargs): raise OSError(28, 'No space left on device')\n"
    program = f"{full}if rank == 0: model.checkpoint.save_file = full\n"
    start = time.monotonic()
    done = launch_altered(tmp_path, program, "train", str(path))
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    errors = own_errors(done.stderr)
    assert len(errors) == 1, done.stderr
    assert "cannot be written: No space left on device" in errors[0]
    assert {p: p.read_bytes() for p in before} == before
    assert not list((tmp_path / "run").rglob("*.partial"))


@pytest.mark.slow
def test_sigterm_stops_all_ranks_at_one_step_and_saves(data_dir: Path, tmp_path: Path) -> None:
    path = write_recipe(data_dir, tmp_path, train__max_steps=1_000_000, train__parallel="fsdp")
    process = subprocess.Popen(
        command("-m", "training", "train", str(path)), cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (log.is_file() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert "stopped and saved at step" in output, errors
    assert own_errors(errors) == []
    assert "Traceback" not in output
    step = int(output.rpartition("saved at step ")[2].split()[0])
    assert step_folders(tmp_path / "run" / "state")[-1][0] == step
