"""What every importer makes of a file, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import CheckpointError
from model.hf import Shape, parameter_shapes

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ForeignModel:
    """A model of another trainer under our parameter names.

    `config.vocab_size` counts the rows in the file, padding included, and `num_tokens` those that stand for tokens,
    where the file says it. `step` and `validation_loss` (nats per token) are the training facts that it tells.
    """

    config: ModelConfig
    state: Mapping[str, Tensor]
    num_tokens: int | None = None
    step: int | None = None
    validation_loss: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.state["embed_tokens.weight"].dtype


@dataclass(frozen=True, slots=True)
class Layout:
    """A format's names: `top` maps our modules to the file's; `layers` maps modules of our layer to those of the
    file's layer `prefix`{i} that make up its rows, in order."""

    prefix: str
    top: Mapping[str, str]
    layers: Mapping[str, tuple[str, ...]]

    def names(self, parameter: str) -> list[str]:
        """The file's tensors that make up one of our parameters."""
        module, _, kind = parameter.rpartition(".")
        if not module.startswith("layers."):
            return [f"{self.top[module]}.{kind}"]
        _, index, module = module.split(".", 2)
        return [f"{self.prefix}{index}.{name}.{kind}" for name in self.layers[module]]


def assemble(path: Path, config: ModelConfig, layout: Layout, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from the file's tensors, which must be exactly those that the configuration describes.

    Raises CheckpointError, naming tensors, before memory is taken for any.
    """
    shapes = parameter_shapes(config)
    expected: dict[str, Shape] = {}
    for parameter, shape in shapes.items():
        names = layout.names(parameter)
        expected |= {name: (shape[0] // len(names), *shape[1:]) for name in names}
    check_tensors(path, expected, found)
    state: dict[str, Tensor] = {}
    for parameter in shapes:
        parts = [found[name] for name in layout.names(parameter)]
        state[parameter] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return state


def tensors_of(path: Path, value: object) -> dict[str, Tensor]:
    """A state dict read from a file, without the prefix that torch.compile puts before names."""
    if not isinstance(value, dict) or not value or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{path} holds no weights by name; give a checkpoint that its trainer saved")
    strange = [name for name, tensor in value.items() if not isinstance(tensor, Tensor)]
    if strange:
        raise CheckpointError(f"{path}: {_listed(strange)} is no tensor; give a checkpoint that its trainer saved")
    return {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in value.items()}


def check_tensors(path: Path, expected: Mapping[str, Shape], found: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `found` holds just these tensors, dense floats of these shapes, within the file."""
    _refuse(path, "lacks the tensors", [name for name in expected if name not in found])
    _refuse(path, "holds tensors that its settings do not describe:", [name for name in found if name not in expected])
    wrong = [
        f"{name} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if tuple(found[name].shape) != shape
    ]
    _refuse(path, "holds tensors whose shape does not fit its settings:", wrong)
    types = [f"{name} ({found[name].dtype})" for name in expected if not _is_plain(found[name])]
    _refuse(path, "holds tensors that are not dense float32, float16 or bfloat16:", types)
    # A tensor can claim more values than the file has bytes (by a stride of zero); saving it would write them all.
    if sum(found[name].nbytes for name in expected) > path.stat().st_size:
        raise CheckpointError(f"{path} is smaller than the tensors it describes; copy it again")


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in _DTYPES


def _refuse(path: Path, what: str, names: list[str]) -> None:
    if names:
        raise CheckpointError(f"{path} {what} {_listed(names)}; import a checkpoint and settings of the same run")


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
