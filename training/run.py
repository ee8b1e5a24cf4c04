"""One run from recipe to exit: checks every input, opens or continues the run folder, trains, stops on signals."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from model.atomic_folder import remove_folder
from model.config import ModelConfig
from model.errors import CheckpointError, TokenizerError
from model.manifest import read_manifest, weights_digest
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.batches import MicroBatches, Sequences
from training.build import DTYPES, make_model, make_model_config
from training.checkpoint import CheckpointManager, FoundState, has_state, open_tensors, read_state
from training.config import TrainConfig
from training.data.dataset import Dataset, make_loader, open_dataset
from training.distributed import Distributed, init_distributed
from training.errors import RecipeError
from training.generate import prompt_ids
from training.init_from import describe_start, start_folder
from training.launch import keep_freed_memory, one_voice
from training.lora import add_adapters
from training.optim import build_optimizers
from training.parallel import ParallelModel
from training.progress import Progress
from training.reporting.run_log import RunLog
from training.run_folder import Resume, check_same_run, locked, require_usable, write_config
from training.saving import Saver
from training.step import Stepper
from training.stop import StopSignals
from training.trainer import Trainer

_NEW_RUN = -1


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a recipe names, opened and checked."""

    dataset: Dataset
    model_config: ModelConfig
    loader: Sequences


def run_training(config: TrainConfig, resume: Resume, console: Console) -> bool:
    """Trains to the recipe's last step. False when a signal stopped it earlier; everything is then saved.

    Raises RecipeError, DataError, ResumeError or the model package's errors before anything that an earlier run
    wrote is replaced, and DivergedError while training. Under torchrun all ranks call it.
    """
    with one_voice():
        distributed = init_distributed(config.train.device)
    with distributed.failing_together():
        return run_on_rank(config, resume, console, distributed)


def run_on_rank(config: TrainConfig, resume: Resume, console: Console, distributed: Distributed) -> bool:
    """`run_training` in a group that has been joined."""
    run_dir = Path(config.run.dir)
    if distributed.device.type == "cpu":
        keep_freed_memory()
    if distributed.is_main:
        require_usable(run_dir, resume)
    inputs = open_inputs(config, distributed)
    stop = StopSignals()
    with contextlib.ExitStack() as stack:
        if distributed.is_main:
            stack.enter_context(locked(run_dir))
        stack.enter_context(stop.installed())
        trainer = stack.enter_context(make_trainer(config, inputs, console, distributed))
        trainer.should_stop = stop
        if distributed.is_main:
            write_config(run_dir, config)
        report = stack.enter_context(trainer.log.report)
        count = _describe_size(trainer.model)
        where = f"{distributed.world_size} × {distributed.device}" if distributed.world_size > 1 else distributed.device
        report.line(f"run {trainer.run_id}: {count} on {where}, from step {trainer.progress.step}")
        if config.model.init_from is not None and trainer.progress.step == 0 and distributed.is_main:
            report.line(describe_start(start_folder(config.model.init_from), inputs.dataset.tokenizer))
        finished = trainer.run()
        report.line(f"{'finished' if finished else 'stopped and saved'} at step {trainer.progress.step}")
    return finished


def _describe_size(model: Transformer) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count:,} parameters" if trained == count else f"{count:,} parameters, of which {trained:,} are trained,"


