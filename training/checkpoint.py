"""What a run leaves on disk: checkpoints that the server loads, and the state from which training goes on.

    RUN/checkpoints/last, best, step-N    Hugging Face folders in `run.save_dtype`
    RUN/state/step-N/                     training.safetensors (float32 weights, optimiser) and state.json

Each folder appears whole or not at all. A state folder stands alone, so a crash between the folders loses nothing;
the newest two are kept, and a damaged one is passed over.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.atomic_folder import clear_leftovers, remove_folder, replace_folder
from model.checkpoint import Provenance, save_state_dict
from model.config import ModelConfig
from model.hf_config import CONFIG_FILE
from model.manifest import file_sha256
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.errors import ResumeError
from training.lora import merge_adapters
from training.optim import load_optimizer_tensors

STATE_FILE = "state.json"
TENSORS_FILE = "training.safetensors"
_KEPT_STATES = 2
_STEP_FOLDER = re.compile(r"step-(\d+)")


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything beside tensors that a resumed run continues from.

    `sequences` were consumed by all ranks together; the next ones and the random numbers follow from it and the
    recipe's seed. `validations_since_best` counts towards early stopping, `skipped_steps` and `skips_in_a_row` are
    those of the non-finite guard. `config` is the resolved recipe, `data_digest` the prepared data's identity,
    `scaler` the fp16 loss scaling's state.
    """

    version: Literal[3] = 3
    step: int
    sequences: int
    run_id: str
    best_loss: float | None
    best_step: int | None
    validations_since_best: int
    skipped_steps: int
    skips_in_a_row: int
    data_digest: str
    config: dict[str, dict[str, Any]]
    scaler: dict[str, float | int]
    tensors_sha256: str = ""
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Whole tensors on the CPU: `model.{parameter}`, and `optimizer.{parameter}.{moment}` where they are wanted.

    `adapter_scale` is that of the adapters among the parameters.
    """

    tensors: Mapping[str, Tensor]
    adapter_scale: float = 0.0

    @property
    def weights(self) -> dict[str, Tensor]:
        """What the model computes with: adapters are added to their weights."""
        return merge_adapters(named(self.tensors, "model."), self.adapter_scale)


@dataclass(frozen=True, slots=True)
class FoundState:
    """A state to go on from; `damaged` are newer folders that could not be used, each with the reason."""

    state: RunState
    folder: Path
    damaged: tuple[tuple[Path, str], ...]


@dataclass(frozen=True, slots=True)
class CheckpointManager:
    """Writes and finds the folders of one run. Checkpoints leave out the padding of the vocabulary."""

    run_dir: Path
    model_config: ModelConfig
    tokenizer: Tokenizer
    dtype: torch.dtype
    keep: int

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def states(self) -> Path:
        return self.run_dir / "state"

    def save_best(self, snapshot: Snapshot, provenance: Provenance) -> None:
        self._save_model("best", snapshot, provenance)

    def save_last(self, snapshot: Snapshot, step: int, provenance: Provenance) -> None:
        """Writes `last` and step-N, then removes the oldest step-N folders."""
        self._save_model("last", snapshot, provenance)
        if self.keep:
            replace_folder(self.checkpoints / f"step-{step}", self._link_last, marker=CONFIG_FILE)
        _remove_oldest(self.checkpoints, self.keep)

    def save_state(self, snapshot: Snapshot, state: RunState) -> None:
        """Writes the state of `state.step`, then removes the oldest ones."""
        folder, tensors = self.states / f"step-{state.step}", dict(snapshot.tensors)
        replace_folder(folder, lambda partial: _write_state(partial, state, tensors), marker=STATE_FILE)
        _remove_oldest(self.states, _KEPT_STATES)

    def clear(self) -> None:
        """Removes what a killed run left: half-written or half-deleted folders, and states beyond those kept."""
        for parent in (self.run_dir, self.checkpoints, self.states):
            clear_leftovers(parent)
        _remove_oldest(self.states, _KEPT_STATES)
        _remove_oldest(self.checkpoints, self.keep)

    def find_state(self) -> FoundState:
        """The newest whole state. Raises ResumeError when none is whole."""
        damaged: list[tuple[Path, str]] = []
        for _, folder in reversed(step_folders(self.states)):
            try:
                return FoundState(read_state(folder), folder, tuple(damaged))
            except ResumeError as error:
                damaged.append((folder, str(error)))
        reasons = "; ".join(reason for _, reason in damaged)
        raise ResumeError(f"{self.states}: holds no whole state ({reasons}); choose another run.dir")

    def _save_model(self, name: str, snapshot: Snapshot, provenance: Provenance) -> None:
        save_state_dict(
            self.checkpoints / name, self.model_config, snapshot.weights, dtype=self.dtype, tokenizer=self.tokenizer,
            provenance=provenance, vocab_size=self.tokenizer.vocab_size,
        )  # fmt: skip

    def _link_last(self, folder: Path) -> None:
        # Files of a checkpoint are never written again, so two folders may share them.
        for path in (self.checkpoints / "last").iterdir():
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copy2(path, folder / path.name)


def has_state(run_dir: Path) -> bool:
    return bool(step_folders(run_dir / "state"))


def step_folders(parent: Path) -> list[tuple[int, Path]]:
    """The step-N folders in ascending order of N."""
    if not parent.is_dir():
        return []
    matches = [(_STEP_FOLDER.fullmatch(path.name), path) for path in parent.iterdir()]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def read_state(folder: Path) -> RunState:
    """Raises ResumeError when state.json is unreadable or the tensors do not have its sha256."""
    path = folder / STATE_FILE
    try:
        state = msgspec.json.decode(path.read_bytes(), type=RunState)
        digest = file_sha256(folder / TENSORS_FILE)
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise ResumeError(f"{path}: not a readable state ({error})") from None
    if _digest(state) != state.sha256:
        raise ResumeError(f"{path}: is damaged, for it does not match its own sha256")
    if digest != state.tensors_sha256:
        raise ResumeError(f"{folder / TENSORS_FILE}: does not match the sha256 in {STATE_FILE}")
    return state


@dataclass(frozen=True, slots=True)
class SavedTensors:
    """The tensors of a state folder, mapped from its file."""

    path: Path
    tensors: Mapping[str, Tensor]

    def load_weights(self, model: Transformer) -> None:
        """Into a model that is whole, before FSDP splits it. Raises ResumeError if they do not fit."""
        try:
            model.load_state_dict(named(self.tensors, "model."))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ResumeError(f"{self.path}: does not fit this model ({reason})") from None

    def load_moments(self, model: Transformer, optimizers: list[torch.optim.Optimizer]) -> None:
        """Into the optimisers of the model as it trains. Raises ResumeError if they do not fit."""
        load_optimizer_tensors(optimizers, model, named(self.tensors, "optimizer."))


def named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def open_tensors(folder: Path) -> SavedTensors:
    """Raises ResumeError when the file cannot be read."""
    path = folder / TENSORS_FILE
    try:
        return SavedTensors(path, load_file(path))
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path}: cannot be read ({error})") from None


def _digest(state: RunState) -> str:
    """sha256 of all that state.json says but this."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(state, sha256=""))).hexdigest()


def _write_state(folder: Path, state: RunState, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / TENSORS_FILE)
    whole = msgspec.structs.replace(state, tensors_sha256=file_sha256(folder / TENSORS_FILE))
    whole = msgspec.structs.replace(whole, sha256=_digest(whole))
    (folder / STATE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n")


def _remove_oldest(parent: Path, keep: int) -> None:
    folders = step_folders(parent)
    for _, folder in folders[: max(0, len(folders) - keep)]:
        remove_folder(folder)
