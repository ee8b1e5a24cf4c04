"""The sampler against exact distributions, transformers' processors and the rules of the parameters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.errors import InvalidSamplingParamsError
from model.sampling import Sampler, SamplingRow
from model.sampling_params import SamplingParams


def sample_one(logits: Tensor, params: SamplingParams, position: int = 0, **row: list[int]) -> int:
    sampler = Sampler(logits.shape[-1])
    batch = sampler.build_batch([SamplingRow(params, **row)])
    return int(sampler.sample(logits.view(1, -1), batch, torch.tensor([position])).token_ids[0])


def draws(logits: Tensor, params: SamplingParams, count: int) -> Tensor:
    """`count` draws at positions 0, 1, …, as one sequence would make them."""
    sampler = Sampler(logits.shape[-1])
    rows = [SamplingRow(params)] * count
    return sampler.sample(logits.expand(count, -1), sampler.build_batch(rows), torch.arange(count)).token_ids


def exact_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The filtered distribution in float64, by the definitions: sort, cut, renormalise."""
    x = logits.double()
    for token_id, bias in params.logit_bias.items():
        x[token_id] += bias
    p = torch.softmax(x / params.temperature, dim=-1)
    if params.top_k:
        p = torch.where(p >= p.sort(descending=True).values[min(params.top_k, len(p)) - 1], p, 0.0)
        p /= p.sum()
    ordered = p.sort(descending=True).values
    inside = ordered[(ordered.cumsum(0) - ordered) < params.top_p]
    p = torch.where(p >= inside[-1], p, 0.0)
    p = torch.where(p >= params.min_p * p.max(), p, 0.0)
    return p / p.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.5),
        SamplingParams(seed=3, temperature=1.7),
        SamplingParams(seed=4, top_k=5),
        SamplingParams(seed=5, top_p=0.7),
        SamplingParams(seed=6, min_p=0.1),
        SamplingParams(seed=9, temperature=2.0, top_p=0.97),
        SamplingParams(seed=10, temperature=2.0, top_p=0.75, top_k=600, min_p=0.04),
        SamplingParams(seed=2**63 - 1, temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
        SamplingParams(seed=8, logit_bias={3: 4.0, 30: -100.0}, top_k=10),
    ],
    ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
@pytest.mark.parametrize("vocab_size", [40, 700])
def test_frequencies_follow_the_filtered_distribution(params: SamplingParams, vocab_size: int) -> None:
    """Chi-squared at p > 0.001 over 20,000 draws; the seeds are fixed, so this cannot flake."""
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(7)) * 2
    count, seeds = 20_000, 5
    observed = torch.zeros(vocab_size, dtype=torch.int64)
    for step in range(seeds):
        reseeded = replace(params, seed=(params.seed + step) % 2**63)
        observed += torch.bincount(draws(logits, reseeded, count // seeds), minlength=vocab_size)
    expected = exact_distribution(logits, params) * count
    assert observed[expected == 0].sum() == 0
    large = expected >= 5
    cells = [*zip(observed[large].tolist(), expected[large].tolist(), strict=True)]
    rest = expected[~large].sum().item()
    if rest >= 5:
        cells.append((observed[~large].sum().item(), rest))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    degrees = len(cells) - 1
    p_value = float(torch.special.gammaincc(torch.tensor(degrees / 2.0), torch.tensor(statistic / 2.0)))
    assert p_value > 0.001, f"chi-squared {statistic:.1f} with {degrees} degrees of freedom"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("vocab_size", [5, 65, 4096, 10_001])
def test_greedy_takes_the_lowest_id_of_the_largest_logit(dtype: torch.dtype, rows: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(rows * vocab_size)
    logits = torch.randint(0, 4, (rows, vocab_size), generator=generator).to(dtype)
    logits[0] = 0.0
    logits[-1, -2:] = 9.0
    expected = [row.index(max(row)) for row in logits.tolist()]
    sampler = Sampler(vocab_size)
    batch = sampler.build_batch([SamplingRow(SamplingParams(temperature=0.0))] * rows)
    assert sampler.sample(logits, batch, torch.zeros(rows, dtype=torch.int64)).token_ids.tolist() == expected


def test_a_tiny_temperature_draws_among_the_largest_logits_only() -> None:
    logits = torch.tensor([1.0, 5.0, 4.999, 5.0])
    assert set(draws(logits, SamplingParams(temperature=1e-300), 200).tolist()) == {1, 3}


@pytest.mark.parametrize("greedy", [True, False])
def test_padded_ids_are_never_sampled(greedy: bool) -> None:
    logits = torch.full((64, 304), -5.0)
    logits[:, 257:] = 50.0
    params = [SamplingParams(temperature=0.0 if greedy else 1.0, seed=i, logit_bias={300: 100.0}) for i in range(64)]
    sampler = Sampler(304, valid_vocab_size=257)
    batch = sampler.build_batch([SamplingRow(p) for p in params])
    assert int(sampler.sample(logits, batch, torch.zeros(64, dtype=torch.int64)).token_ids.max()) < 257


def test_same_seed_and_position_same_token_and_different_ones_differ() -> None:
    logits = torch.zeros(10_000)
    first = [sample_one(logits, SamplingParams(seed=11), position) for position in range(20)]
    assert first == [sample_one(logits, SamplingParams(seed=11), position) for position in range(20)]
    assert len(set(first)) > 15
    assert first != [sample_one(logits, SamplingParams(seed=12), position) for position in range(20)]


def test_min_tokens_bars_eos_and_stop_ids_until_reached() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 1.0]]).repeat(3, 1)
    sampler = Sampler(4, eos_token_ids=(0,))
    params = [
        SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=(1,)),
        SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=(1,), ignore_eos=True),
        SamplingParams(temperature=0.0),
    ]
    batch = sampler.build_batch([SamplingRow(p) for p in params])
    assert sampler.sample(logits, batch, torch.tensor([2, 2, 2])).token_ids.tolist() == [2, 0, 0]
    assert sampler.sample(logits, batch, torch.tensor([3, 3, 0])).token_ids.tolist() == [0, 0, 0]


