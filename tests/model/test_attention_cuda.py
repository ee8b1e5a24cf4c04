"""The CUDA backends against the torch reference: on the device (`gpu`), and in Triton's interpreter without one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import attention_cuda
from model.attention_check import BackendMismatchError, PagedStep, check_backend
from model.attention_cuda import Tiling, TritonBackend, VarlenBackend
from model.backends import select_backend
from model.errors import ConfigError
from model.paged_attention import AttentionBackend, AttentionMetadata, TorchBackend
from tests.model.attention_steps import head_config, last_tokens, random_steps

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# As `pytest.mark.gpu`, but also harmless when asked for where there is no device.
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HALVES = [torch.float16, torch.bfloat16]


@needs_triton
def test_kernels_equal_the_reference_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.model.triton_interpreted"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all equal the reference\n")


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where triton cannot be imported."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "model.triton_kernels", raising=False)
    monkeypatch.delattr("model.triton_kernels", raising=False)
    caches = (attention_cuda._load_kernels, attention_cuda._try_backend)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("without_triton")
def test_without_triton_auto_is_the_reference_and_a_named_backend_is_refused() -> None:
    config = head_config(4, 2, 16)
    arguments = (config, torch.device("cuda"), torch.bfloat16, 16)
    assert isinstance(attention_cuda.select_cuda_backend("auto", *arguments), TorchBackend)
    for name in ("triton", "varlen"):
        with pytest.raises(ConfigError, match=f"'{name}' cannot run here .*triton is not installed.*; use auto"):
            select_backend(name, *arguments)


@pytest.mark.usefixtures("without_triton")
def test_deterministic_is_refused_where_our_kernels_cannot_run_and_for_others_kernels() -> None:
    arguments = (head_config(4, 2, 16), torch.device("cuda"), torch.bfloat16, 16)
    for name in ("auto", "triton"):
        with pytest.raises(ConfigError, match=r"deterministic needs the triton .* cannot run here .*not installed"):
            select_backend(name, *arguments, deterministic=True)
    for name in ("varlen", "torch"):
        with pytest.raises(ConfigError, match=f"deterministic cannot be had with attention backend '{name}' on CUDA"):
            select_backend(name, *arguments, deterministic=True)


@pytest.mark.parametrize("name", ["triton", "varlen"])
def test_cuda_backends_are_refused_on_the_cpu(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot run here; use auto or torch"):
        select_backend(name, head_config(4, 2, 16), "cpu", torch.float32)


class Faulty(TorchBackend):
    """The reference with one fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        window: int | None,
    ) -> Tensor:
        if self.fault == "window":
            window = None
        if self.fault == "store":
            metadata.slot_mapping[0] += 1
        out = super().attend(q, k, v, key_cache, value_cache, metadata, window)
        if self.fault == "store":
            metadata.slot_mapping[0] -= 1
        if self.fault == "padding":
            out[metadata.num_tokens :] = 1.0
        if self.fault == "scale":
            out = super().attend(q * 1.01, k, v, key_cache, value_cache, metadata, window)
        if self.fault == "nan":
            out[0, 0, 0] = torch.nan
        return out


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("window", [None, 37])
def test_the_check_passes_the_reference(dtype: torch.dtype, window: int | None) -> None:
    check_backend(TorchBackend(), head_config(4, 2, 24, window), CPU, dtype, 16)


@pytest.mark.parametrize("fault", ["window", "store", "padding", "scale", "nan"])
def test_the_check_notices_a_fault(fault: str) -> None:
    with pytest.raises(BackendMismatchError):
        check_backend(Faulty(fault), head_config(4, 2, 24, 37), CPU, torch.float32, 16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 71])
def test_tilings_hold_their_heads_and_fit_small_cards(head_dim: int, group: int, dtype: torch.dtype) -> None:
    tiling = Tiling.choose(head_dim, group, dtype)
    assert head_dim <= tiling.head_pad < 2 * max(head_dim, 16)
    assert group <= tiling.group_pad <= tiling.decode_rows
    rows = tiling.prefill_tokens * tiling.group_pad
    for size in (tiling.head_pad, tiling.tile, rows, tiling.decode_rows):
        assert size & (size - 1) == 0
        assert size >= 16
    assert attention_cuda._MIN_SPLIT % tiling.tile == 0
    tiles = rows + 2 * tiling.num_stages * tiling.tile
    if group <= 16:
        assert tiles * tiling.head_pad * dtype.itemsize <= 99 * 1024


