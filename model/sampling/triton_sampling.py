"""Draws of a whole batch by one Triton kernel: nothing waits for the device, so that a CUDA graph can hold it."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from model.sampling.rows import RowParameters

logger = logging.getLogger(__name__)

# Fixed, so that a row is computed alike in every step and a serving engine never compiles in mid-flight.
TILE = 2048
NUM_WARPS = 16
MAX_TILES = 1023  # sums of that many halves of masses fit 32 bits


def kernel_available(device: torch.device | str) -> bool:
    """Whether `sample_rows` draws what it should on `device`: one of CUDA, with triton. Tried once per process."""
    device = torch.device(device)
    return device.type == "cuda" and _is_right(device)


@cache
def _is_right(device: torch.device) -> bool:
    try:
        from model.sampling.kernel_check import check_kernel

        check_kernel(device)
    except Exception as error:  # no triton, a compiler, a driver: any of them may fail in any way
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        logger.warning("the sampling kernel is not used (%s); draws take torch operations, which is slow", reason)
        return False
    return True


def sample_rows(
    logits: Tensor, valid_vocab_size: int, parameters: RowParameters, positions: Tensor, scratch: Tensor, out: Tensor
) -> None:
    """Write the next token of each row of `logits` [B, V], of float32, bfloat16 or float16, to `out` [B] int64.

    Ids from `valid_vocab_size` on are never drawn. A row with a NaN among its valid logits gets -1. `parameters` have
    at least B rows; `positions` [B] int64 count the tokens generated so far; `scratch` [B, N >= valid_vocab_size]
    float32 is overwritten. The filters, the order of ids and the uniforms are those of model/sampling/draw.py and
    filters.py. To the bit, a row's token depends on the row alone, and not on whether its values are held in float32 or
    in fewer bits.
    """
    rows = logits.shape[0]
    if rows == 0:
        return
    _check(logits, valid_vocab_size, parameters, positions, scratch, out)
    _kernel().sample_kernel[(rows,)](
        out,
        scratch,
        logits,
        parameters.states,
        parameters.temperature,
        parameters.top_k,
        parameters.top_p,
        parameters.min_p,
        positions,
        logits.stride(0),
        scratch.stride(0),
        valid_vocab_size,
        TILE=TILE,
        num_warps=NUM_WARPS,
    )


def _check(
    logits: Tensor, valid_vocab_size: int, parameters: RowParameters, positions: Tensor, scratch: Tensor, out: Tensor
) -> None:
    """The kernel trusts shapes and strides."""
    rows, width = logits.shape
    assert 0 < valid_vocab_size <= min(width, scratch.shape[1], MAX_TILES * TILE)
    assert rows <= min(len(parameters.states), len(scratch))
    assert logits.stride(1) == scratch.stride(1) == 1
    assert scratch.dtype == torch.float32
    for vector in (positions, out):
        assert vector.dtype == torch.int64
        assert vector.shape == (rows,)
        assert vector.is_contiguous()


@cache
def _kernel() -> ModuleType:
    from model.sampling import sampling_kernel

    return sampling_kernel
