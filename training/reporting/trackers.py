"""TensorBoard and Weights & Biases beside metrics.jsonl, for those who ask for them in the recipe.

    trackers = make_trackers(config, run_id)
    trackers.log({"step": 10, "split": "train", "loss": 2.5})   # one object of metrics.jsonl
    trackers.close()

Both show the scalars as `train/loss`, `val/loss` …. Both packages are extras, imported only when a recipe names them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from model.file_errors import naming_file
from training.config import TrainConfig
from training.errors import RecipeError
from training.recipe import config_to_tree

# These belong to the run, whichever split a line is about; they are drawn once, from the lines of training.
_OF_THE_RUN = frozenset({"lr", "tokens_per_second", "mfu", "tokens"})


class Tracker(Protocol):
    """Somewhere that scalars go."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Trackers:
    """All that the recipe asks for; often none."""

    trackers: tuple[Tracker, ...] = ()

    def log(self, values: Mapping[str, Any]) -> None:
        """Passes on the numbers of one object of metrics.jsonl; what is null, NaN or infinite is left out."""
        scalars = _scalars(values)
        if scalars:
            for tracker in self.trackers:
                tracker.log(int(values["step"]), scalars)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def make_trackers(config: TrainConfig, run_id: str) -> Trackers:
    """What run.tensorboard and run.wandb ask for. Raises RecipeError where the package is not installed."""
    trackers: list[Tracker] = []
    if config.run.tensorboard:
        trackers.append(TensorBoard(Path(config.run.dir) / "tensorboard"))
    if config.run.wandb:
        trackers.append(WeightsAndBiases(config, run_id))
    return Trackers(tuple(trackers))


class TensorBoard:
    """One event file in a folder. Raises RecipeError without the extra `tensorboard`, or when the disk refuses.

    The file is opened with the first scalars: their step begins a session, which makes TensorBoard forget what an
    interrupted run had written from there on. Every line is written at once, for a killed run resumes behind what it
    has logged; the package's own writer would do it in a thread, which prints a stack of calls when the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise RecipeError(_not_installed("run.tensorboard", "TensorBoard", "tensorboard")) from None
        self._folder, self._events, self._summaries, self._records = folder, event_pb2, summary_pb2, RecordWriter
        self._file: BinaryIO | None = None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        with naming_file(self._folder, "written", RecipeError):
            if self._file is None:
                self._file = self._open()
                self._write(file_version="brain.Event:2")
                session = self._events.SessionLog
                self._write(step=step, session_log=session(status=session.START))
            self._write(step=step, summary=self._summaries.Summary(value=values))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with naming_file(self._folder, "written", RecipeError):
                self._file.close()

    def _open(self) -> BinaryIO:
        """TensorBoard reads a folder's files in the order of their names, which begin with the time."""
        self._folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        return (self._folder / f"events.out.tfevents.{now // 10**9:010d}.{now % 10**9:09d}").open("xb")

    def _write(self, **fields: Any) -> None:
        event = self._events.Event(wall_time=time.time(), **fields)
        self._records(self._file).write(event.SerializeToString())


class WeightsAndBiases:
    """One W&B run, whose id is the run's own: a resumed run goes on in it. WANDB_MODE and the like apply.

    Sent are the scalars and the recipe, never code, git state or what is printed (samples are text of the data).
    Raises RecipeError without the extra `wandb`, or when W&B refuses the run.
    """

    def __init__(self, config: TrainConfig, run_id: str) -> None:
        try:
            import wandb
        except ImportError:
            raise RecipeError(_not_installed("run.wandb", "Weights & Biases", "wandb")) from None
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)  # W&B falls back to a temporary folder where there is none
        try:
            self._run = wandb.init(
                project=config.run.wandb,
                name=folder.name,
                id=re.sub(r"[^\w-]", "-", run_id, flags=re.ASCII)[-64:],
                resume="allow",
                dir=str(folder),
                config=config_to_tree(config),
                allow_val_change=True,
                save_code=False,
                settings={"disable_code": True, "disable_git": True, "console": "off"},
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"run.wandb: Weights & Biases refused the run ({reason}); run `wandb login` or set WANDB_MODE=offline"
            ) from None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        # Steps that W&B already has from an interrupted run are ignored there; a resumed run repeats them exactly.
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    split = values.get("split", "train")
    left_out = {"step", "split"} | (_OF_THE_RUN if split != "train" else frozenset())
    return {
        f"{split}/{name}": value for name, value in values.items() if name not in left_out and _is_finite_number(value)
    }


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _not_installed(key: str, name: str, extra: str) -> str:
    return f"{key} is set but {name} is not installed; run pip install 'quill[{extra}]' or leave {key} out"
