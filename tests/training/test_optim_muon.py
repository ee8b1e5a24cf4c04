"""Muon against the singular value decomposition, torch.optim.Muon and AdamW."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import training.muon
from training.muon import Muon, orthogonalize

SHAPES = ((48, 48), (40, 64), (64, 40), (24, 96), (96, 24))  # square, and both ways round of either chain


def random_stack(count: int, rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(count, rows, cols, generator=torch.Generator().manual_seed(seed))


def by_decomposition(matrix: Tensor) -> Tensor:
    """Five times the quintic on the singular values alone, in float64."""
    u, values, vt = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected: Tensor = u @ torch.diag(values) @ vt
    return expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_the_iterations_act_on_singular_values_alone(
    rows: int, cols: int, dtype: torch.dtype, tolerance: float
) -> None:
    """The tolerance is relative to the Frobenius norm; bfloat16 keeps 8 bits."""
    stack = random_stack(3, rows, cols)
    for matrix, result in zip(stack, orthogonalize(stack.to(dtype)).double(), strict=True):
        expected = by_decomposition(matrix)
        assert (result - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [shape for shape in SHAPES if shape[0] != shape[1]])
def test_the_result_is_nearly_orthogonal(rows: int, cols: int, dtype: torch.dtype) -> None:
    values = torch.linalg.svdvals(orthogonalize(random_stack(3, rows, cols).to(dtype)).float())
    assert values.min() > 0.65
    assert values.max() < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_ill_conditioned_matrices_do_not_blow_up(rows: int, cols: int, dtype: torch.dtype) -> None:
    """Gradients are: one direction carries nearly everything."""
    rank_one = random_stack(1, rows, 1, seed=0) @ random_stack(1, 1, cols, seed=1)
    stack = (rank_one + 1e-4 * random_stack(1, rows, cols, seed=2)).to(dtype)
    assert torch.linalg.svdvals(orthogonalize(stack).float()).max() < 1.3


def test_scale_multiplies_and_zeros_stay_zeros() -> None:
    stack = random_stack(2, 16, 40)
    torch.testing.assert_close(orthogonalize(stack, 3.0), 3.0 * orthogonalize(stack))
    assert not orthogonalize(torch.zeros(1, 8, 24)).any()


def descend(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = 4) -> list[Tensor]:
    """Steps on gradients that depend on the step and the parameter's place only."""
    for step in range(steps):
        for place, parameter in enumerate(parameters):
            rows, cols = parameter.shape
            parameter.grad = random_stack(1, rows, cols, seed=100 * step + place)[0]
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def parameters_of(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    return [nn.Parameter(random_stack(1, *shape, seed=7 + place)[0]) for place, shape in enumerate(shapes)]


def test_plain_matrices_move_as_under_torch_optim_muon() -> None:
    """Both round to bfloat16, at other places: the movements differ by a few hundredths of their norm."""
    settings: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    ours, theirs, start = (parameters_of(*SHAPES) for _ in range(3))
    descend(Muon(ours, **settings), ours)
    descend(torch.optim.Muon(theirs, **settings), theirs)
    for mine, other, before in zip(ours, theirs, start, strict=True):
        assert (mine - other).norm() < 0.04 * (other - before).norm()


def test_a_fused_parameter_moves_as_its_parts_would() -> None:
    cols, split = 24, (24, 48, 12, 12)  # two of one shape; one tall, whose step is scaled up
    (fused,), (unsplit,) = parameters_of((sum(split), cols)), parameters_of((sum(split), cols))
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split_with_sizes(split)]
    optimizers = (
        Muon([{"params": [fused], "split": split}], dtype=torch.float32),
        Muon([unsplit], dtype=torch.float32),
        Muon(parts, dtype=torch.float32),
    )
    for step in range(3):
        gradient = random_stack(1, sum(split), cols, seed=step)[0]
        fused.grad, unsplit.grad = gradient, gradient
        for part, share in zip(parts, gradient.split_with_sizes(split), strict=True):
            part.grad = share.clone()
        for optimizer in optimizers:
            optimizer.step()
    expected = torch.cat([part.detach() for part in parts])
    torch.testing.assert_close(fused.detach(), expected)
    assert (unsplit.detach() - expected).abs().max() > 1e-3


def test_one_step_has_the_size_of_the_rate() -> None:
    """Each singular value of a step is lr, within the quintic's basin; a tall matrix's is √(rows/cols) times that."""
    for shape, factor in (((32, 96), 1.0), ((96, 24), math.sqrt(4))):
        (before,), (parameter,) = parameters_of(shape), parameters_of(shape)
        descend(Muon([parameter], lr=0.01, dtype=torch.float32), [parameter], steps=1)
        values = torch.linalg.svdvals((before - parameter).detach()) / (0.01 * factor)
        assert values.min() > 0.65
        assert values.max() < 1.25


def test_weight_decay_is_decoupled() -> None:
    """Without gradients to follow, weights shrink by 1 - lr·decay a step."""
    (parameter,) = parameters_of((8, 24))
    start = parameter.detach().clone()
    optimizer = Muon([parameter], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), start * 0.95**3)


def test_the_size_of_a_stack_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(16, 48)] * 5
    whole, cut = parameters_of(*shapes), parameters_of(*shapes)
    descend(Muon(whole, dtype=torch.float32), whole)
    monkeypatch.setattr(training.muon, "_MAX_STACK", 2 * 16 * 48)
    descend(Muon(cut, dtype=torch.float32), cut)
    torch.testing.assert_close(whole, cut)


def test_parameters_without_gradient_are_left_alone() -> None:
    first, second = parameters_of((8, 24), (8, 24))
    before = second.detach().clone()
    first.grad = torch.ones_like(first)
    optimizer = Muon([first, second], weight_decay=0.1)
    optimizer.step()
    assert torch.equal(second.detach(), before)
    assert list(optimizer.state) == [first]
