"""The compiled forward pass: the Transformer's values for every family, and rows that do not depend on each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from model.checkpoint import load_model
from model.config import ModelConfig, gpt2_config, llama_config
from model.cpu_decoder import CPUDecoder
from model.errors import ConfigError
from model.native import INSTRUCTION_SETS, limit_instruction_set, load_kernels
from model.packed_model import PackedModel
from model.tokenizer import Tokenizer
from model.transformer import Transformer

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="the compiled kernels were not built")

VOCAB_SIZE, CONTEXT = 131, 96


def _gpt2(hidden_size: int, num_heads: int) -> ModelConfig:
    return gpt2_config(2, num_heads, hidden_size, vocab_size=VOCAB_SIZE, max_seq_len=CONTEXT)


def _llama(hidden_size: int, **changes: object) -> ModelConfig:
    config = llama_config(2, 4, 2, hidden_size, 200, vocab_size=VOCAB_SIZE, max_seq_len=CONTEXT)
    return replace(config, **changes)  # type: ignore[arg-type]


# Widths that fill panels of 32, groups of 128 and vectors of 16, and widths that leave rests of each.
CONFIGS = {
    "gpt2": _gpt2(160, 4),
    "gpt2 narrow": _gpt2(72, 4),
    "gpt1": replace(_gpt2(64, 4), architecture="openai-gpt", norm_first=False),
    "relu": replace(_gpt2(40, 2), activation="relu"),
    "gelu": replace(_gpt2(48, 2), activation="gelu", norm_bias=False, qkv_bias=False),
    "llama": _llama(96),
    "llama untied": _llama(80, tie_word_embeddings=False),
    "mistral": _llama(96, architecture="mistral", sliding_window=7),
    "qwen2": _llama(64, architecture="qwen2", qkv_bias=True),
    "qwen3": _llama(96, architecture="qwen3", qk_norm=True, head_dim=40),
}
# Sums of a hundred terms, rounded once per layer to 8 bits of mantissa; eight bits round every factor to a part in 254
# of its group's largest. Errors are shares of the largest logit.
TOLERANCES = {"float32": 5e-6, "bfloat16": 4e-2, "int8": 8e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """Random weights wide enough for logits with clear preferences, and biases and norms unlike 0 and 1."""
    model = Transformer(config)
    model.init_weights(seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(5.0)
    return model.to(dtype).eval()


def make_packed(config: ModelConfig, weights: str) -> PackedModel:
    return PackedModel(make_model(config, DTYPES[weights]), "int8" if weights == "int8" else "none")


def some_ids(rows: int, length: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(rows * length))


def logits_of(model: Transformer | PackedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.compute_logits(model(ids)).float()


@pytest.mark.parametrize("weights", sorted(TOLERANCES))
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_are_the_transformers(name: str, weights: str) -> None:
    config = CONFIGS[name]
    ids = some_ids(2, 50)
    exact = logits_of(make_model(config, DTYPES[weights]).float(), ids)
    ours = logits_of(make_packed(config, weights), ids)
    assert float((ours - exact).abs().max() / exact.abs().max()) <= TOLERANCES[weights]


@pytest.mark.parametrize("most", INSTRUCTION_SETS)
@pytest.mark.parametrize("weights", sorted(TOLERANCES))
def test_every_instruction_set_computes_the_same_function(weights: str, most: str) -> None:
    config = CONFIGS["llama"]
    ids = some_ids(3, 30)
    exact = logits_of(make_model(config, DTYPES[weights]).float(), ids)
    limit_instruction_set(most)
    try:
        ours = logits_of(make_packed(config, weights), ids)
    finally:
        limit_instruction_set(INSTRUCTION_SETS[-1])
    assert float((ours - exact).abs().max() / exact.abs().max()) <= TOLERANCES[weights]


@pytest.fixture(scope="module", params=sorted(TOLERANCES))
def packed(request: pytest.FixtureRequest) -> PackedModel:
    return make_packed(CONFIGS["gpt2"], request.param)


def test_rows_do_not_depend_on_their_number(packed: PackedModel) -> None:
    ids = some_ids(40, 9)
    together = logits_of(packed, ids)
    for first, last in ((0, 1), (1, 3), (3, 8), (8, 21), (21, 40)):
        assert torch.equal(logits_of(packed, ids[first:last]), together[first:last])


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), threads=st.integers(1, 4))
def test_chunks_and_threads_change_nothing(packed: PackedModel, sizes: list[int], threads: int) -> None:
    length = min(sum(sizes), CONTEXT)
    ids = some_ids(1, length)
    torch.set_num_threads(1)
    whole = packed(ids)
    torch.set_num_threads(threads)
    cache, parts, start = packed.new_dense_cache(1, length), [], 0
    for size in sizes:
        if start < length:
            parts.append(packed(ids[:, start : start + size], cache))
            start += size
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_only_wanted_rows_are_returned() -> None:
    packed = make_packed(CONFIGS["llama"], "float32")
    ids = some_ids(1, 20)
    whole = packed(ids)[0]
    cache = packed.new_dense_cache(1, 20)
    positions, batch = cache.extend(20)
    packed._decoder.bind(cache.cache)
    for rows in ([], [19], [0, 7, 8, 19]):
        wanted = torch.tensor(rows, dtype=torch.int64)
        hidden = packed._decoder.forward(ids.flatten(), positions, batch.metadata, wanted)
        assert torch.equal(hidden, whole[wanted])


def test_weights_of_eight_bits_are_within_half_a_step() -> None:
    """The tied head's packed rows, read back as embeddings, against the closed form of rounding."""
    config = replace(CONFIGS["llama"], num_layers=1)
    model = make_model(config, torch.bfloat16)
    table = model.embed_tokens.weight.detach().float().clone()
    packed = PackedModel(model, "int8")
    steps = table.abs().amax(dim=-1, keepdim=True) / 127  # 96 inputs are one group
    hidden = torch.eye(96, dtype=torch.bfloat16)[:64]  # exact in eight bits: a single 1, all else 0
    read_back = packed.compute_logits(hidden).T
    assert bool(((read_back - table[:, :64]).abs() <= steps / 2 * 1.01).all())


