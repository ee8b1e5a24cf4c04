"""Products cut and filled up to one shape: the same function, and every call of one shape."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from model.config import Activation, gpt2_config, llama_config
from model.fixed_shape import FixedShapeProduct, fix_product_shapes
from model.linear import activate
from model.transformer import Transformer


@pytest.mark.parametrize("count", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "silu"])
def test_any_number_of_rows_is_the_plain_product(count: int, activation: Activation | None) -> None:
    generator = torch.Generator().manual_seed(count)
    weight, bias = torch.randn(11, 5, generator=generator), torch.randn(11, generator=generator)
    x = torch.randn(count, 5, generator=generator)
    product = FixedShapeProduct(weight, bias, activation, rows=8)
    torch.testing.assert_close(product(x), activate(F.linear(x, weight, bias), activation))
    torch.testing.assert_close(product(x[None]), product(x)[None], rtol=0.0, atol=0.0)


def test_every_product_has_the_same_shape_whatever_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()
    linear = F.linear

    def recording(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.add(tuple(x.shape))
        assert x.is_contiguous()
        return linear(x, *rest)

    product = FixedShapeProduct(torch.randn(3, 4), rows=8)
    monkeypatch.setattr("model.fixed_shape.F.linear", recording)
    for count in (1, 8, 30):
        product(torch.randn(2 * count, 4)[::2])
    assert seen == {(8, 4)}


@pytest.mark.parametrize("config", [
    gpt2_config(2, 2, 16, vocab_size=40, max_seq_len=32), llama_config(2, 2, 1, 16, 24, vocab_size=40, max_seq_len=32)
], ids=["tied", "own head"])  # fmt: skip
def test_a_model_with_fixed_shapes_is_the_same_model(config: object) -> None:
    model = Transformer(config)  # type: ignore[arg-type]
    model.init_weights(seed=1)
    ids = torch.arange(13)[None]
    with torch.inference_mode():
        expected = model.compute_logits(model(ids))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fix_product_shapes(model, rows=8)
        torch.testing.assert_close(model.compute_logits(model(ids)), expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