def test_penalties_follow_their_definitions_as_tokens_are_recorded() -> None:
    logits = torch.tensor([3.0, 2.9, 2.8, -1.0, 0.5])
    prompt, steps = [0, 3], 8
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7, max_tokens=steps
    )
    sampler = Sampler(5)
    batch = sampler.build_batch([SamplingRow(SamplingParams(temperature=0.0)), SamplingRow(params, prompt)])
    output: list[int] = []
    for position in range(steps):
        x = logits.clone()
        for token_id in {*prompt, *output}:
            x[token_id] = x[token_id] / 1.3 if x[token_id] > 0 else x[token_id] * 1.3
        for token_id in set(output):
            x[token_id] -= 0.7 * output.count(token_id) + 0.4
        result = sampler.sample(logits.repeat(2, 1), batch, torch.full((2,), position)).token_ids
        assert result.tolist() == [0, int(x.argmax())]
        batch.record(result)
        output.append(int(result[1]))
    assert len(set(output)) > 2


def test_a_rebuilt_batch_continues_with_the_same_penalties() -> None:
    generator = torch.Generator().manual_seed(3)
    params = SamplingParams(seed=5, repetition_penalty=1.5, frequency_penalty=1.0, presence_penalty=-0.5)
    sampler = Sampler(50)
    kept = sampler.build_batch([SamplingRow(params, [1, 2, 3])])
    output: list[int] = []
    for position in range(150):
        logits = torch.randn(1, 50, generator=generator)
        rebuilt = sampler.build_batch([SamplingRow(params, [1, 2, 3], output)])
        positions = torch.tensor([position])
        token_ids = sampler.sample(logits, kept, positions).token_ids
        assert token_ids.tolist() == sampler.sample(logits, rebuilt, positions).token_ids.tolist()
        kept.record(token_ids)
        output.append(int(token_ids[0]))


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 40)
    before = logits.clone()
    params = SamplingParams(logit_bias={1: 5.0}, repetition_penalty=2.0, top_k=3, logprobs=2, min_tokens=1)
    sampler = Sampler(40, eos_token_ids=(2,))
    batch = sampler.build_batch([SamplingRow(params, [1, 2])] * 3)
    sampler.sample(logits, batch, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(logits, before)


def test_a_bias_outside_the_output_width_is_refused_by_name() -> None:
    with pytest.raises(InvalidSamplingParamsError, match="logit_bias must use token ids from 0 to 39") as caught:
        Sampler(40).build_batch([SamplingRow(SamplingParams(logit_bias={40: 1.0}))])
    assert caught.value.param == "logit_bias"


def test_a_row_of_nan_neither_fails_nor_touches_its_neighbours() -> None:
    logits = torch.randn(3, 600)
    params = SamplingParams(top_k=5, top_p=0.9, min_p=0.01, seed=1)
    sampler = Sampler(600)
    batch = sampler.build_batch([SamplingRow(params)] * 3)
    clean = sampler.sample(logits, batch, torch.arange(3)).token_ids.tolist()
    logits[1] = torch.nan
    ids = sampler.sample(logits, batch, torch.arange(3)).token_ids.tolist()
    assert [ids[0], ids[2]] == [clean[0], clean[2]]
    assert 0 <= ids[1] < 600


def test_extreme_penalties_keep_the_distribution_finite() -> None:
    logits = torch.tensor([2.0, 30.0, -3.0])
    tiny = SamplingParams(repetition_penalty=1e-300, temperature=1e-5)
    assert sample_one(logits, tiny, prompt_token_ids=[0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_distribution_with_ties_in_order_of_id(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(-3, 3, (4, 900), generator=generator).to(dtype)
    logits[1] = torch.randn(900, generator=generator).to(dtype) * 4
    asked = [3, 20, None, 0]
    params = [
        SamplingParams(seed=i, logprobs=k, temperature=0.3, logit_bias={7: 50.0}, top_k=4, repetition_penalty=1.5)
        for i, k in enumerate(asked)
    ]
    sampler = Sampler(900)
    batch = sampler.build_batch([SamplingRow(p, [7]) for p in params])
    output = sampler.sample(logits, batch, torch.zeros(4, dtype=torch.int64))
    assert output.logprobs is not None
    assert output.logprobs.top_ids.shape == (4, 20)
    expected = torch.log_softmax(logits.float(), dim=-1)
    for row, k in enumerate(asked):
        if k is None:
            assert math.isnan(output.logprobs.chosen[row])
            continue
        values = expected[row].tolist()
        order = sorted(range(900), key=lambda token_id: (-values[token_id], token_id))[:k]
        assert output.logprobs.top_ids[row, :k].tolist() == order
        torch.testing.assert_close(output.logprobs.top_logprobs[row, :k], expected[row, order])
        torch.testing.assert_close(output.logprobs.chosen[row], expected[row, output.token_ids[row]])


def test_logprobs_of_a_tiny_vocabulary_stop_at_its_size() -> None:
    sampler = Sampler(8, valid_vocab_size=5)
    batch = sampler.build_batch([SamplingRow(SamplingParams(logprobs=20))])
    output = sampler.sample(torch.randn(1, 8), batch, torch.tensor([0]))
    assert output.logprobs is not None
    assert sorted(output.logprobs.top_ids[0].tolist()) == [0, 1, 2, 3, 4]
