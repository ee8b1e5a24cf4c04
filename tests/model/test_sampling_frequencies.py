"""How often each id is drawn, against the exact filtered distribution: where test_sampling.py does not look.

Penalties with a history, nuclei too wide to be cut out (drawn by rejection), batches of rows that all ask for something
else, and whether successive draws know of each other. Chi-squared with fixed seeds, so that nothing here can flake.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.sampling import Sampler, SamplingRow
from model.sampling import nucleus as nucleus_module
from model.sampling_params import SamplingParams
from tests.model.test_sampling import exact_distribution

PROMPT, OUTPUT = [3, 5, 8, 8, 20], [5, 5, 9, 30]
LEAST_EXPECTED = 5.0
SIGNIFICANCE = 0.001


def random_logits(vocab_size: int, scale: float) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(17)) * scale


def penalised(logits: Tensor, params: SamplingParams) -> Tensor:
    """By the definitions: repetition over prompt and output divides or multiplies (Keskar et al. 2019), frequency and
    presence over the output subtract (OpenAI's API reference)."""
    x = logits.double().clone()
    for token_id in {*PROMPT, *OUTPUT}:
        x[token_id] *= 1 / params.repetition_penalty if x[token_id] > 0 else params.repetition_penalty
    for token_id in set(OUTPUT):
        x[token_id] -= OUTPUT.count(token_id) * params.frequency_penalty + params.presence_penalty
    return x


def p_value(observed: Tensor, expected: Tensor) -> float:
    """Of Pearson's chi-squared; cells below five are put together. What cannot occur must not have occurred."""
    assert int(observed[expected == 0].sum()) == 0
    large = expected >= LEAST_EXPECTED
    rest = float(expected[~large].sum())
    statistic = float(((observed - expected)[large] ** 2 / expected[large]).sum())
    cells = int(large.sum())
    if rest >= LEAST_EXPECTED:
        statistic += (float(observed[~large].sum()) - rest) ** 2 / rest
        cells += 1
    degrees = cells - 1
    return float(torch.special.gammaincc(torch.tensor(degrees / 2.0), torch.tensor(statistic / 2.0)))


def draw_rows(logits: Tensor, kinds: list[SamplingParams], count: int) -> Tensor:
    """Ids [kinds, count]: batches in which the kinds take turns, every row with a seed and at a position of its own."""
    sampler = Sampler(len(logits))
    drawn = []
    for start in range(0, count, 500):
        rows = [
            SamplingRow(replace(params, seed=7_919 * (start + index) + kind), PROMPT, OUTPUT)
            for index in range(min(500, count - start))
            for kind, params in enumerate(kinds)
        ]
        positions = torch.arange(len(rows)) % 97
        batch = sampler.build_batch(rows)
        ids = sampler.sample(logits.expand(len(rows), -1), batch, positions).token_ids
        drawn.append(ids.view(-1, len(kinds)).T)
    return torch.cat(drawn, dim=1)


PENALTIES = [
    SamplingParams(repetition_penalty=1.6),
    SamplingParams(repetition_penalty=0.7, temperature=0.8),
    SamplingParams(presence_penalty=1.1, frequency_penalty=-0.6),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.9, presence_penalty=0.3, top_k=12, top_p=0.93),
]


@pytest.mark.parametrize("params", PENALTIES, ids=["repetition", "encouragement", "counts", "all and filters"])
def test_penalties_shift_the_frequencies_as_defined(params: SamplingParams) -> None:
    logits, count = random_logits(48, 1.5), 12_000
    logits[[3, 5, 8, 9, 20, 30]] = torch.tensor([1.5, 2.5, -0.8, 2.0, 1.0, 2.2])
    expected = exact_distribution(penalised(logits, params), params) * count
    observed = torch.bincount(draw_rows(logits, [params], count)[0], minlength=48)
    assert p_value(observed, expected) > SIGNIFICANCE
    unpenalised = exact_distribution(logits, params) * count
    shared = (expected > 0) & (unpenalised > 0)
    assert p_value(observed[shared], unpenalised[shared]) < SIGNIFICANCE, "without its penalties it looks different"


