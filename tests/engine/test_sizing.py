"""Device, type and sizes that the engine chooses, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import llama_config
from model.errors import ConfigError
from model.presets import PRESETS
from server.engine import sizing
from server.engine.config import EngineConfig
from server.engine.sizing import EngineLimits, resolve_device, resolve_dtype, resolve_limits, resolve_threads

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODEL = llama_config(2, 4, 2, 64, 96, vocab_size=50, max_seq_len=100)
CONFIG = EngineConfig(model_path="unused", model_name="unused")
MIB, GIB = 2**20, 2**30


def limits(
    config: EngineConfig = CONFIG, *, context: int = 100, block_bytes: int = 1000, device: torch.device = CPU
) -> EngineLimits:
    return resolve_limits(config, replace(MODEL, max_seq_len=context), device, block_bytes)


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_the_card_if_there_is_one(available: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_a_card_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(resolve_device(name)) == name
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device here; use cpu or auto"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["", "mps", "gpu", "meta", "cudax"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_type_is_that_type(name: str) -> None:
    assert resolve_dtype(name, CPU) == resolve_dtype(name, CUDA) == getattr(torch, name)


@pytest.mark.parametrize("name", ["", "float64", "int8", "load"])
def test_other_types_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="dtype must be auto, float32, bfloat16 or float16"):
        resolve_dtype(name, CPU)


@pytest.mark.parametrize(
    ("machine", "avx512", "amx", "expected"),
    [
        ("x86_64", True, False, torch.bfloat16),
        ("AMD64", False, True, torch.bfloat16),
        ("x86_64", False, False, torch.float32),
        ("aarch64", True, True, torch.float32),
    ],
)
def test_auto_on_a_cpu_is_bfloat16_where_the_cpu_computes_in_it(
    machine: str, avx512: bool, amx: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizing.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_dtype("auto", CPU) == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_a_card_is_a_sixteen_bit_type(
    supported: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert resolve_dtype("auto", CUDA) == expected


def test_a_small_model_gets_room_for_sixty_four_contexts() -> None:
    assert limits(block_bytes=1000) == EngineLimits(64, 256, 100, 16, 64 * 7)
    assert limits(context=96).num_blocks == 64 * 6  # a context of whole blocks needs no block more
    assert limits(replace(CONFIG, block_size=48)).num_blocks == 64 * 3


def test_unasked_the_cache_stays_below_half_a_gibibyte_but_holds_one_context() -> None:
    assert limits(block_bytes=10 * MIB).num_blocks == GIB // 2 // (10 * MIB)
    assert limits(block_bytes=GIB).num_blocks == 7


@pytest.mark.parametrize(("free", "expected"), [(100 * GIB, 8 * GIB), (6 * GIB, 3 * GIB)])
def test_unasked_the_cache_takes_at_most_half_of_a_cards_free_memory(
    free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 200 * GIB))
    assert limits(context=10_000, block_bytes=MIB, device=CUDA).num_blocks == expected // MIB
    assert limits(device=CUDA) == EngineLimits(256, 8192, 100, 16, 64 * 7)


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 6), ("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_threads_follow_the_cores_and_the_quota(
    quota: str | None, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(sizing, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert resolve_threads(None, PRESETS["gpt2"]) == expected
    assert resolve_threads(3, PRESETS["gpt2"]) == 3


def test_a_small_model_runs_in_one_thread_unless_told() -> None:
    assert resolve_threads(None, MODEL) == 1
    assert resolve_threads(2, MODEL) == 2


def test_stated_memory_is_filled_with_whole_blocks_and_never_exceeded() -> None:
    config = replace(CONFIG, kv_cache_memory=10 * MIB + 999)
    assert limits(config).num_blocks == (10 * MIB + 999) // 1000


def test_a_shorter_context_needs_fewer_blocks() -> None:
    short = limits(replace(CONFIG, max_model_len=40))
    assert (short.max_model_len, short.num_blocks) == (40, 64 * 3)
    with pytest.raises(ConfigError, match="max_model_len must be at most 100"):
        limits(replace(CONFIG, max_model_len=101))


@pytest.mark.parametrize("block_bytes", [1000, 123_457, MIB, 3 * MIB + 1])
def test_the_least_memory_that_the_refusal_names_is_enough(block_bytes: int) -> None:
    with pytest.raises(ConfigError, match="kv_cache_memory must be at least") as refusal:
        limits(replace(CONFIG, kv_cache_memory=7 * block_bytes - 1), block_bytes=block_bytes)
    least = re.search(r"(\d+)MiB", str(refusal.value))
    assert least is not None
    assert limits(replace(CONFIG, kv_cache_memory=int(least[1]) * MIB), block_bytes=block_bytes).num_blocks >= 7


def test_a_budget_of_tokens_never_falls_below_the_sequences() -> None:
    assert limits(replace(CONFIG, max_num_seqs=2000)).max_num_batched_tokens == 2000
    assert limits(replace(CONFIG, max_num_seqs=2)).max_num_batched_tokens == 256
    stated = limits(replace(CONFIG, max_num_seqs=3, max_num_batched_tokens=77))
    assert (stated.max_num_seqs, stated.max_num_batched_tokens) == (3, 77)
