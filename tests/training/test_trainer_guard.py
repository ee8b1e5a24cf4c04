"""Steps that are no numbers, early stopping, and what a validation is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from model.evaluation import Evaluation
from tests.training.conftest import ConfigMaker, train
from training.checkpoint import read_state, step_folders
from training.config import TrainConfig
from training.data.dataset import open_split
from training.errors import DivergedError
from training.evaluate import evaluate_checkpoint
from training.loss import summed_cross_entropy
from training.progress import Progress, Stopwatch
from training.step import StepResult
from training.trainer import Trainer


def lines(config: TrainConfig, split: str = "train") -> list[dict[str, object]]:
    text = (Path(config.run.dir) / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == split]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[int], float], None]:
    """Multiplies the loss of the given training steps (1-based, one micro-batch each) by a number."""

    def install(steps: Iterable[int], factor: float) -> None:
        wanted, now = frozenset(steps), [0]
        original, step = summed_cross_entropy, Trainer.train_step

        def loss(*args: object, **kwargs: object) -> torch.Tensor:
            value = original(*args, **kwargs)  # type: ignore[arg-type]
            return value * factor if torch.is_grad_enabled() and now[0] in wanted else value

        def counted(self: Trainer) -> StepResult:
            now[0] = self.progress.step + 1
            return step(self)

        monkeypatch.setattr("training.parallel.summed_cross_entropy", loss)
        monkeypatch.setattr(Trainer, "train_step", counted)

    return install


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_no_number_changes_nothing_and_is_counted(
    optimizer: str, factor: float, make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[..., None],
) -> None:  # fmt: skip
    """Weights and moments before and after are the same, bit for bit; the next step learns again."""
    config = make_config(train__optimizer=optimizer)
    spoil([3], factor)
    seen: list[tuple[StepResult, list[torch.Tensor]]] = []
    original = Trainer.train_step

    def recording(self: Trainer) -> StepResult:
        result = original(self)
        moments = [value for o in self.stepper.optimizers for s in o.state.values() for value in s.values()]
        seen.append((result, [t.detach().clone() for t in (*self.model.parameters(), *moments)]))
        return result

    monkeypatch.setattr(Trainer, "train_step", recording)
    output = train(config)
    assert [result.skipped for result, _ in seen] == [step == 3 for step in range(1, 9)]
    assert all(map(torch.equal, seen[1][1], seen[2][1]))
    assert not all(map(torch.equal, seen[2][1], seen[3][1]))
    assert [line["skipped_steps"] for line in lines(config)] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert lines(config)[2]["loss"] is None
    assert "step 3  skipped: loss" in output
    assert read_state(step_folders(Path(config.run.dir) / "state")[-1][1]).skipped_steps == 1


def test_an_endless_row_of_skipped_steps_ends_the_run(make_config: ConfigMaker, spoil: Callable[..., None]) -> None:
    config = make_config(train__max_skipped_steps=3, train__max_steps=12)
    spoil([2, 3, 6, 7, 8, 9], float("nan"))
    with pytest.raises(DivergedError, match=r"at step 8, number 3 in a row; lower train\.lr .* last good state"):
        train(config)
    state = read_state(step_folders(Path(config.run.dir) / "state")[-1][1])
    assert (state.step, state.skipped_steps, state.skips_in_a_row) == (4, 2, 0)


def test_a_row_of_skipped_steps_goes_on_over_a_resume(
    make_config: ConfigMaker, spoil: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within the row, the run ends at the same step as if it had not been stopped."""
    config = make_config(train__max_skipped_steps=3)
    spoil([3, 4, 5, 6], float("nan"))
    with monkeypatch.context() as patch:
        patch.setattr("training.stop.StopSignals.__call__", lambda self: True)
        for step in (1, 2, 3, 4):
            assert f"stopped and saved at step {step}" in train(config)
    with pytest.raises(DivergedError, match="at step 5, number 3 in a row"):
        train(config)


