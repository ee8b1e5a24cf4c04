"""The sampling kernel: on a device (`gpu`), and in Triton's interpreter without one; the rows' parameters."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.sampling import Sampler, SamplingRow, triton_sampling
from model.sampling.draw import padded_width, seed_state
from model.sampling.kernel_check import check_case
from model.sampling.rows import MIN_TEMPERATURE, RowParameters
from model.sampling.triton_sampling import kernel_available, sample_rows
from model.sampling_params import SamplingParams
from tests.model.sampling_oracle import Comparison, exact_draw, mixed_logits, mixed_params

ROOT = Path(__file__).parents[2]
GPT2_VOCAB = 50_257
# As `pytest.mark.gpu`, but also harmless when asked for where there is no device.
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
FIELDS = ("states", "temperature", "top_k", "top_p", "min_p")


@needs_triton
@pytest.mark.parametrize("times", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_the_kernel_draws_what_is_right_in_the_interpreter(times: int) -> None:
    command = [sys.executable, "-m", "tests.model.sampling_interpreted", str(times)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all equal the reference\n")


def test_parameters_hold_what_the_rows_ask_for() -> None:
    params = [
        SamplingParams(temperature=0.0, seed=1),
        SamplingParams(temperature=1e-9, top_k=99, seed=2),
        SamplingParams(temperature=0.7, top_k=100, top_p=0.123456789, min_p=0.25, seed=2**63 - 1),
    ]
    rows = RowParameters.build(params, 100, "cpu")
    assert rows.states.tolist() == [seed_state(p.seed) for p in params]
    assert rows.temperature.tolist() == pytest.approx([0.0, MIN_TEMPERATURE, 0.7])
    assert rows.top_k.tolist() == [0, 99, 0]
    assert rows.top_p.tolist() == [1.0, 1.0, 0.123456789]
    assert rows.min_p.tolist() == [0.0, 0.0, 0.25]
    dtypes = [getattr(rows, name).dtype for name in FIELDS]
    assert dtypes == [torch.int64, torch.float32, torch.int32, torch.float64, torch.float32]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_parameters_are_loaded_in_place_and_leave_the_other_rows_alone(count: int) -> None:
    fixed = RowParameters.empty(7, "cpu")
    addresses = [getattr(fixed, name).data_ptr() for name in FIELDS]
    before, after = (RowParameters.build(mixed_params(size, seed=size), 50, "cpu") for size in (7, count))
    fixed.load(before)
    fixed.load(after)
    view = fixed.view(count)
    for name, address in zip(FIELDS, addresses, strict=True):
        expected = torch.cat((getattr(after, name), getattr(before, name)[count:]))
        assert torch.equal(getattr(fixed, name), expected), name
        assert torch.equal(getattr(view, name), getattr(after, name))
        assert getattr(fixed, name).data_ptr() == address
        assert count == 0 or getattr(view, name).data_ptr() == address


def test_empty_rows_are_greedy_and_filter_nothing() -> None:
    rows, plain = RowParameters.empty(3, "cpu"), RowParameters.build([SamplingParams(temperature=0.0)] * 3, 9, "cpu")
    for name in FIELDS[1:]:
        assert torch.equal(getattr(rows, name), getattr(plain, name)), name


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where triton cannot be imported."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "model.sampling.sampling_kernel", raising=False)
    monkeypatch.delattr("model.sampling.sampling_kernel", raising=False)
    caches = (triton_sampling._kernel, triton_sampling._is_right)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("without_triton")
def test_the_kernel_is_not_available_without_triton_nor_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    assert not kernel_available("cpu")
    assert not caplog.records
    assert not kernel_available("cuda")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert Sampler(9).build_batch([SamplingRow(SamplingParams())]).parameters is None


def test_no_draw_of_the_check_is_a_matter_of_rounding() -> None:
    logits, params, positions = check_case()
    for row in range(len(params) - 1):
        if not params[row].is_greedy:
            exact = exact_draw(logits[row, :5_000], params[row], int(positions[row]))
            assert not exact.is_close, row
            assert exact.margin > 1e-5, row


def draw_on_device(logits: Tensor, params: list[SamplingParams], positions: Tensor, valid: int) -> Tensor:
    device, rows = logits.device, len(params)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    scratch = torch.full((rows, padded_width(valid)), torch.nan, device=device)
    sample_rows(logits, valid, RowParameters.build(params, valid, device), positions.to(device), scratch, out)
    return out.cpu()


class TestOnDevice:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("vocab_size", [65, 2_048, 5_000, GPT2_VOCAB])
    def test_draws_are_the_exact_ones(self, vocab_size: int, dtype: torch.dtype) -> None:
        rows, padding = 400, 47
        logits = mixed_logits(rows, vocab_size + padding, seed=vocab_size).to(dtype)
        logits[:, vocab_size:] = 1e4
        params, positions = mixed_params(rows, vocab_size), torch.arange(rows)
        token_ids = draw_on_device(logits.cuda(), params, positions, vocab_size)
        compared = Comparison()
        compared.add(logits[:, :vocab_size].float(), params, positions, token_ids)
        assert compared.rounded <= 4, compared
        assert compared.close <= rows // 5, compared

    def test_a_row_depends_on_itself_alone(self) -> None:
        """To the bit: beside others, alone, in another order, and from float32 as from bfloat16."""
        rows = 256
        logits, params = mixed_logits(rows, GPT2_VOCAB, seed=5).bfloat16().cuda(), mixed_params(rows, seed=6)
        positions = torch.arange(rows)
        together = draw_on_device(logits, params, positions, GPT2_VOCAB)
        for _ in range(3):
            assert torch.equal(draw_on_device(logits, params, positions, GPT2_VOCAB), together)
        assert torch.equal(draw_on_device(logits.float(), params, positions, GPT2_VOCAB), together)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
        shuffled = [params[row] for row in order.tolist()]
        assert torch.equal(draw_on_device(logits[order], shuffled, positions[order], GPT2_VOCAB), together[order])
        for row in range(rows):
            one = slice(row, row + 1)
            assert torch.equal(draw_on_device(logits[one], params[one], positions[one], GPT2_VOCAB), together[one])

    def test_nan_and_infinities(self) -> None:
        logits = torch.zeros(4, GPT2_VOCAB, device="cuda")
        logits[0, GPT2_VOCAB - 1] = torch.nan
        logits[1, 40_000] = torch.inf
        logits[2] = -torch.inf
        logits[3, :] = -torch.inf
        logits[3, 50_000] = 0.0
        for params in (SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=9, top_p=0.5)):
            ids = draw_on_device(logits, [params] * 4, torch.zeros(4, dtype=torch.int64), GPT2_VOCAB)
            assert ids.tolist() == [-1, 40_000, 0, 50_000]

    def test_a_graph_draws_by_what_is_loaded_into_its_parameters(self) -> None:
        rows, device = 16, torch.device("cuda")
        logits = mixed_logits(rows, GPT2_VOCAB, seed=2).bfloat16().cuda()
        fixed, positions = RowParameters.empty(rows, device), torch.zeros(rows, dtype=torch.int64, device=device)
        out = torch.empty(rows, dtype=torch.int64, device=device)
        scratch = torch.empty(rows, padded_width(GPT2_VOCAB), device=device)
        arguments = (logits, GPT2_VOCAB, fixed, positions, scratch, out)
        sample_rows(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sample_rows(*arguments)
        for step in range(5):
            params = mixed_params(rows, seed=step)
            fixed.load(RowParameters.build(params, GPT2_VOCAB, device))
            positions.fill_(step)
            graph.replay()
            assert torch.equal(out.cpu(), draw_on_device(logits, params, positions, GPT2_VOCAB))

    def test_the_sampler_uses_it_and_counts_a_broken_row(self) -> None:
        sampler = Sampler(GPT2_VOCAB, device="cuda")
        params = [SamplingParams(seed=row, logprobs=2, repetition_penalty=1.2) for row in range(3)]
        params.append(replace(params[0], temperature=0.0))
        batch = sampler.build_batch([SamplingRow(p, [1, 2]) for p in params])
        assert batch.parameters is not None
        logits = mixed_logits(4, GPT2_VOCAB, seed=3).cuda()
        logits[1, 7] = torch.nan
        output = sampler.sample(logits, batch, torch.zeros(4, dtype=torch.int64, device="cuda"))
        batch.record(output.token_ids)
        assert (output.token_ids < 0).tolist() == [False, True, False, False]
        assert output.logprobs is not None
        assert output.logprobs.chosen.isnan().tolist() == [False, True, False, False]
