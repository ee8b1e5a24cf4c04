"""What the engine decides for itself from the model and the device at hand: device, dtype, limits, cache size."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import ModelConfig, count_parameters
from model.errors import ConfigError
from server.engine.config import EngineConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GIB = 1024**3
# Full contexts that the cache holds unless told otherwise, and the most memory that may take. A small model is to
# stay small: nobody's card is claimed for traffic that was never announced.
_CONTEXTS = 64
_MOST_MEMORY = {"cpu": _GIB // 2, "cuda": 8 * _GIB}
# Up to about this many parameters, a step is so short that a second thread gains a tenth at best, and costs several
# times the step whenever something else runs on its core.
_ONE_THREAD_PARAMETERS = 8_000_000
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# Decoding on the CPU gains little beyond this many sequences; a step of this many prompt tokens takes about a tenth
# of a second with a 124M model on two cores, which is what a decoding neighbour waits for it.
_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
_MAX_BATCHED_TOKENS = {"cpu": 256, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Resolved sizes; `num_blocks` blocks of `block_size` tokens make up the cache."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int


def resolve_device(name: str) -> torch.device:
    """Raises ConfigError for "cuda" where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError("device must be auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA device here; use cpu or auto")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 wherever the device computes in it, else float32."""
    if name != "auto":
        if name not in _DTYPES:
            raise ConfigError("dtype must be auto, float32, bfloat16 or float16")
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if _cpu_computes_bfloat16() else torch.float32


def _cpu_computes_bfloat16() -> bool:
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def resolve_threads(requested: int | None, model: ModelConfig) -> int:
    """Threads for the CPU's kernels: as asked, else by the model's size, the cores and the container's quota."""
    if requested is not None:
        return requested
    if count_parameters(model) <= _ONE_THREAD_PARAMETERS:
        return 1
    return min(torch.get_num_threads(), _quota())


def _quota() -> int:
    """Whole cores that the control group may use; a thread beyond them would be stopped in the middle of steps."""
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return torch.get_num_threads()  # no such file, or "max": no quota


def resolve_limits(config: EngineConfig, model: ModelConfig, device: torch.device, block_bytes: int) -> EngineLimits:
    """Sizes for this model; `block_bytes` is what one block takes over all layers.

    Raises ConfigError if the stated cache memory cannot hold one full context, or if that is to be longer than the
    model's.
    """
    max_model_len = model.max_seq_len if config.max_model_len is None else config.max_model_len
    if max_model_len > model.max_seq_len:
        raise ConfigError(f"max_model_len must be at most {model.max_seq_len}, this model's context")
    needed = -(-max_model_len // config.block_size)
    if config.kv_cache_memory is None:
        wanted = _CONTEXTS * needed
        num_blocks = max(needed, min(wanted, affordable_memory(device) // block_bytes))
    else:
        num_blocks = config.kv_cache_memory // block_bytes
        if num_blocks < needed:
            least = -(-needed * block_bytes // 2**20)
            raise ConfigError(
                f"kv_cache_memory must be at least {least}MiB to hold one context of this model; or lower max_model_len"
            )
    max_num_seqs, max_num_batched_tokens = resolve_batch(config, device)
    return EngineLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        block_size=config.block_size,
        num_blocks=num_blocks,
    )


def resolve_batch(config: EngineConfig, device: torch.device) -> tuple[int, int]:
    """(sequences that run at once, tokens in one step)"""
    max_num_seqs = config.max_num_seqs or _MAX_NUM_SEQS[device.type]
    return max_num_seqs, config.max_num_batched_tokens or max(_MAX_BATCHED_TOKENS[device.type], max_num_seqs)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def affordable_memory(device: torch.device) -> int:
    """Bytes that the cache may take unasked: a fixed cap, and on a card at most half of what is free."""
    most = _MOST_MEMORY[device.type]
    if device.type == "cuda":
        return min(most, torch.cuda.mem_get_info(device)[0] // 2)
    return most
