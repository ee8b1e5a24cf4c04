"""The training loop.

    python -m training train training/configs/shakespeare.toml data.dir=data/shakespeare run.dir=runs/shakespeare

A step depends on nothing but the weights, the optimisers' state, its number and the number of sequences consumed
before it: the learning rate, the data and the seeds of dropout are functions of these. That is what makes a resumed
run equal the uninterrupted one bit by bit, and keeps the data's order when the number of ranks changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from model.checkpoint import Provenance
from model.evaluation import Evaluation
from model.transformer import Transformer
from training.build import DTYPES
from training.checkpoint import CheckpointManager, RunState, Snapshot
from training.config import TrainConfig
from training.data.examples import ExampleSplit
from training.errors import DivergedError
from training.evaluate import Tokens, evaluate_windows
from training.evaluate_examples import evaluate_examples
from training.lora import adapter_scale
from training.metrics import flops_per_token, peak_flops, peak_memory
from training.optim import optimizer_tensors
from training.progress import Progress, Stopwatch
from training.recipe import config_to_tree
from training.reporting.run_log import RunLog
from training.saving import Saver, Snapshots
from training.schedule import lr_factor
from training.step import Stepper, StepResult


@dataclass(slots=True)
class Trainer:
    """Runs a recipe from `progress` to its last step; all ranks do, and rank 0 writes.

    `should_stop` is asked at every step. `parent` is the digest of the weights that the run started from, if it did.
    Whoever opened `saver` and `log` closes them, and so waits for the last save.
    """

    config: TrainConfig
    stepper: Stepper
    validation: Tokens
    checkpoints: CheckpointManager
    saver: Saver
    log: RunLog
    run_id: str
    data_digest: str
    progress: Progress = field(default_factory=Progress)
    parent: str | None = None
    should_stop: Callable[[], bool] = lambda: False
    _snapshots: Snapshots = field(init=False)
    _flops_per_token: float = field(init=False)
    _peak_flops: float | None = field(init=False, default=None)
    _watch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        settings, distributed = self.config.train, self.stepper.distributed
        self._snapshots = Snapshots(distributed)
        self._flops_per_token = flops_per_token(self.model, self.model.config, settings.seq_len)
        if distributed.is_main:
            self._peak_flops = peak_flops(distributed.device, DTYPES[settings.dtype], tf32=settings.tf32)

    @property
    def model(self) -> Transformer:
        return self.stepper.model.transformer

    def run(self) -> bool:
        """Trains until the last step, the early end, or until asked to stop, and saves. False for the last of these."""
        settings, progress = self.config.train, self.progress
        if settings.eval_first and progress.step == 0 and self._validate():
            self._save(best=True, whole=False)
        while progress.step < settings.max_steps and not self._ends_early():
            result = self.train_step()
            self._guard(result)
            step = progress.step
            is_last = step == settings.max_steps
            if is_last or step % settings.log_interval == 0:
                self._log_step(result)
            is_best = self._validate() if is_last or step % settings.eval_interval == 0 else False
            saves = is_last or result.stop or self._ends_early() or step % settings.save_interval == 0
            if saves or is_best:
                self._save(best=is_best, whole=saves)
            self.saver.check()
            if result.stop and not is_last:
                break
        self.saver.wait()
        self.log.page(now=True)
        return progress.step == settings.max_steps or self._ends_early()

    def train_step(self) -> StepResult:
        """The next step, on the stopwatch."""
        progress, start, count = self.progress, time.perf_counter(), self.stepper.sequences_per_step
        tokens = self.stepper.batches.size(progress.sequences, count).tokens
        result = self.stepper.step(progress.step, progress.sequences, stop=self.should_stop())
        progress.advance(count, skipped=result.skipped)
        self._watch.add(time.perf_counter() - start, tokens)
        self.log.report.advance()
        return result

    def _guard(self, result: StepResult) -> None:
        """Raises DivergedError after too many skipped steps in a row; none of them has changed the weights."""
        progress, limit = self.progress, max(1, self.config.train.max_skipped_steps)
        if result.skipped:
            self.log.report.line(
                f"step {progress.step}  skipped: loss {result.loss}, gradient norm {result.grad_norm} "
                f"({progress.skips_in_a_row} in a row)"
            )
        if progress.skips_in_a_row >= limit:
            raise DivergedError(
                f"the loss is {result.loss} and the gradient norm {result.grad_norm} at step {progress.step}, "
                f"number {progress.skips_in_a_row} in a row; lower train.lr and start a new run.dir, "
                f"for {self.checkpoints.states} keeps the last good state"
            )

    def _ends_early(self) -> bool:
        patience = self.config.train.early_stopping
        return patience > 0 and self.progress.validations_since_best >= patience

    def _validate(self) -> bool:
        """Validates, logs and shows a sample. True when no validation was better before."""
        with self.stepper.model.evaluating():
            result = self._evaluate()
        if not math.isfinite(result.loss):
            raise DivergedError(
                f"the validation loss is {result.loss} at step {self.progress.step}; lower train.lr and start a new "
                f"run.dir, for {self.checkpoints.states} keeps the last good state"
            )
        is_best = self.progress.validated(result)
        self._write("val", result.loss, perplexity=result.perplexity, bits_per_byte=result.bits_per_byte)
        self.log.report.evaluation(self.progress.step, result, is_best)
        self._show_sample()
        self.log.page(now=False)
        return is_best

    def _evaluate(self) -> Evaluation:
        settings, model, ranks = self.config.train, self.stepper.model, self.stepper.distributed
        if isinstance(self.validation, ExampleSplit):
            return evaluate_examples(
                model.validation_loss, self.validation, ranks, seq_len=settings.seq_len,
                batch_size=settings.batch_size, max_tokens=settings.eval_tokens,
            )  # fmt: skip
        return evaluate_windows(
            model.validation_loss, self.validation, ranks, seq_len=settings.seq_len, batch_size=settings.batch_size,
            max_tokens=settings.eval_tokens,
        )  # fmt: skip

    def _show_sample(self) -> None:
        if not self.config.run.sample_tokens:
            return
        model = self.model
        if self.stepper.model.is_sharded:
            self.saver.wait()  # the snapshot's memory is about to be written anew
            model = self._whole_model()
        if self.stepper.distributed.is_main:
            self.log.report.sample(model, self.checkpoints.tokenizer)

    def _whole_model(self) -> Transformer:
        """On rank 0 a copy with the gathered weights. Collective."""
        weights = self._snapshot(whole=False).weights
        with torch.device("meta"):
            model = Transformer(self.model.config)
        if weights:
            device = self.stepper.distributed.device
            model.load_state_dict({name: tensor.to(device) for name, tensor in weights.items()}, assign=True)
        return model

    def _log_step(self, result: StepResult) -> None:
        speed = self._watch.read()
        self._write(
            "train", result.loss, grad_norm=result.grad_norm, skipped_steps=self.progress.skipped_steps,
            memory=peak_memory(self.stepper.distributed.device),
        )  # fmt: skip
        self.log.report.training(self.progress.step, result.loss, self._learning_rate(), speed, self._mfu())

    def _learning_rate(self) -> float:
        """Of the last step; before the first one, none."""
        step, settings = self.progress.step, self.config.train
        return settings.lr * lr_factor(step - 1, settings) if step else 0.0

    def _mfu(self) -> float | None:
        if self._peak_flops is None or self._watch.speed is None:
            return None
        return self._watch.speed * self._flops_per_token / (self._peak_flops * self.stepper.distributed.world_size)

    def _write(self, split: str, loss: float, **more: float) -> None:
        """One line of metrics.jsonl; speed is that of the last logged steps."""
        speed, mfu = self._watch.speed, self._mfu()
        self.log.write(
            step=self.progress.step,
            split=split,
            loss=loss,
            lr=self._learning_rate(),
            tokens_per_second=None if speed is None else round(speed, 1),
            mfu=None if mfu is None else round(mfu, 5),
            tokens=self.stepper.batches.size(0, self.progress.sequences).tokens,
            **more,
        )

    def state(self) -> RunState:
        """Where the run stands, for `CheckpointManager.save_state`."""
        progress = self.progress
        return RunState(
            step=progress.step,
            sequences=progress.sequences,
            run_id=self.run_id,
            best_loss=progress.best_loss,
            best_step=progress.best_step,
            validations_since_best=progress.validations_since_best,
            skipped_steps=progress.skipped_steps,
            skips_in_a_row=progress.skips_in_a_row,
            data_digest=self.data_digest,
            config=config_to_tree(self.config),
            scaler=self.stepper.scaler.state_dict(),
        )

    def save_start(self) -> None:
        """The state of step 0, at once: whenever the run is killed, there is one to go on from."""
        snapshot = self._snapshot(whole=True)
        if self.stepper.distributed.is_main:
            self.checkpoints.save_state(snapshot, self.state())

    def _save(self, *, best: bool, whole: bool) -> None:
        """Starts writing `best`, or `last` with the state to go on from, or all of them, from one snapshot.

        The state comes last: a crash before it is there leads back to the state before, which makes the rest anew.
        """
        self.saver.wait()
        snapshot = self._snapshot(whole=whole)
        if not self.stepper.distributed.is_main:
            return
        provenance, state, checkpoints = self._provenance(), self.state(), self.checkpoints

        def write() -> None:
            if best:
                checkpoints.save_best(snapshot, provenance)
            if whole:
                checkpoints.save_last(snapshot, state.step, provenance)
                checkpoints.save_state(snapshot, state)

        self.saver.submit(write)

    def _snapshot(self, *, whole: bool) -> Snapshot:
        """`whole`: with the optimisers' moments. Collective."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if whole:
            moments = optimizer_tensors(self.stepper.optimizers, self.model)
            tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
        return Snapshot(self._snapshots.take(tensors), adapter_scale(self.config.train))

    def _provenance(self) -> Provenance:
        """The validation figures are given only where they are those of this very step."""
        result: Evaluation | None = self.progress.evaluation_now
        return Provenance(
            step=self.progress.step,
            run=self.run_id,
            data=f"sha256:{self.data_digest}",
            parent=self.parent,
            validation_loss=result.loss if result else None,
            bits_per_byte=result.bits_per_byte if result else None,
        )