def open_inputs(config: TrainConfig, distributed: Distributed) -> Inputs:
    """Raises RecipeError, DataError, ConfigError or TokenizerError for what cannot be used."""
    # Once is enough: a rank that reads what rank 0 finds damaged ends with it.
    data = config.data if distributed.is_main else dataclasses.replace(config.data, verify=False)
    dataset = open_dataset(data)
    model_config = make_model_config(config, dataset.tokenizer)
    _check_sample_prompt(config, dataset.tokenizer, model_config)
    loader = make_loader(dataset, config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    return Inputs(dataset, model_config, loader)


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


@contextlib.contextmanager
def make_trainer(config: TrainConfig, inputs: Inputs, console: Console, distributed: Distributed) -> Iterator[Trainer]:
    """A trainer at step 0, or at the newest whole state of `run.dir`. Raises ResumeError if that does not fit.

    A new run saves its state before the first step.
    """
    run_dir, settings = Path(config.run.dir), config.train
    if distributed.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    checkpoints = CheckpointManager(
        run_dir, inputs.model_config, inputs.dataset.tokenizer, DTYPES[config.run.save_dtype], config.run.keep
    )
    found = _find_state(config, checkpoints, inputs.dataset.digest, distributed)
    stepper = _make_stepper(config, inputs, found, distributed)
    progress, run_id = Progress(), f"{run_dir.name}-{secrets.token_hex(4)}"
    if found is not None:
        state = found.state
        progress, run_id = Progress.of(state), state.run_id
        _remove_damaged(found, console)
    with contextlib.ExitStack() as stack:
        stack.callback(stepper.batches.close)
        log = RunLog(config, run_id, progress.step, console, is_main=distributed.is_main)
        stack.callback(log.close)
        trainer = Trainer(
            config=config, stepper=stepper, validation=inputs.dataset.val, checkpoints=checkpoints,
            saver=stack.enter_context(Saver(background=config.run.async_save)), log=log, run_id=run_id,
            data_digest=inputs.dataset.digest, progress=progress,
            parent=_parent(config, found) if distributed.is_main else None,
        )  # fmt: skip
        if found is None:
            trainer.save_start()
        yield trainer


def _parent(config: TrainConfig, found: FoundState | None) -> str | None:
    """The digest of the weights that the run began with: its checkpoint says it, for the folder may have gone on."""
    if config.model.init_from is None:
        return None
    with contextlib.suppress(CheckpointError):  # a damaged checkpoint is written anew
        last = read_manifest(Path(config.run.dir) / "checkpoints" / "last") if found is not None else None
        if last is not None and last.provenance.parent is not None:
            return last.provenance.parent
    return weights_digest(start_folder(config.model.init_from))


def _find_state(
    config: TrainConfig, checkpoints: CheckpointManager, data_digest: str, distributed: Distributed
) -> FoundState | None:
    """The state that rank 0 chooses, on every rank; None for a new run."""
    found = None
    if distributed.is_main:
        checkpoints.clear()
        found = checkpoints.find_state() if has_state(checkpoints.run_dir) else None
        if found is not None:
            check_same_run(found.state, config, data_digest)
    step = distributed.from_main(found.state.step if found is not None else _NEW_RUN)
    if step == _NEW_RUN or found is not None:
        return found
    folder = checkpoints.states / f"step-{step}"
    return FoundState(read_state(folder), folder, damaged=())


def _make_stepper(config: TrainConfig, inputs: Inputs, found: FoundState | None, distributed: Distributed) -> Stepper:
    """Model and optimisers, with what was saved. Weights are loaded before FSDP splits them, moments after."""
    settings = config.train
    transformer = make_model(config, inputs.model_config)
    if settings.lora_rank:
        add_adapters(transformer, settings)
    saved = open_tensors(found.folder) if found is not None else None
    if saved is not None:
        saved.load_weights(transformer)
    model = ParallelModel(transformer, settings, distributed, inputs.dataset.tokenizer.vocab_size)
    optimizers = build_optimizers(transformer, settings)
    scaler = torch.amp.GradScaler(distributed.device.type, enabled=settings.dtype == "float16")
    if saved is not None:
        saved.load_moments(transformer, optimizers)
    if found is not None and found.state.scaler:
        scaler.load_state_dict(dict(found.state.scaler))
    batches = MicroBatches(
        inputs.loader, settings.batch_size, settings.batch_size * distributed.world_size, distributed.device
    )
    return Stepper(model, optimizers, scaler, batches, settings, distributed)


def _remove_damaged(found: FoundState, console: Console) -> None:
    """The newer states that could not be used go, now that an older one has been loaded."""
    for folder, problem in found.damaged:
        console.print(f"removing a damaged state: {problem}", style="yellow", markup=False)
        remove_folder(folder)
