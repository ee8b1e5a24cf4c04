"""One run from recipe to exit: checks everything, opens or continues the run folder, trains, stops on signals."""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from rich.console import Console

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.build import DTYPES, make_model_config, resolve_device
from training.checkpoint import CheckpointManager, RunState, has_state, load_tensors
from training.config import TrainConfig
from training.data import TokenLoader, open_split
from training.errors import RecipeError, ResumeError
from training.metrics import MetricsLog
from training.optim import build_optimizer
from training.recipe import config_to_toml, config_to_tree
from training.report import Reporter
from training.shards import TOKENIZER_DIR, manifest_digest, read_manifest
from training.trainer import Progress, Trainer

Resume = Literal["auto", "never"]

# A resumed run may stop later, log differently or move to another machine; it may not learn something else.
_FREE_KEYS = frozenset(
    {"data.dir", "data.verify", "train.device", "train.compile", "train.log_interval", "train.eval_interval",
     "train.eval_tokens", "train.save_interval", "train.max_steps", "run.dir", "run.save_dtype", "run.keep",
     "run.sample_prompt", "run.sample_tokens"}
)  # fmt: skip


@dataclass(slots=True)
class StopSignals:
    """SIGTERM and SIGINT ask the loop to save and stop; a second SIGINT interrupts at once."""

    received: list[int] = field(default_factory=list)

    def __call__(self) -> bool:
        return bool(self.received)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.append(number)

    @contextmanager
    def installed(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = [signal.signal(number, self.handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)


def run_training(config: TrainConfig, resume: Resume, console: Console) -> bool:
    """Trains to the recipe's last step. False when a signal stopped it earlier; everything is then saved.

    Raises RecipeError, DataError, ResumeError, DivergedError or the model package's errors before anything of an
    earlier run is overwritten.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("WORLD_SIZE is above 1, but training runs in one process; start it without torchrun")
    run_dir, data_dir = Path(config.run.dir), Path(config.data.dir)
    device = resolve_device(config.train.device)
    manifest = read_manifest(data_dir)
    tokenizer = Tokenizer.load(data_dir / TOKENIZER_DIR)
    if (tokenizer.vocab_size, tokenizer.digest) != (manifest.vocab_size, manifest.tokenizer_digest):
        raise ResumeError(f"{data_dir / TOKENIZER_DIR}: not the tokenizer that the data was prepared with")
    model_config = make_model_config(config, tokenizer)
    train_split = open_split(data_dir, "train", verify=config.data.verify)
    val_split = open_split(data_dir, "val", verify=config.data.verify)
    loader = TokenLoader(train_split, config.train.seq_len, config.train.batch_size, config.train.seed)
    checkpoints = CheckpointManager(run_dir, tokenizer, DTYPES[config.run.save_dtype], config.run.keep)
    _require_free(run_dir, resume)
    data_digest = manifest_digest(data_dir)
    with _locked(run_dir):
        found = checkpoints.find_state() if has_state(run_dir) else None
        if found is not None:
            _check_same(found[0], config, data_digest)
        model = _build_model(model_config, config.train.seed, device)
        optimizer = build_optimizer(model, config.train)
        scaler = torch.amp.GradScaler(device.type, enabled=config.train.dtype == "float16")
        progress, run_id = Progress(), f"{run_dir.name}-{secrets.token_hex(4)}"
        if found is not None:
            state, folder, problems = found
            for problem in problems:
                console.print(f"passing over a damaged state: {problem}", style="yellow", markup=False)
            load_tensors(folder, model, optimizer)
            if state.scaler:
                scaler.load_state_dict(dict(state.scaler))
            progress, run_id = Progress(state.step, state.best_loss, state.best_step), state.run_id
        (run_dir / "config.toml").write_text(config_to_toml(config), encoding="utf-8")
        reporter = Reporter(
            console, config.train.max_steps, sample_prompt=config.run.sample_prompt,
            sample_tokens=config.run.sample_tokens, seed=config.train.seed,
        )  # fmt: skip
        stop = StopSignals()
        log = MetricsLog(run_dir / "metrics.jsonl", progress.step)
        try:
            with stop.installed(), reporter:
                count = sum(p.numel() for p in model.parameters())
                reporter.line(f"run {run_id}: {count:,} parameters on {device}, from step {progress.step}")
                reporter.start(progress.step)
                trainer = Trainer(
                    config, model, optimizer, scaler, loader, val_split, checkpoints, log, reporter,
                    run_id, data_digest, progress, stop,
                )  # fmt: skip
                finished = trainer.run()
                reporter.line(f"{'finished' if finished else 'stopped and saved'} at step {progress.step}")
                return finished
        finally:
            log.close()


def _build_model(config: ModelConfig, seed: int, device: torch.device) -> Transformer:
    # Initialised on the CPU, so that every device starts from the same weights.
    model = Transformer(config)
    model.init_weights(seed)
    return model.to(device)


def _require_free(run_dir: Path, resume: Resume) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise RecipeError(f"run.dir {run_dir} is a file; name a folder")
    if has_state(run_dir):
        if resume == "never":
            raise ResumeError(f"{run_dir}: already holds a run; choose another run.dir or pass --resume auto")
    elif (run_dir / "checkpoints").exists():
        raise ResumeError(f"{run_dir}: holds checkpoints but no state to resume from; choose another run.dir")


def _check_same(state: RunState, config: TrainConfig, data_digest: str) -> None:
    """Raises ResumeError, naming the first key that differs from the run's own recipe."""
    now = config_to_tree(config)
    for section in sorted({*now, *state.config}):
        before_keys, now_keys = state.config.get(section, {}), now.get(section, {})
        for key in sorted({*before_keys, *now_keys}):
            before, after = before_keys.get(key), now_keys.get(key)
            if before != after and f"{section}.{key}" not in _FREE_KEYS:
                raise ResumeError(
                    f"{section}.{key} is {after!r} but this run was started with {before!r}; "
                    "restore it or choose another run.dir"
                )
    if state.data_digest != data_digest:
        raise ResumeError(f"data.dir {config.data.dir}: other data than this run was started with")


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Keeps a second process from writing to the same run folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResumeError(f"{run_dir}: another process is training into this folder") from None
        yield
