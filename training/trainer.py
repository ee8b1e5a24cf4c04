"""The training loop.

    python -m training train training/configs/shakespeare.toml data.dir=data/shakespeare run.dir=runs/shakespeare

A step depends on nothing but the weights, the optimiser's state and the step's number: the learning rate, the data
and the seed of dropout are functions of it. That is what makes a resumed run equal the uninterrupted one bit by bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import Provenance
from model.transformer import Transformer
from training.build import DTYPES
from training.checkpoint import CheckpointManager, RunState
from training.config import TrainConfig
from training.data import TokenLoader, TokenSplit
from training.errors import DivergedError
from training.evaluate import Evaluation, evaluate_loss
from training.loss import summed_cross_entropy
from training.metrics import MetricsLog, flops_per_token, peak_flops
from training.optim import set_learning_rate
from training.recipe import config_to_tree
from training.report import Reporter
from training.schedule import learning_rate


@dataclass(slots=True)
class Progress:
    """Where the run stands."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    last_evaluation: Evaluation | None = None


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent in training steps since the last reading."""

    seconds: float = 0.0
    tokens: int = 0

    def read(self) -> float:
        """Tokens per second, and start anew."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        self.seconds, self.tokens = 0.0, 0
        return rate


@dataclass(slots=True)
class Trainer:
    """Runs a recipe from `progress.step` to its last step. `should_stop` is asked after every step."""

    config: TrainConfig
    model: Transformer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: TokenLoader
    validation: TokenSplit
    checkpoints: CheckpointManager
    log: MetricsLog
    report: Reporter
    run_id: str
    data_digest: str
    progress: Progress = field(default_factory=Progress)
    should_stop: Callable[[], bool] = lambda: False
    _forward: Callable[[Tensor, Tensor], Tensor] = field(init=False)
    _flops_per_token: float = field(init=False)
    _peak_flops: float | None = field(init=False)
    _watch: Stopwatch = field(default_factory=Stopwatch)
    _speed: float = 0.0

    def __post_init__(self) -> None:
        self._forward = torch.compile(self._micro_loss) if self.config.train.compile else self._micro_loss
        self._flops_per_token = flops_per_token(self.model, self.model.config, self.config.train.seq_len)
        self._peak_flops = peak_flops(self.model.device, DTYPES[self.config.train.dtype])

    def run(self) -> bool:
        """Trains until the last step or until asked to stop, and saves. True when the last step was reached."""
        settings, last = self.config.train, self.config.train.max_steps
        while self.progress.step < last:
            loss = self.timed_step()
            step = self.progress.step
            stopping = self.should_stop()
            ends = step == last
            saves = ends or stopping or step % settings.save_interval == 0
            if ends or step % settings.log_interval == 0:
                self._log_step(loss)
            elif saves:
                self._require_finite(loss.item())
            if ends or step % settings.eval_interval == 0:
                self._evaluate()
            if saves:
                self._save()
            if stopping and not ends:
                return False
        return True

    def timed_step(self) -> Tensor:
        """`train_step` of the next step, on the stopwatch."""
        start = time.perf_counter()
        loss = self.train_step(self.progress.step)
        self.progress.step += 1
        if self.progress.step % self.config.train.log_interval == 0 and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self._watch.seconds += time.perf_counter() - start
        self._watch.tokens += self.config.tokens_per_step
        self.report.advance()
        return loss

    def train_step(self, step: int) -> Tensor:
        """One optimiser step (0-based). Returns its mean loss, nats per token, still on the device."""
        settings = self.config.train
        set_learning_rate(self.optimizer, self._learning_rate(step))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.model.device)
        for micro in range(step * settings.grad_accum_steps, (step + 1) * settings.grad_accum_steps):
            inputs, targets = self._batch(micro)
            torch.manual_seed(_dropout_seed(settings.seed, micro, 0))
            loss = self._forward(inputs, targets) / settings.grad_accum_steps
            torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
        if settings.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def _micro_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        settings = self.config.train
        with torch.autocast(inputs.device.type, DTYPES[settings.dtype], enabled=settings.dtype != "float32"):
            total = summed_cross_entropy(
                self.model.compute_logits, self.model(inputs), targets, vocab_size=self.model.config.vocab_size
            )
        return total / targets.numel()

    def _batch(self, micro_step: int) -> tuple[Tensor, Tensor]:
        size = self.config.train.batch_size
        arrays = self.loader.batch(micro_step * size, size)
        inputs, targets = (torch.from_numpy(array) for array in arrays)
        device = self.model.device
        if device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def _learning_rate(self, step: int) -> float:
        settings = self.config.train
        return learning_rate(
            step, peak=settings.lr, min_ratio=settings.min_lr_ratio,
            warmup_steps=settings.warmup_steps, max_steps=settings.max_steps,
        )  # fmt: skip

    def _evaluate(self) -> None:
        settings = self.config.train
        result = evaluate_loss(
            self.model, self.validation, seq_len=settings.seq_len, batch_size=settings.batch_size,
            max_tokens=settings.eval_tokens, autocast=None if settings.dtype == "float32" else DTYPES[settings.dtype],
        )  # fmt: skip
        self._require_finite(result.loss)
        self.progress.last_evaluation = result
        self._write("val", result.loss, perplexity=result.perplexity, bits_per_byte=result.bits_per_byte)
        is_best = self.progress.best_loss is None or result.loss < self.progress.best_loss
        if is_best:
            self.progress.best_loss, self.progress.best_step = result.loss, self.progress.step
            self.checkpoints.save_best(self.model, self._provenance())
        self.report.evaluation(self.progress.step, result, is_best)
        self.report.sample(self.model, self.checkpoints.tokenizer)

    def _log_step(self, loss: Tensor) -> None:
        value = loss.item()
        self._require_finite(value)
        self._speed = self._watch.read()
        self._write("train", value)
        rate = self._learning_rate(self.progress.step - 1)
        self.report.training(self.progress.step, value, rate, self._speed, self._mfu())

    def _mfu(self) -> float | None:
        return None if self._peak_flops is None else self._speed * self._flops_per_token / self._peak_flops

    def _write(self, split: str, loss: float, **more: float) -> None:
        """One line of metrics.jsonl; speed is that of the last logged steps."""
        step, mfu = self.progress.step, self._mfu()
        self.log.write(
            step=step,
            split=split,
            loss=loss,
            lr=self._learning_rate(step - 1),
            tokens_per_second=round(self._speed, 1),
            mfu=None if mfu is None else round(mfu, 5),
            tokens=step * self.config.tokens_per_step,
            **more,
        )

    def state(self) -> RunState:
        """Where the run stands, for `CheckpointManager.save_state`."""
        return RunState(
            step=self.progress.step,
            run_id=self.run_id,
            best_loss=self.progress.best_loss,
            best_step=self.progress.best_step,
            data_digest=self.data_digest,
            config=config_to_tree(self.config),
            scaler=self.scaler.state_dict(),
        )

    def _save(self) -> None:
        self.checkpoints.save_last(self.model, self.progress.step, self._provenance())
        self.checkpoints.save_state(self.model, self.optimizer, self.state())

    def _provenance(self) -> Provenance:
        """The validation figures are given only where they are those of this very step."""
        result = self.progress.last_evaluation
        evaluated = result is not None and self._evaluated_now()
        return Provenance(
            step=self.progress.step,
            run=self.run_id,
            data=f"sha256:{self.data_digest}",
            validation_loss=result.loss if result and evaluated else None,
            bits_per_byte=result.bits_per_byte if result and evaluated else None,
        )

    def _evaluated_now(self) -> bool:
        settings, step = self.config.train, self.progress.step
        return step == settings.max_steps or step % settings.eval_interval == 0

    def _require_finite(self, loss: float) -> None:
        if not np.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {self.progress.step}; lower train.lr, or resume from the last state"
            )


def _dropout_seed(seed: int, micro_step: int, rank: int) -> int:
    """A seed of its own for every micro-step and rank, so that no random state has to be kept."""
    sequence = np.random.SeedSequence([seed, micro_step, rank])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