@pytest.mark.parametrize("top_p", [0.6, 0.8, 0.95])
def test_wide_nuclei_are_drawn_from_by_rejection(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size, count = 2_000, 20_000
    params = SamplingParams(top_p=top_p, temperature=1.2)
    logits = random_logits(vocab_size, 0.6)
    attempts: list[int] = []
    settle_draw = nucleus_module.draw

    def counting_draw(weights: Tensor, uniform: Tensor) -> Tensor:
        attempts.append(len(weights))
        return settle_draw(weights, uniform)

    monkeypatch.setattr(nucleus_module, "draw", counting_draw)
    observed = torch.bincount(draw_rows(logits, [params], count)[0], minlength=vocab_size)
    expected = exact_distribution(logits, params) * count
    inside = int((expected > 0).sum())
    assert 256 < inside < vocab_size
    # About 1 - top_p of the first draws lie outside the nucleus, and must be drawn again at least once.
    assert sum(attempts) > 0.9 * (1 - top_p) * count
    assert p_value(observed, expected) > SIGNIFICANCE


def test_rows_that_ask_for_different_things_each_follow_their_own_distribution() -> None:
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.8),
        SamplingParams(top_p=0.9, temperature=2.0),  # a nucleus wider than what is sorted
        SamplingParams(min_p=0.15),
        SamplingParams(top_k=300, temperature=1.8),
        PENALTIES[0],
        SamplingParams(logit_bias={4: 3.0, 11: -100.0}, top_k=40),
        SamplingParams(temperature=0.0),
    ]
    vocab_size, count = 600, 8_000
    logits = random_logits(vocab_size, 1.0)
    drawn = draw_rows(logits, kinds, count)
    for params, ids in zip(kinds[:-1], drawn, strict=False):
        edited = penalised(logits, params) if params.has_penalties else logits.double()
        expected = exact_distribution(edited, params) * count
        assert p_value(torch.bincount(ids, minlength=vocab_size), expected) > SIGNIFICANCE, params
    assert drawn[-1].unique().tolist() == [int(logits.argmax())]


@pytest.mark.parametrize("along", ["positions of one seed", "neighbouring seeds"])
def test_successive_draws_know_nothing_of_each_other(along: str) -> None:
    """Pairs of draws one after the other, as a table of 12 x 12, against the product of the distribution."""
    logits, count = random_logits(12, 1.0), 40_001
    one_seed = along == "positions of one seed"
    sampler = Sampler(12)
    ids = torch.cat([
        sampler.sample(
            logits.expand(stop - start, -1),
            sampler.build_batch([SamplingRow(SamplingParams(seed=4 if one_seed else s)) for s in range(start, stop)]),
            torch.arange(start, stop) if one_seed else torch.zeros(stop - start, dtype=torch.int64),
        ).token_ids
        for start, stop in zip(range(0, count, 8_000), [*range(8_000, count, 8_000), count], strict=True)
    ])  # fmt: skip
    pairs = torch.bincount(12 * ids[:-1] + ids[1:], minlength=144)
    p = torch.softmax(logits.double(), dim=-1)
    assert p_value(pairs, torch.outer(p, p).flatten() * (count - 1)) > SIGNIFICANCE


def test_the_statistic_notices_a_temperature_that_is_five_per_cent_off() -> None:
    logits, count = random_logits(40, 1.5), 20_000
    observed = torch.bincount(draw_rows(logits, [SamplingParams(temperature=1.05)], count)[0], minlength=40)
    assert p_value(observed, exact_distribution(logits, SamplingParams(temperature=1.05)) * count) > SIGNIFICANCE
    assert p_value(observed, exact_distribution(logits, SamplingParams()) * count) < SIGNIFICANCE
