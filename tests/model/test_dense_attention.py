"""The training kernels of model/native against torch's attention in float64 and against what dropout must do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import dense_attention
from model.dense_attention import causal_attention
from model.dropout import dropout
from model.native import INSTRUCTION_SETS, limit_instruction_set, load_kernels

# (batch, length, heads, kv heads, head_dim, window)
SHAPES = [
    (2, 70, 4, 2, 32, None), (1, 1, 2, 2, 16, None), (2, 33, 3, 3, 64, None), (2, 100, 4, 1, 48, 17),
    (1, 257, 2, 2, 64, None), (2, 64, 2, 1, 16, 2), (1, 40, 2, 2, 32, 40),
]  # fmt: skip

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="the CPU kernels were not built")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """A machine that lacks a set runs the best one below it."""
    limit_instruction_set(request.param)
    yield request.param
    limit_instruction_set(INSTRUCTION_SETS[-1])


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the output's gradient."""
    batch, length, heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    q, k, v, grad = (torch.randn(batch, length, n, dim, generator=generator).to(dtype) for n in sizes)
    return [x.requires_grad_() for x in (q, k, v)], grad


def reference(inputs: list[Tensor], grad: Tensor, window: int | None) -> list[Tensor]:
    """Output and gradients by torch in float64."""
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    out = dense_attention._torch_attention(*doubles, window, 0.0)
    out.backward(grad.double())
    return [out.detach(), *(x.grad for x in doubles if x.grad is not None)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the norms; where one token is seen, two of the gradients are exactly zero, hence the floor."""
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1.0)).item()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_equals_float64(shape: tuple[int, ...], dtype: torch.dtype, instruction_set: str) -> None:
    """Tolerances: a few roundings of float32; of bfloat16 inputs, the rounding of weights and results to 8 bits."""
    *sizes, window = shape
    inputs, grad = make_inputs(tuple(sizes), dtype)
    out = causal_attention(*inputs, window=window)
    out.backward(grad)
    expected = reference(inputs, grad, window)
    limit = 1e-6 if dtype == torch.float32 else 5e-3
    for found, wanted in zip([out.detach(), *(x.grad for x in inputs)], expected, strict=True):
        assert found is not None
        assert found.dtype == dtype
        assert relative_error(found, wanted) < limit


@needs_kernels
def test_inputs_may_be_views_of_one_product() -> None:
    """q, k and v as the model has them: slices of [B, T, (H + 2K) d]."""
    fused = torch.randn(2, 24, (4 + 2 + 2) * 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    parts = [part.unflatten(-1, (-1, 16)) for part in fused.split([64, 32, 32], dim=-1)]
    out = causal_attention(*parts)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(grad)
    copies = [part.detach().clone().requires_grad_() for part in parts]
    expected = reference(copies, grad, None)
    assert relative_error(out.detach(), expected[0]) < 1e-6
    assert fused.grad is not None
    assert relative_error(fused.grad, torch.cat([g.flatten(2) for g in expected[1:]], dim=-1)) < 1e-6


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        inputs, grad = make_inputs((3, 50, 4, 2, 32), dtype)
        out = causal_attention(*inputs, dropout=0.3)
        out.backward(grad)
        results.append([out.detach(), *(x.grad for x in inputs)])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))  # type: ignore[arg-type]


@needs_kernels
def test_dropped_weights_are_dropped_forwards_and_backwards() -> None:
    """With v the unit vectors the output is the dropped weight matrix itself; the gradient then follows from it."""
    length, probability = 32, 0.4
    inputs, grad = make_inputs((1, length, 1, 1, length), torch.float32)
    q, k, _ = inputs
    v = torch.eye(length).reshape(1, length, 1, length).requires_grad_()
    torch.manual_seed(5)
    weights = causal_attention(q, k, v, dropout=probability)
    weights.backward(grad)
    grads = [x.grad for x in (q, k, v)]

    plain = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = plain[0][0, :, 0] @ plain[1][0, :, 0].t() / length**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    kept = (weights.detach()[0, :, 0] != 0).double() / (1 - probability)
    expected = scores.softmax(-1) * kept
    out = expected @ plain[2][0, :, 0]
    out.backward(grad[0, :, 0].double())
    assert relative_error(weights.detach()[0, :, 0], out.detach()) < 1e-6
    for found, wanted in zip(grads, plain, strict=True):
        assert found is not None
        assert wanted.grad is not None
        assert relative_error(found, wanted.grad) < 1e-6
    seen = torch.ones(length, length).tril().bool()
    # Five standard deviations of the share of 528 weights.
    assert (kept[seen] == 0).double().mean().item() == pytest.approx(probability, abs=5 * (0.24 / 528) ** 0.5)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 15, 4096, 100_003])
def test_dropout_keeps_the_expected_share_scaled(count: int, dtype: torch.dtype, instruction_set: str) -> None:
    torch.manual_seed(7)
    x = torch.full((count,), 2.0, dtype=dtype, requires_grad=True)
    out = dropout(x, 0.25, training=True)
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 2.0 / 0.75))
    # Six standard deviations of a share of `count`.
    assert kept.double().mean().item() == pytest.approx(0.75, abs=6 * (0.1875 / count) ** 0.5)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad != 0, kept)


@needs_kernels
def test_the_default_generator_decides_dropout() -> None:
    x = torch.ones(1000)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(dropout(x, 0.5, training=True))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@needs_kernels
def test_neighbouring_masks_are_independent() -> None:
    """Correlations of a mask with itself shifted, and with the next seed's, stay within noise."""
    count = 1 << 18
    torch.manual_seed(0)
    first, second = (dropout(torch.ones(count), 0.5, training=True) - 1 for _ in range(2))
    limit = 6 / count**0.5
    for lag in (1, 2, 16, 64, 4096):
        assert abs((first[lag:] * first[:-lag]).mean().item()) < limit
    assert abs((first * second).mean().item()) < limit


def test_dropout_does_nothing_outside_training() -> None:
    x = torch.randn(10)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x


def test_without_the_kernels_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = make_inputs((1, 20, 2, 1, 16), torch.float32)
    expected = causal_attention(*inputs)
    monkeypatch.setattr(dense_attention, "load_kernels", lambda: None)
    monkeypatch.setattr("model.dropout.load_kernels", lambda: None)
    torch.testing.assert_close(causal_attention(*inputs), expected, rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    found = dropout(torch.ones(100), 0.5, training=True)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(torch.ones(100), 0.5))


def test_head_sizes_that_the_kernel_lacks_go_to_torch() -> None:
    inputs, grad = make_inputs((1, 9, 2, 2, 8), torch.float32)
    out = causal_attention(*inputs)
    assert relative_error(out.detach(), reference(inputs, grad, None)[0]) < 1e-6
