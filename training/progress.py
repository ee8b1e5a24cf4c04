"""Where a run stands, and how fast it goes."""

from __future__ import annotations

from dataclasses import dataclass

from model.evaluation import Evaluation
from training.checkpoint import RunState


@dataclass(slots=True)
class Progress:
    """What the loop counts. `sequences` were consumed by all ranks; the best loss is the lowest validation's."""

    step: int = 0
    sequences: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0
    skipped_steps: int = 0
    skips_in_a_row: int = 0
    _evaluation: tuple[int, Evaluation] | None = None

    @classmethod
    def of(cls, state: RunState) -> Progress:
        return cls(
            step=state.step,
            sequences=state.sequences,
            best_loss=state.best_loss,
            best_step=state.best_step,
            validations_since_best=state.validations_since_best,
            skipped_steps=state.skipped_steps,
            skips_in_a_row=state.skips_in_a_row,
        )

    def advance(self, sequences: int, *, skipped: bool) -> None:
        """One step further. A skipped one has consumed its data too, so that the next sees other."""
        self.step += 1
        self.sequences += sequences
        self.skipped_steps += skipped
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0

    def validated(self, result: Evaluation) -> bool:
        """Records a validation of this step's weights. True for a new best."""
        self._evaluation = self.step, result
        is_best = self.best_loss is None or result.loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step = result.loss, self.step
        self.validations_since_best = 0 if is_best else self.validations_since_best + 1
        return is_best

    @property
    def evaluation_now(self) -> Evaluation | None:
        """The validation of this very step, if there was one."""
        return self._evaluation[1] if self._evaluation is not None and self._evaluation[0] == self.step else None


@dataclass(slots=True)
class Stopwatch:
    """Tokens per second of training steps; `speed` is None until the first reading."""

    speed: float | None = None
    _seconds: float = 0.0
    _tokens: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        self._seconds += seconds
        self._tokens += tokens

    def read(self) -> float | None:
        """The speed since the last reading."""
        self.speed = self._tokens / self._seconds if self._seconds else None
        self._seconds, self._tokens = 0.0, 0
        return self.speed
