"""The one-pass training operations against their definitions in float64, with gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import fused
from model.config import Activation, llama_config
from model.layers import RMSNorm, RotaryEmbedding, apply_rotary
from model.linear import activate
from model.native import INSTRUCTION_SETS, limit_instruction_set, load_kernels

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="the CPU kernels were not built")

# bfloat16 results carry 8 bits: half a unit in the last place is 2^-9 of the value.
BF16_ERROR = 3e-3
DEFINITIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    limit_instruction_set(request.param)
    yield request.param
    limit_instruction_set(INSTRUCTION_SETS[-1])


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_activations(name: Activation) -> None:
    x = (4 * randn(37, 96)).bfloat16().requires_grad_()
    grad = randn(37, 96, seed=1).bfloat16()
    out = activate(x, name)
    assert "_Activation" in type(out.grad_fn).__name__
    out.backward(grad)
    wide = x.detach().double().requires_grad_()
    expected = DEFINITIONS[name](wide)
    expected.backward(grad.double())
    assert relative_error(out.detach(), expected.detach()) < BF16_ERROR
    assert relative_error(x.grad, wide.grad) < BF16_ERROR


@pytest.mark.parametrize("name", DEFINITIONS)
def test_activations_far_out(name: Activation) -> None:
    """Where exponentials vanish or would overflow: the limits are 0 and x, their slopes 0 and 1."""
    x = torch.tensor([-1e30, -300.0, -100.0, 0.0, 100.0, 300.0, 1e30, 1.0] * 4).bfloat16().requires_grad_()
    out = activate(x, name)
    out.sum().backward()
    wide = x.detach().float()
    torch.testing.assert_close(out.detach().float(), DEFINITIONS[name](wide), rtol=8e-3, atol=1e-6)
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[:3].tolist() == [0.0, 0.0, 0.0]
    assert x.grad[4:7].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_gated_activations(name: Activation) -> None:
    x = (3 * randn(2, 9, 128)).bfloat16().requires_grad_()
    grad = randn(2, 9, 64, seed=1).bfloat16()
    out = fused.gated_activation(x, name)
    out.backward(grad)
    wide = x.detach().double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    expected = DEFINITIONS[name](gate) * up
    expected.backward(grad.double())
    assert relative_error(out.detach(), expected.detach()) < BF16_ERROR
    assert relative_error(x.grad, wide.grad) < BF16_ERROR


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("rows", [1, 64, 200])
def test_rms_norm(rows: int, autocast: bool) -> None:
    norm = RMSNorm(48, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(randn(48, seed=2))
    x = randn(rows, 48).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = norm(x)
    assert "_RMSNorm" in type(out.grad_fn).__name__
    assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
    grad = randn(rows, 48, seed=3).to(out.dtype)
    out.backward(grad)
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight
    expected.backward(grad.double())
    assert relative_error(out.detach(), expected.detach()) < (BF16_ERROR if autocast else 1e-6)
    assert relative_error(x.grad, wide.grad) < 1e-6
    assert relative_error(norm.weight.grad, weight.grad) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_positions(dtype: torch.dtype) -> None:
    cos, sin = RotaryEmbedding(llama_config(1, 4, 2, 128, 64, vocab_size=9, max_seq_len=64))(torch.arange(40))
    qkv = randn(2, 40, 8 * 32).to(dtype).requires_grad_()
    query = qkv.split([4 * 32, 4 * 32], dim=-1)[0].unflatten(-1, (4, 32))
    out = apply_rotary(query, cos, sin)
    assert "_Rotation" in type(out.grad_fn).__name__
    grad = randn(2, 40, 4, 32, seed=1).to(dtype)
    out.backward(grad)
    wide = qkv.detach().double().requires_grad_()
    first, second = wide[..., :128].unflatten(-1, (4, 32)).chunk(2, dim=-1)
    c, s = cos[..., :16].double(), sin[..., :16].double()
    expected = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    expected.backward(grad.double())
    limit = 1e-6 if dtype == torch.float32 else BF16_ERROR
    assert relative_error(out.detach(), expected.detach()) < limit
    assert relative_error(qkv.grad, wide.grad) < limit


def test_nothing_is_fused_where_no_gradient_is_asked_for() -> None:
    x = randn(4, 64).bfloat16()
    assert not fused.can_activate(x, "silu")
    assert not fused.can_normalise(x.float())
    with torch.no_grad():
        assert not fused.can_normalise(randn(4, 64).requires_grad_())


def test_threads_change_no_bit() -> None:
    norm, gradients = RMSNorm(128, 1e-5), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        x = randn(300, 128).requires_grad_()
        norm.zero_grad()
        fused.gated_activation(norm(x).bfloat16(), "silu").float().square().sum().backward()
        gradients.append((x.grad, norm.weight.grad))
    torch.set_num_threads(1)
    for one, two in zip(*gradients, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)
