"""bfloat16 weights in 12 bits: none is rounded, rows stay independent, and a quarter less is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, gpt2_config, llama_config
from model.cpu_decoder import CPUDecoder
from model.native import INSTRUCTION_SETS, limit_instruction_set, load_kernels
from model.packed_model import PackedModel
from model.transformer import Transformer

library = load_kernels()
pytestmark = pytest.mark.skipif(
    library is None or not library.quill_reads_compact(), reason="this CPU multiplies no compact weights"
)

VOCAB_SIZE, CONTEXT = 131, 128
CONFIGS = {
    "gpt2": gpt2_config(2, 4, 160, vocab_size=VOCAB_SIZE, max_seq_len=CONTEXT),
    "llama": llama_config(2, 4, 2, 96, 200, vocab_size=VOCAB_SIZE, max_seq_len=CONTEXT),
    # 33 steps of two inputs: an odd number, which stays as it is.
    "odd": replace(gpt2_config(1, 3, 66, vocab_size=VOCAB_SIZE, max_seq_len=CONTEXT), intermediate_size=132),
}


def make_model(config: ModelConfig, outliers: float, zeros: float) -> Transformer:
    """Normal weights with shares of them from 2^-60 to 2^60 of their size, and of them exactly zero."""
    model = Transformer(config)
    model.init_weights(seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() != 2:
                continue
            drawn = torch.rand(parameter.shape, generator=generator)
            powers = torch.randint(-60, 6, parameter.shape, generator=generator).float()
            parameter.mul_(5.0)
            parameter[drawn < outliers] *= torch.exp2(powers)[drawn < outliers]
            parameter[drawn > 1 - zeros] = 0.0
    return model.to(torch.bfloat16).eval()


def pack(model: Transformer, monkeypatch: pytest.MonkeyPatch, *, compact: bool) -> PackedModel:
    with monkeypatch.context() as patch:
        if not compact:
            patch.setattr(library, "quill_reads_compact", lambda: 0)
        return PackedModel(model)


def logits_of(packed: PackedModel, rows: int, length: int) -> Tensor:
    ids = torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    with torch.inference_mode():
        return packed.compute_logits(packed(ids))


def weight_bytes(decoder: CPUDecoder) -> int:
    return sum(each.nbytes for each in decoder._alive if isinstance(each, Tensor) and each.dtype == torch.int32)


def is_compact(decoder: CPUDecoder) -> list[bool]:
    return [bool(getattr(layer, name).starts) for layer in decoder._layers for name in ("qkv", "o", "up", "down")]


def read_back(packed: PackedModel, rows: int) -> Tensor:
    """The tied head's weights [V, D], as products with rows of one 1 and else zeros, `rows` at a time."""
    unit = torch.eye(packed.config.hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        return torch.cat([packed.compute_logits(some) for some in unit.split(rows)]).T


def table_of(model: Transformer) -> Tensor:
    return model.embed_tokens.weight.detach().float().clone()


# Shares of weights of unusual size, and of zeros.
SHARES = [(0.0, 0.0), (5e-4, 0.0), (2e-4, 0.3)]


@pytest.mark.parametrize(("outliers", "zeros"), SHARES)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_no_weight_is_rounded(name: str, outliers: float, zeros: float) -> None:
    """For tiles of every height, for several tiles, and read as embeddings."""
    model = make_model(CONFIGS[name], outliers, zeros)
    table = table_of(model)
    packed = PackedModel(model)
    assert bool(packed._decoder._decoder.head.starts) == (name != "odd")
    for rows in (1, 2, 5, 11, 12, 13, 30, 66):
        assert torch.equal(read_back(packed, rows), table), rows
    ids = torch.arange(VOCAB_SIZE)
    assert torch.equal(embeddings(packed, ids), table)


def embeddings(packed: PackedModel, ids: Tensor) -> Tensor:
    """What a step's first phase makes of tokens, by a decoder that has no layers."""
    decoder = packed._decoder
    layers, decoder._decoder.num_layers = decoder._decoder.num_layers, 0
    norm, decoder._decoder.final_norm.scale = decoder._decoder.final_norm.scale, None
    table, decoder._decoder.position_table = decoder._decoder.position_table, None
    try:
        chunks = [packed(some[None])[0].float() for some in ids.split(CONTEXT)]
    finally:
        decoder._decoder.num_layers, decoder._decoder.final_norm.scale = layers, norm
        decoder._decoder.position_table = table
    return torch.cat(chunks)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_all_products_give_what_those_of_sixteen_bits_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of a few additions, after which a hidden state may round to the next bfloat16."""
    plain, compact = (pack(make_model(CONFIGS[name], 5e-4, 0.1), monkeypatch, compact=each) for each in (False, True))
    assert not any(is_compact(plain._decoder))
    assert any(is_compact(compact._decoder))
    for rows, length in [(1, 1), (7, 1), (13, 1), (1, 100), (3, 50)]:
        expected, found = logits_of(plain, rows, length), logits_of(compact, rows, length)
        assert float((found - expected).abs().max() / expected.abs().max()) <= 2e-2, (rows, length)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_rows_do_not_depend_on_their_number(name: str) -> None:
    packed = PackedModel(make_model(CONFIGS[name], 5e-4, 0.1))
    assert any(is_compact(packed._decoder))
    ids = torch.randint(VOCAB_SIZE, (40, 3), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        together = packed.compute_logits(packed(ids))
        for first, last in ((0, 1), (1, 3), (3, 8), (8, 21), (21, 40)):
            assert torch.equal(packed.compute_logits(packed(ids[first:last])), together[first:last])


@pytest.mark.parametrize("most", INSTRUCTION_SETS)
def test_kernels_that_do_not_read_them_unpack_them(most: str) -> None:
    model = make_model(CONFIGS["llama"], 5e-4, 0.1)
    table = table_of(model)
    packed = PackedModel(model)
    limit_instruction_set(most)
    try:
        for rows in (1, 5, 40):
            assert torch.equal(read_back(packed, rows), table)
    finally:
        limit_instruction_set(INSTRUCTION_SETS[-1])


def test_a_quarter_less_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config = gpt2_config(2, 4, 512, vocab_size=1024, max_seq_len=64)
    plain, compact = (pack(make_model(config, 1e-5, 0.0), monkeypatch, compact=each) for each in (False, True))
    assert weight_bytes(compact._decoder) < 0.76 * weight_bytes(plain._decoder)


def test_weights_of_many_sizes_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(CONFIGS["gpt2"], 0.2, 0.0)
    assert not any(is_compact(pack(model, monkeypatch, compact=True)._decoder))


def test_panels_of_many_sizes_stay_as_they_are_among_others() -> None:
    """The first of the head, which is the embedding too."""
    model = make_model(CONFIGS["gpt2"], 0.0, 0.0)
    rows = model.embed_tokens.weight.detach()[:32]
    rows.mul_(torch.exp2(torch.randint(-30, 6, rows.shape, generator=torch.Generator().manual_seed(1)).float()))
    table = table_of(model)
    packed = PackedModel(model)
    assert bool(packed._decoder._decoder.head.starts)
    for count in (1, 12, 40):
        assert torch.equal(read_back(packed, count), table)
    assert torch.equal(embeddings(packed, torch.arange(VOCAB_SIZE)), table)


def test_values_that_are_not_numbers_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [make_model(CONFIGS["gpt2"], 0.0, 0.0) for _ in range(2)]
    for model in models:
        model.embed_tokens.weight.detach()[5, 7] = torch.inf
        model.embed_tokens.weight.detach()[9, 3] = torch.nan
    plain, compact = (
        read_back(pack(model, monkeypatch, compact=each), 4) for model, each in zip(models, (False, True), strict=True)
    )
    assert torch.equal(plain.isnan(), compact.isnan())
    assert torch.equal(plain.nan_to_num(), compact.nan_to_num())