def test_overflow_of_scaled_gradients_is_not_a_lost_step(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 begins with a scale at which gradients overflow; the scale halves and nothing is counted."""
    config = make_config(train__dtype="float16", train__max_skipped_steps=1)
    scales: list[float] = []
    original = Trainer.train_step

    def scaled_up(self: Trainer) -> StepResult:
        if self.progress.step == 0:
            self.stepper.scaler.load_state_dict(self.stepper.scaler.state_dict() | {"scale": 2.0**30})
        result = original(self)
        scales.append(self.stepper.scaler.get_scale())
        return result

    monkeypatch.setattr(Trainer, "train_step", scaled_up)
    train(config)
    assert scales[0] == 2.0**29
    assert scales[-1] < 2.0**29
    assert [line["skipped_steps"] for line in lines(config)] == [0] * 8
    assert lines(config)[0]["grad_norm"] is None


def test_gradients_that_no_scale_saves_are_counted(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss with gradients that are NaN: halving the scale for ever is no way out."""
    config = make_config(train__dtype="float16", train__max_skipped_steps=2, train__max_steps=200)
    monkeypatch.setattr("torch.nn.utils.get_total_norm", lambda gradients: torch.tensor(float("nan")))
    monkeypatch.setattr("torch.amp.GradScaler.get_scale", lambda self: 0.5)
    with pytest.raises(DivergedError, match="at step 2, number 2 in a row"):
        train(config)


def test_a_run_ends_after_validations_without_a_new_best(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Best at step 3, patience 2: it ends at step 5 with everything saved, and a resumed run knows that."""
    losses = {1: 3.0, 2: 2.5, 3: 2.0, 4: 2.1, 5: 2.0, 6: 1.0}

    def validation(self: Trainer) -> bool:
        return self.progress.validated(Evaluation(losses[self.progress.step], 10, 1.0))

    monkeypatch.setattr(Trainer, "_validate", validation)
    config = make_config(train__early_stopping=2, train__eval_interval=1, train__save_interval=2)
    assert "finished at step 5" in train(config)
    assert "finished at step 5" in train(config)
    run = Path(config.run.dir)
    manifests = {n: json.loads((run / "checkpoints" / n / "manifest.json").read_text()) for n in ("best", "last")}
    assert (manifests["best"]["step"], manifests["best"]["validation_loss"]) == (3, 2.0)
    assert manifests["last"]["step"] == 5
    state = read_state(run / "state" / "step-5")
    assert (state.best_loss, state.best_step, state.validations_since_best) == (2.0, 3, 2)
    assert "finished at step 6" in train(make_config(
        train__early_stopping=3, train__eval_interval=1, train__max_steps=6, run__dir=str(run)
    ))  # fmt: skip
    assert read_state(run / "state" / "step-6").best_step == 6


def test_patience_is_kept_over_a_resume(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Trainer, "_validate", lambda self: self.progress.validated(Evaluation(float(self.progress.step), 10, 1.0))
    )
    config = make_config(train__early_stopping=3, train__eval_interval=1)
    with monkeypatch.context() as patch:
        patch.setattr("training.stop.StopSignals.__call__", lambda self: True)
        for step in (1, 2, 3):
            assert f"stopped and saved at step {step}" in train(config)
    assert "finished at step 4" in train(config)


def test_the_logged_validation_is_that_of_the_saved_checkpoint(make_config: ConfigMaker, data_dir: Path) -> None:
    """Without smoothing and z-loss, whatever the objective has, and with the padding of the vocabulary cut off."""
    config = make_config(train__label_smoothing=0.2, train__z_loss=1e-3, train__eval_tokens=0, model__vocab_multiple=64)
    train(config)
    checkpoint = Path(config.run.dir) / "checkpoints" / "last"
    expected = evaluate_checkpoint(checkpoint, data=data_dir, seq_len=16, batch_size=4, device="cpu")
    logged = lines(config, "val")[-1]
    assert logged["loss"] == pytest.approx(expected.loss, abs=1e-6)
    assert logged["bits_per_byte"] == pytest.approx(expected.bits_per_byte, abs=1e-6)
    assert lines(config)[-1]["loss"] > expected.loss + 0.1  # type: ignore[operator]
    assert open_split(data_dir, "val").num_tokens - 1 == expected.tokens


def test_a_perplexity_beyond_all_numbers_is_null(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.trainer.evaluate_windows", lambda *args, **kwargs: Evaluation(1_000.0, 10, 1.0))
    config = make_config(train__log_interval=100)
    train(config)
    first, last = lines(config, "val")
    assert (first["loss"], first["perplexity"]) == (1_000.0, None)
    assert (first["tokens_per_second"], first["mfu"]) == (None, None)  # nothing has been timed yet
    assert last["tokens_per_second"] is not None


def test_a_validation_that_is_no_number_ends_the_run(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.trainer.evaluate_windows", lambda *a, **k: Evaluation(float("nan"), 10, 1.0))
    with pytest.raises(DivergedError, match=r"the validation loss is nan at step 4; lower train\.lr"):
        train(make_config())


def test_counting() -> None:
    progress = Progress()
    for skipped in (False, True, True, False, True):
        progress.advance(10, skipped=skipped)
    assert (progress.step, progress.sequences, progress.skipped_steps, progress.skips_in_a_row) == (5, 50, 3, 1)
    assert progress.evaluation_now is None
    watch = Stopwatch()
    assert watch.speed is None
    watch.add(2.0, 100)
    assert watch.read() == 50.0
    assert watch.read() is None
