"""Who may write to a run folder, and whether a saved run may go on with the recipe at hand."""

from __future__ import annotations

import dataclasses
import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from model.atomic_folder import replace_file
from model.file_errors import naming_file
from training.checkpoint import RunState, has_state
from training.config import SECTIONS, TrainConfig
from training.errors import RecipeError, ResumeError
from training.recipe import config_to_toml, config_to_tree

Resume = Literal["auto", "never"]

# A resumed run may stop later, log differently, use other machines and share its batches out otherwise; it may not
# learn something else. Batch sizes are free because the data's position is counted in sequences.
_FREE_KEYS = frozenset(
    {"data.dir", "data.verify", "train.device", "train.compile", "train.parallel", "train.activation_checkpointing",
     "train.batch_size", "train.grad_accum_steps", "train.log_interval", "train.eval_interval", "train.eval_first",
     "train.eval_tokens", "train.early_stopping", "train.max_skipped_steps", "train.save_interval",
     "train.max_steps", "run.dir", "run.save_dtype", "run.keep", "run.async_save", "run.tensorboard", "run.wandb",
     "run.sample_prompt", "run.sample_tokens"}
)  # fmt: skip


def require_usable(run_dir: Path, resume: Resume) -> None:
    """Raises RecipeError or ResumeError when training into the folder would overwrite what it holds."""
    if run_dir.exists() and not run_dir.is_dir():
        raise RecipeError(f"run.dir {run_dir} is a file; name a folder")
    if has_state(run_dir):
        if resume == "never":
            raise ResumeError(f"{run_dir}: already holds a run; choose another run.dir or pass --resume auto")
    elif (run_dir / "checkpoints").exists():
        raise ResumeError(f"{run_dir}: holds checkpoints but no state to resume from; choose another run.dir")


def check_same_run(state: RunState, config: TrainConfig, data_digest: str) -> None:
    """Raises ResumeError, naming the first key whose change would make this another run."""
    before, now = state.config, config_to_tree(config)
    for section in sorted({*before, *now}):
        old, new = (_with_defaults(section, tree.get(section, {})) for tree in (before, now))
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key) and f"{section}.{key}" not in _FREE_KEYS:
                raise ResumeError(
                    f"{section}.{key} is {new.get(key)!r} but this run was started with {old.get(key)!r}; "
                    "restore it or choose another run.dir"
                )
    if state.data_digest != data_digest:
        raise ResumeError(f"data.dir {config.data.dir}: other data than this run was started with")


def _with_defaults(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A key that a release before did not know had its default."""
    fields = dataclasses.fields(SECTIONS[section]) if section in SECTIONS else ()
    return {field.name: field.default for field in fields} | dict(values)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Creates the folder and keeps a second process from writing to it. Raises RecipeError or ResumeError."""
    with naming_file(f"run.dir {run_dir}", "written", RecipeError):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    with lock as file:
        with naming_file(f"run.dir {run_dir}", "locked", RecipeError):  # not every network file system knows locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResumeError(f"{run_dir}: another process is training into this folder") from None
        yield


def write_config(run_dir: Path, config: TrainConfig) -> None:
    """config.toml, the resolved recipe. Raises CheckpointError when the disk refuses; an older one is as it was."""
    replace_file(run_dir / "config.toml", config_to_toml(config).encode())
