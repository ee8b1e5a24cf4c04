"""Resuming exactly: optimisers, types, schedules and batch sizes; and saving beside the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.checkpoint import load_model
from model.errors import CheckpointError
from tests.training.conftest import ConfigMaker, train
from tests.training.test_trainer import final_bytes, metrics
from training.checkpoint import read_state, step_folders
from training.config import TrainConfig
from training.distributed import Distributed
from training.errors import ResumeError
from training.saving import Saver, Snapshots
from training.step import Stepper, StepResult
from training.trainer import Trainer


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainConfig, int], None]:
    """Runs a recipe until its process dies before the given step (0-based)."""

    def run(config: TrainConfig, before: int) -> None:
        original = Trainer.train_step

        def failing(self: Trainer) -> StepResult:
            if self.progress.step == before:
                raise ConnectionError("power cut")
            return original(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", failing)
            with pytest.raises(ConnectionError):
                train(config)

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"train__optimizer": "muon"},
        {"train__dtype": "float16", "train__grad_accum_steps": 2},
        {"train__schedule": "wsd", "train__optimizer": "muon", "train__dtype": "bfloat16"},
        {"train__activation_checkpointing": True, "train__label_smoothing": 0.1, "run__async_save": False},
        {"data__loader": "sliding", "model__vocab_multiple": 64, "train__z_loss": 1e-4},
    ],
    ids=lambda changes: ",".join(f"{k.partition('__')[2]}={v}" for k, v in changes.items()),
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    changes: dict[str, object], make_config: ConfigMaker, tmp_path: Path, interrupt: Callable[[TrainConfig, int], None]
) -> None:
    whole, parts = (make_config(run__dir=str(tmp_path / name), **changes) for name in ("whole", "parts"))
    train(whole)
    interrupt(parts, 2)
    interrupt(parts, 6)
    torch.manual_seed(99)
    assert "from step 4" in train(parts)
    assert final_bytes(parts) == final_bytes(whole)
    assert metrics(parts) == metrics(whole)


def test_skipped_steps_are_the_same_after_a_resume(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[..., None]
) -> None:
    original = Stepper._accumulate

    def spoilt(self: Stepper, sequences: int) -> torch.Tensor:
        return original(self, sequences) * (float("nan") if sequences in (2 * 4, 5 * 4) else 1.0)

    monkeypatch.setattr(Stepper, "_accumulate", spoilt)
    whole, parts = (make_config(run__dir=str(tmp_path / name)) for name in ("whole", "parts"))
    train(whole)
    interrupt(parts, 7)
    train(parts)
    assert final_bytes(parts) == final_bytes(whole)
    assert metrics(parts) == metrics(whole)
    assert metrics(whole)[-2]["skipped_steps"] == 2


def test_other_batch_sizes_continue_in_the_same_order_of_data(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps of 4 sequences, then 2 × 3, then 1 × 8: no sequence twice, none left out."""
    taken: list[range] = []
    original = training_batch()

    def recording(self: object, first: int, count: int) -> object:
        taken.append(range(first, first + count))
        return original(self, first, count)

    monkeypatch.setattr("training.data.loader.TokenLoader.batch", recording)
    train(make_config(train__max_steps=4))
    train(make_config(train__max_steps=6, train__batch_size=3, train__grad_accum_steps=2))
    train(make_config(train__max_steps=7, train__batch_size=8))
    assert [number for numbers in taken for number in numbers] == list(range(4 * 4 + 2 * 6 + 8))
    state = read_state(step_folders(Path(make_config().run.dir) / "state")[-1][1])
    assert (state.step, state.sequences) == (7, 36)


def training_batch() -> Callable[..., object]:
    from training.data.loader import TokenLoader

    return TokenLoader.batch


def test_what_changes_the_learning_is_refused(make_config: ConfigMaker) -> None:
    train(make_config())
    changes = {
        "optimizer": "muon", "muon_lr": 0.5, "schedule": "wsd", "label_smoothing": 0.1, "z_loss": 1e-4,
        "dtype": "bfloat16", "seq_len": 8, "seed": 1, "grad_clip": 0.5, "beta2": 0.9,
    }  # fmt: skip
    for key, value in changes.items():
        with pytest.raises(ResumeError, match=rf"^train\.{key} is .* but this run was started with"):
            train(make_config(**{f"train__{key}": value}))
    with pytest.raises(ResumeError, match=r"^data\.loader is 'sliding' but this run was started with 'packed'"):
        train(make_config(data__loader="sliding"))


