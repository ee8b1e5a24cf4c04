"""The training objective against its definition in float64, whole and in chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import training.loss
from training.loss import summed_cross_entropy


def by_definition(logits: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
    logits = logits.double()
    log_z = logits.exp().sum(-1).log()
    logs = logits - log_z[..., None]
    right = logs.gather(-1, targets[..., None]).squeeze(-1)
    return (-(1 - smoothing) * right - smoothing * logs.mean(-1) + z_loss * log_z**2).sum()


@pytest.mark.parametrize("max_logits", [1 << 25, 40], ids=["whole", "chunked"])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_the_objective_and_its_gradients(
    smoothing: float, z_loss: float, max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.loss, "MAX_LOGITS", max_logits)
    torch.manual_seed(0)
    head = torch.randn(11, 6, requires_grad=True)
    hidden = torch.randn(3, 5, 6, requires_grad=True)
    targets = torch.randint(11, (3, 5))
    loss = summed_cross_entropy(
        lambda x: x @ head.t(), hidden, targets, vocab_size=11, label_smoothing=smoothing, z_loss=z_loss
    )
    found = torch.autograd.grad(loss, (hidden, head))
    expected = by_definition(hidden @ head.t(), targets, smoothing, z_loss)
    wanted = torch.autograd.grad(expected, (hidden, head))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
