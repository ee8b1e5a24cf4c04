"""Numbers a run reports: model FLOPs, the device's peak, and the lines of metrics.jsonl."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.config import ModelConfig

# Dense bf16 tensor-core FLOP/s from the makers' data sheets, without sparsity; the first name that fits counts.
_CUDA_PEAKS = (
    ("B200", 2_250e12), ("GH200", 989e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12),
    ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12), ("L4", 121e12), ("A10", 125e12), ("T4", 65e12),
    ("RTX 5090", 210e12), ("RTX 4090", 165e12), ("RTX 3090", 71e12),
)  # fmt: skip


def flops_per_token(model: nn.Module, config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs a token: 6 per weight in a product, plus attention's 12·L·H·d·T (Chowdhery et al. 2022, app. B).

    Embedding look-ups are no products, so learned positions and an untied input embedding are left out.
    """
    weights = sum(p.numel() for p in model.parameters())
    if config.position == "learned":
        weights -= config.max_seq_len * config.hidden_size
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    return 6.0 * weights + 12.0 * config.num_layers * config.q_size * seq_len


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that MFU is measured against: the data sheet for a known GPU, a short matrix product on the CPU.

    None where neither is known; MFU is then not reported.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in _CUDA_PEAKS if key in name), None)
    return _measured_cpu_peak(dtype) if device.type == "cpu" else None


def _measured_cpu_peak(dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    # CPUs multiply bfloat16 fast and float16 hardly ever, so 16-bit training is measured against the former.
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if dtype == torch.float16 else dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


class MetricsLog:
    """Appends one JSON object a line. Opened at a step, it drops what an interrupted run wrote beyond it."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = _lines_up_to(path, resume_step)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line cut off by a crash
    return kept
