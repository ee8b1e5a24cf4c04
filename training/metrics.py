"""Numbers a run reports: model FLOPs, memory, and the lines of metrics.jsonl."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.atomic_folder import replace_file
from model.config import ModelConfig
from model.file_errors import naming_file, write_all
from training.device_peaks import peak_flops
from training.errors import RecipeError

__all__ = ["MetricsLog", "flops_per_token", "peak_flops", "peak_memory", "read_metrics"]


def flops_per_token(model: nn.Module, config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs a token: 6 per weight in a product, plus attention's 12·L·H·d·S (Chowdhery et al. 2022, app. B).

    S is the keys a token may look at, counted as if attention were not causal: `seq_len`, or the sliding window
    where that is shorter. Embedding look-ups are no products, so learned positions and an untied input embedding
    are left out. The weights may lie on the meta device.
    """
    weights = sum(p.numel() for p in model.parameters())
    if config.position == "learned":
        weights -= config.max_seq_len * config.hidden_size
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    span = min(seq_len, config.sliding_window or seq_len)
    return 6.0 * weights + 12.0 * config.num_layers * config.q_size * span


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a CUDA device so far, or else the process's largest resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # macOS counts bytes, Linux KiB


class MetricsLog:
    """Appends one JSON object a line. Opened at a step, it drops what an interrupted run wrote beyond it.

    A value that is no number (NaN, infinity) becomes null, for JSON has no word for it.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [values for values in read_metrics(path) if values["step"] <= resume_step]
        replace_file(path, "".join(map(_line, kept)).encode())
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, **values: Any) -> None:
        with naming_file(self._path, "written", RecipeError):
            write_all(self._file, _line(values).encode())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl in their order; lines cut off or damaged by a crash are passed over.

    Every object has an integer `step`. An absent file has none.
    """
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return found


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps({name: _json_value(value) for name, value in values.items()}, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
