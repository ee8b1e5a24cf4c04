"""Whether the sampling kernel draws on this machine what the torch path draws on the CPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model.sampling.draw import draw, padded_width, probabilities, uniforms
from model.sampling.filters import Filters
from model.sampling.rows import RowParameters
from model.sampling.triton_sampling import sample_rows
from model.sampling_params import SamplingParams

_VALID, _VOCAB_SIZE = 5_000, 5_003  # more than a tile, and no multiple of one
_KINDS = (
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=30),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.05),
    SamplingParams(temperature=1.2, top_k=50, top_p=0.9, min_p=0.01),
)
_ROUNDS = 4


class KernelMismatchError(Exception):
    """The kernel draws something else than the torch path."""


def check_kernel(device: torch.device) -> None:
    """Draw a small batch in float32 and in bfloat16, which also compiles the kernel for both.

    Raises KernelMismatchError if a token is wrong, and whatever a compiler or a driver may.
    """
    logits, params, positions = check_case()
    expected = _expected(logits, params, positions)
    expected[-1] = -1
    rows = RowParameters.build(params, _VALID, device)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(len(params), dtype=torch.int64, device=device)
        scratch = torch.empty(len(params), padded_width(_VALID), device=device)
        sample_rows(logits.to(device, dtype), _VALID, rows, positions.to(device), scratch, out)
        if not torch.equal(out.cpu(), expected):
            raise KernelMismatchError(f"it drew {out.tolist()} from {dtype}, and {expected.tolist()} is right")


def check_case() -> tuple[Tensor, list[SamplingParams], Tensor]:
    """Logits [B, V] that bfloat16 holds exactly, parameters and positions [B]. The last row has a NaN.

    The rows are peaked, so that nuclei are narrow; no draw of theirs is a matter of rounding.
    """
    params = [replace(kind, seed=seed) for seed in range(_ROUNDS) for kind in _KINDS]
    generator = torch.Generator().manual_seed(len(params))
    logits = torch.randn(len(params), _VOCAB_SIZE, generator=generator).mul_(4).bfloat16().float()
    logits[:, _VALID:] = 100.0
    logits[-1, _VALID - 1] = torch.nan
    return logits, params, torch.arange(len(params))


def _expected(logits: Tensor, params: list[SamplingParams], positions: Tensor) -> Tensor:
    """Token ids [B] by the torch path; the last one means nothing."""
    scores = torch.full((len(params), padded_width(_VALID)), -torch.inf)
    scores[:, :_VALID] = logits[:, :_VALID]
    token_ids = scores.argmax(dim=-1)
    random = torch.tensor([row for row, p in enumerate(params[:-1]) if not p.is_greedy])
    chosen = [params[row] for row in random.tolist()]
    rows = RowParameters.build(chosen, _VALID, "cpu")
    probs = probabilities(scores[random] / rows.temperature[:, None])
    filters = Filters.build(chosen, _VALID, torch.device("cpu"))
    wide = None if filters is None else filters.apply(probs, torch.empty_like(probs))
    assert wide is None, "the nuclei are narrow"
    token_ids[random] = draw(probs, uniforms(rows.states, positions[random]))
    return token_ids
