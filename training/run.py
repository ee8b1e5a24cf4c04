"""One run from recipe to exit: checks every input, opens or continues the run folder, trains, stops on signals."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from model.config import ModelConfig
from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.build import DTYPES, make_model_config, resolve_device
from training.checkpoint import CheckpointManager, FoundState, has_state, load_tensors
from training.config import TrainConfig
from training.data import TokenLoader, TokenSplit
from training.dataset import make_loader, open_dataset
from training.errors import RecipeError
from training.generate import prompt_ids
from training.metrics import MetricsLog
from training.optim import build_optimizer
from training.recipe import config_to_toml
from training.report import Reporter
from training.run_folder import Resume, check_same_run, locked, require_usable
from training.stop import StopSignals
from training.trainer import Progress, Trainer


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a recipe names, opened and checked."""

    device: torch.device
    tokenizer: Tokenizer
    model_config: ModelConfig
    loader: TokenLoader
    validation: TokenSplit
    data_digest: str


def run_training(config: TrainConfig, resume: Resume, console: Console) -> bool:
    """Trains to the recipe's last step. False when a signal stopped it earlier; everything is then saved.

    Raises RecipeError, DataError, ResumeError or the model package's errors before anything that an earlier run
    wrote is replaced, and DivergedError while training.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("WORLD_SIZE is above 1, but training runs in one process; start it without torchrun")
    run_dir = Path(config.run.dir)
    require_usable(run_dir, resume)
    inputs = open_inputs(config)
    stop = StopSignals()
    with locked(run_dir), stop.installed():
        trainer = make_trainer(config, inputs, console)
        trainer.should_stop = stop
        report, step = trainer.report, trainer.progress.step
        (run_dir / "config.toml").write_text(config_to_toml(config), encoding="utf-8")
        try:
            with report:
                count = sum(parameter.numel() for parameter in trainer.model.parameters())
                report.line(f"run {trainer.run_id}: {count:,} parameters on {inputs.device}, from step {step}")
                finished = trainer.run()
                report.line(f"{'finished' if finished else 'stopped and saved'} at step {trainer.progress.step}")
        finally:
            trainer.log.close()
    return finished


def open_inputs(config: TrainConfig) -> Inputs:
    """Raises RecipeError, DataError, ConfigError or TokenizerError for what cannot be used."""
    dataset = open_dataset(config.data)
    tokenizer = dataset.tokenizer
    settings = config.train
    model_config = make_model_config(config, tokenizer)
    _check_sample_prompt(config, tokenizer, model_config)
    return Inputs(
        device=resolve_device(settings.device),
        tokenizer=tokenizer,
        model_config=model_config,
        loader=make_loader(dataset, config.data, seq_len=settings.seq_len, seed=settings.seed),
        validation=dataset.val,
        data_digest=dataset.digest,
    )


def _check_sample_prompt(config: TrainConfig, tokenizer: Tokenizer, model_config: ModelConfig) -> None:
    """Told now, not at the first validation."""
    if not config.run.sample_tokens:
        return
    try:
        length = len(prompt_ids(tokenizer, config.run.sample_prompt))
    except TokenizerError as error:
        raise RecipeError(f"run.sample_prompt: {error}") from None
    if length >= model_config.max_seq_len:
        raise RecipeError(
            f"run.sample_prompt has {length} tokens but must leave room in the context of {model_config.max_seq_len}"
        )


def make_trainer(config: TrainConfig, inputs: Inputs, console: Console) -> Trainer:
    """A trainer at step 0, or at the newest whole state of `run.dir`. Raises ResumeError if that does not fit.

    A new run saves its state at once: whenever it is killed, there is one to go on from.
    """
    run_dir, settings = Path(config.run.dir), config.train
    checkpoints = CheckpointManager(run_dir, inputs.tokenizer, DTYPES[config.run.save_dtype], config.run.keep)
    found = checkpoints.find_state() if has_state(run_dir) else None
    if found is not None:
        check_same_run(found.state, config, inputs.data_digest)
    model = _new_model(inputs.model_config, settings.seed, inputs.device)
    optimizer = build_optimizer(model, settings)
    scaler = torch.amp.GradScaler(inputs.device.type, enabled=settings.dtype == "float16")
    progress, run_id = Progress(), f"{run_dir.name}-{secrets.token_hex(4)}"
    if found is not None:
        progress, run_id = _restore(found, model, optimizer, scaler, console), found.state.run_id
    report = Reporter(
        console, settings.max_steps, first_step=progress.step, sample_prompt=config.run.sample_prompt,
        sample_tokens=config.run.sample_tokens, seed=settings.seed,
    )  # fmt: skip
    trainer = Trainer(
        config=config, model=model, optimizer=optimizer, scaler=scaler, loader=inputs.loader,
        validation=inputs.validation, checkpoints=checkpoints, log=MetricsLog(run_dir / "metrics.jsonl", progress.step),
        report=report, run_id=run_id, data_digest=inputs.data_digest, progress=progress,
    )  # fmt: skip
    if found is None:
        checkpoints.save_state(model, optimizer, trainer.state())
    return trainer


def _new_model(config: ModelConfig, seed: int, device: torch.device) -> Transformer:
    # Initialised on the CPU, so that every device starts from the same weights.
    model = Transformer(config)
    model.init_weights(seed)
    return model.to(device)


def _restore(
    found: FoundState,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    console: Console,
) -> Progress:
    """Loads the tensors, then removes the newer states that could not be used."""
    state = found.state
    load_tensors(found.folder, model, optimizer)
    if state.scaler:
        scaler.load_state_dict(dict(state.scaler))
    for folder, problem in found.damaged:
        console.print(f"removing a damaged state: {problem}", style="yellow", markup=False)
        shutil.rmtree(folder)
    return Progress(state.step, state.best_loss, state.best_step)