def backends_for(dtype: torch.dtype, head_dim: int, group: int) -> dict[str, tuple[AttentionBackend, int]]:
    """Every backend that can be made, with a block size for it."""
    config = head_config(2 * group, 2, head_dim)
    backends: dict[str, tuple[AttentionBackend, int]] = {"triton": (TritonBackend(config, dtype), 16)}
    if dtype != torch.float32:
        backends["varlen"] = (VarlenBackend(config, dtype, 256), 256)
    return backends


@pytest.mark.parametrize(
    ("head_dim", "group", "dtype", "window"),
    [
        (64, 1, torch.bfloat16, None),
        (64, 1, torch.float32, None),
        (64, 3, torch.float16, 100),
        (80, 2, torch.bfloat16, None),
        (80, 2, torch.float32, 1),
        (128, 4, torch.bfloat16, None),
        (128, 4, torch.float16, 100),
        (128, 4, torch.float32, None),
        (256, 1, torch.bfloat16, 100),
        (256, 2, torch.float32, None),
        (16, 8, torch.bfloat16, None),
        (16, 8, torch.float32, 100),
    ],
)
class TestOnDevice:
    pytestmark = on_gpu

    def test_steps_equal_the_reference(self, head_dim: int, group: int, dtype: torch.dtype, window: int | None) -> None:
        device = torch.device("cuda")
        config = head_config(2 * group, 2, head_dim, window)
        for name, (backend, block_size) in backends_for(dtype, head_dim, group).items():
            for seed, (kind, sequences) in enumerate(random_steps(seed=head_dim + group).items()):
                step = PagedStep.random(config, sequences, block_size, dtype, device, seed)
                with torch.inference_mode():
                    try:
                        step.compare(backend, window)
                    except BackendMismatchError as error:
                        pytest.fail(f"{name}, {kind}: {error}")


class TestSelectionOnDevice:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
    def test_auto_is_a_kernel(self, dtype: torch.dtype) -> None:
        assert select_backend("auto", head_config(4, 2, 64), "cuda", dtype, 16).name == "triton"
        assert select_backend("auto", head_config(4, 2, 64), "cuda", dtype, 256).name in ("triton", "varlen")

    @pytest.mark.parametrize("window", [None, 100])
    def test_deterministic_attention_does_not_depend_on_the_chunk(self, window: int | None) -> None:
        """To the bit: a token decoded, and the same token at the end of chunks of several sizes."""
        config, device = head_config(8, 2, 64, window), torch.device("cuda")
        backend = TritonBackend(config, torch.bfloat16, deterministic=True)
        whole = PagedStep.random(config, ((1500, 1500), (9, 700)), 16, torch.bfloat16, device, seed=2)
        expected = whole.attend(backend, window)
        for count in (1, 2, 63, 700):
            part = last_tokens(whole, 1500, count)
            assert torch.equal(part.attend(backend, window), expected[1500 - count : 1500]), count

    def test_decoding_does_not_depend_on_the_neighbours(self) -> None:
        """To the bit: alone, beside others in a decode step, and beside a prompt."""
        config, device = head_config(8, 2, 64), torch.device("cuda")
        backend = TritonBackend(config, torch.bfloat16)
        step = PagedStep.random(config, ((1, 700), (1, 30), (1, 2000), (200, 250)), 16, torch.bfloat16, device, seed=1)
        beside = step.attend(backend, None)[:3]
        for row, context in enumerate((700, 30, 2000)):
            full = step.metadata
            alone = AttentionMetadata(
                cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device=device),
                context_lens=full.context_lens[row : row + 1],
                block_tables=full.block_tables[row : row + 1],
                slot_mapping=full.slot_mapping[row : row + 1],
                num_tokens=1,
                max_query_len=1,
                max_context_len=context,
            )
            q, k, v = (x[row : row + 1] for x in (step.q, step.k, step.v))
            out = backend.attend(q, k, v, step.key_cache, step.value_cache, alone, None)
            assert torch.equal(out[0], beside[row])