def test_checkpoints_leave_out_the_padding_of_the_vocabulary(make_config: ConfigMaker) -> None:
    config = make_config(model__vocab_multiple=64)
    train(config)
    run = Path(config.run.dir)
    assert load_file(run / "state" / "step-8" / "training.safetensors")["model.embed_tokens.weight"].shape[0] == 320
    for name in ("last", "best", "step-8"):
        assert load_model(run / "checkpoints" / name).config.vocab_size == 257


def test_saving_beside_the_steps_writes_the_same(make_config: ConfigMaker, tmp_path: Path) -> None:
    beside, between = (make_config(run__dir=str(tmp_path / str(mode)), run__async_save=mode) for mode in (True, False))
    for config in (beside, between):
        train(config)
    assert final_bytes(beside) == final_bytes(between)


def test_training_goes_on_while_a_checkpoint_is_written(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 4 waits until step 7 has been taken, yet holds the weights of step 4."""
    reached, weights = threading.Event(), {}
    write, step = training_save_state(), Trainer.train_step

    def slow(self: object, snapshot: object, state: object) -> None:
        if state.step == 4:  # type: ignore[attr-defined]
            assert reached.wait(20)
        write(self, snapshot, state)

    def stepping(self: Trainer) -> StepResult:
        if self.progress.step == 4:
            weights.update({n: p.detach().clone() for n, p in self.model.named_parameters()})
        result = step(self)
        if self.progress.step == 7:
            reached.set()
        return result

    monkeypatch.setattr("training.checkpoint.CheckpointManager.save_state", slow)
    monkeypatch.setattr(Trainer, "train_step", stepping)
    config = make_config()
    train(config)
    saved = load_file(Path(config.run.dir) / "state" / "step-4" / "training.safetensors")
    assert weights
    assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in weights.items())


def training_save_state() -> Callable[..., None]:
    from training.checkpoint import CheckpointManager

    return CheckpointManager.save_state


def test_what_a_background_write_meets_ends_the_run(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, in one sentence, before many more steps are taken; nothing half-written stays."""
    config = make_config(train__max_steps=1_000, train__save_interval=4)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    train(make_config(train__max_steps=4))
    monkeypatch.setattr("training.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="step-8 cannot be written: No space left on device"):
        train(config)
    run = Path(config.run.dir)
    assert [step for step, _ in step_folders(run / "state")] == [0, 4]
    assert not list(run.rglob("*.partial"))
    monkeypatch.undo()
    assert "from step 4" in train(make_config())


def test_the_saver_waits_and_passes_errors_on() -> None:
    done: list[int] = []
    gate = threading.Event()

    def gated() -> None:
        assert gate.wait(10)
        done.append(1)

    with Saver(background=True) as saver:
        saver.submit(gated)
        saver.check()
        assert done == []
        gate.set()
        saver.submit(lambda: done.append(2))
    assert done == [1, 2]

    def broken() -> None:
        raise CheckpointError("no room")

    with pytest.raises(CheckpointError, match="no room"), Saver(background=True) as saver:
        saver.submit(broken)
    with pytest.raises(KeyError), Saver(background=True) as saver:  # what ended the run, not what came of it
        _submit_and_fail(saver, broken)
    with Saver(background=False) as saver, pytest.raises(CheckpointError, match="no room"):
        saver.submit(broken)


def _submit_and_fail(saver: Saver, job: Callable[[], None]) -> None:
    saver.submit(job)
    raise KeyError


def test_snapshots_are_copies_in_memory_that_is_used_again() -> None:
    snapshots = Snapshots(Distributed(torch.device("cpu")))
    source = torch.arange(4.0)
    first = snapshots.take({"a": source, "b": torch.tensor(2)})
    source += 1
    assert first["a"].tolist() == [0, 1, 2, 3]
    second = snapshots.take({"a": source})
    assert second["a"].tolist() == [1, 2, 3, 4]
    assert second["a"].data_ptr() == first["a"].data_ptr()
    third = snapshots.take({"a": torch.zeros(2)})
    assert third["a"].tolist() == [0, 0]
    assert snapshots.take({}) == {}
    assert Snapshots(Distributed(torch.device("cpu"), rank=1, world_size=2)).take({"a": source}) == {}