# Shakespeare, sonnets 18 and 30; not among the plays that the bundled model was trained on.
TEXT = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
When to the sessions of sweet silent thought
I summon up remembrance of things past,
I sigh the lack of many a thing I sought,
And with old woes new wail my dear time's waste:
"""


def test_eight_bits_cost_less_than_half_a_percent_of_perplexity() -> None:
    folder = Path(__file__).parents[2] / "model" / "data" / "shakespeare"
    ids = torch.tensor([Tokenizer.load(folder).encode(TEXT)])

    def loss(quantization: str) -> float:
        packed = PackedModel(load_model(folder, dtype=torch.bfloat16), quantization)
        return float(functional.cross_entropy(packed.compute_logits(packed(ids[:, :-1]))[0], ids[0, 1:]))

    # Perplexity is the loss's exponential, so that 0.5% is a difference of log(1.005).
    assert abs(loss("int8") - loss("none")) <= math.log(1.005)


def test_the_transformer_gives_its_weights_away() -> None:
    model = make_model(CONFIGS["gpt2"], torch.float32)
    PackedModel(model)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2) == 0


def test_steps_that_do_not_fit_are_refused() -> None:
    packed = make_packed(CONFIGS["llama"], "float32")
    for ids in (torch.full((1, 2), VOCAB_SIZE), torch.full((1, 2), -1)):
        with pytest.raises(AssertionError, match="fit the model"):
            packed(ids)
    with pytest.raises(ConfigError, match="513 sequences"):
        packed(torch.zeros(513, 1, dtype=torch.int64))


def test_models_that_the_kernels_do_not_cover() -> None:
    assert not CPUDecoder.supports(CONFIGS["llama"], torch.float16)
    assert not CPUDecoder.supports(replace(CONFIGS["llama"], head_dim=1024), torch.float32)
    with pytest.raises(ConfigError, match="cannot run this model"):
        CPUDecoder(make_model(CONFIGS["llama"], torch.float16), 16)
