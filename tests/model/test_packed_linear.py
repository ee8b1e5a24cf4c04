"""Packed products: the same rows to the bit for any number of them, the right values, and a way back to F.linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.checkpoint import save_model
from model.config import Activation, ModelConfig, gpt2_config, llama_config
from model.errors import CheckpointError
from model.linear import Linear, activate
from model.packed_linear import PackedWeight, pack_weight
from model.transformer import Transformer

DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS: list[Activation | None] = [None, "gelu_tanh", "gelu", "relu", "silu"]

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def random_weight(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(in_features)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    return weight.to(dtype), torch.randn(out_features, generator=generator).to(dtype)


def packed(
    out_features: int, in_features: int, dtype: torch.dtype, activation: Activation | None = None
) -> PackedWeight:
    result = pack_weight(*random_weight(out_features, in_features, dtype), activation)
    assert result is not None
    return result


def random_rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)


def linear(dtype: torch.dtype, activation: Activation | None = None) -> Linear:
    layer = Linear(96, 70, True, activation=activation).to(dtype)
    weight, bias = random_weight(70, 96, dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(1, 3), (7, 1), (64, 64), (100, 37), (768, 96), (1600, 64), (3072, 48), (4096, 33)],
)
def test_a_row_is_the_same_bits_among_any_number(
    in_features: int, out_features: int, threads: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(threads)
    product = packed(out_features, in_features, dtype, "gelu_tanh")
    x = random_rows(140, in_features, dtype)
    expected = product(x)
    for rows in (1, 2, 3, 4, 7, 8, 16, 17, 31, 33, 64, 100, 129):
        for first in (0, 140 - rows):
            assert torch.equal(product(x[first : first + rows]), expected[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_matches_float64(activation: Activation | None, with_bias: bool, dtype: torch.dtype) -> None:
    """The sum and the activation are in float32 and off by about 1e-7 of the magnitudes summed; bfloat16 then rounds
    once, by at most 2^-8 of the result."""
    weight, bias = random_weight(70, 96, dtype)
    x = 3 * random_rows(200, 96, dtype)
    product = pack_weight(weight, bias if with_bias else None, activation)
    assert product is not None
    exact_bias = bias.double() if with_bias else None
    expected = activate(F.linear(x.double(), weight.double(), exact_bias), activation)
    magnitude = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    assert ((product(x).double() - expected).abs() <= rounding * expected.abs() + 1e-6 * magnitude).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 96), (1, 96), (96,), (1, 1, 96), (3, 1, 96), (2, 0, 96), (2, 5, 96)])
def test_keeps_the_leading_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    product = packed(70, 96, dtype)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = product(x)
    assert out.shape == (*shape[:-1], 70)
    assert torch.equal(out.reshape(-1, 70), product(x.reshape(-1, 96)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 30:126],
        lambda x: x[::3, :96],
        lambda x: x[:1, 30:126],
        lambda x: x[:96, :12].t(),
        lambda x: x[:1, :96].expand(5, 96),
    ],
    ids=["columns", "every third row", "columns of one row", "transposed", "repeated"],
)
def test_views_need_no_copy_by_the_caller(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    product = packed(70, 96, dtype)
    x = view(random_rows(120, 200, dtype))
    assert torch.equal(product(x), product(x.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
def test_damage_stays_in_its_row(damage: float, dtype: torch.dtype) -> None:
    product = packed(70, 96, dtype)
    x = random_rows(4, 96, dtype)
    expected = product(x)
    x[1, 3] = damage
    out = product(x)
    assert not out[1].isfinite().any()
    assert torch.equal(out[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packing_a_module_changes_no_more_than_rounding(activation: Activation | None, dtype: torch.dtype) -> None:
    layer = linear(dtype, activation)
    x = random_rows(9, 96, dtype)
    with torch.no_grad():
        before = layer(x)
        layer.pack()
        assert layer.packed is not None
        # bfloat16 rounds before and after an activation of its own, each by 2^-8.
        tolerance = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
        assert torch.allclose(layer(x), before, rtol=tolerance, atol=tolerance)


def missing(*_: object) -> Tensor:
    raise AttributeError("no such operator")


def unsupported(*_: object) -> Tensor:
    raise RuntimeError("could not create a primitive")


@pytest.mark.parametrize("operator", ["_reorder_linear_weight", "_linear_pointwise"])
@pytest.mark.parametrize("failure", [missing, unsupported])
def test_without_the_operators_the_plain_product_runs(
    operator: str, failure: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = linear(torch.float32, "gelu")
    x = random_rows(5, 96, torch.float32)
    expected = activate(F.linear(x, layer.weight, layer.bias), "gelu")
    monkeypatch.setattr(torch.ops.mkldnn, operator, failure)
    layer.pack()
    assert layer.packed is None
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: out * 1.1,
        lambda out: out + 0.5,
        lambda out: out.flip(0),
        lambda out: out.flip(1),
        lambda out: out * torch.nan,
        lambda out: out[:, :-1],
    ],
    ids=["scaled", "shifted", "rows exchanged", "columns exchanged", "NaN", "misshapen"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_operators_are_not_used(
    wrong: Callable[[Tensor], Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_product = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: wrong(true_product(*given)))
    assert pack_weight(*random_weight(70, 96, dtype), None) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_left_alone(dtype: torch.dtype) -> None:
    assert pack_weight(*random_weight(70, 96, dtype), None) is None


def test_without_onednn_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert pack_weight(*random_weight(70, 96, torch.float32), None) is None


def test_a_packed_module_gives_back_the_memory_of_its_weight() -> None:
    layer = linear(torch.float32)
    layer.pack()
    assert layer.packed is not None
    assert layer.weight.untyped_storage().nbytes() == 0


def test_a_packed_module_has_no_weight_to_load_or_copy_into() -> None:
    layer, other = linear(torch.float32), linear(torch.float32)
    layer.pack()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        other.load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    "config",
    [
        gpt2_config(2, 2, 32, vocab_size=50, max_seq_len=16),
        llama_config(2, 4, 2, 32, 48, vocab_size=50, max_seq_len=16, tie_word_embeddings=False),
    ],
    ids=["gpt2", "llama"],
)
def test_a_packed_model_infers_but_is_not_saved(config: ModelConfig, tmp_path: Path) -> None:
    model = Transformer(config).eval()
    model.init_weights()
    input_ids = torch.arange(12)[None]
    with torch.inference_mode():
        expected = model.compute_logits(model(input_ids))
        model.pack_for_cpu()
        assert torch.allclose(model.compute_logits(model(input_ids)), expected, rtol=0.0, atol=1e-5)
    with pytest.raises(CheckpointError, match="packed"):
        save_model(tmp_path / "model", model)
    assert not (tmp_path / "model").exists()
