"""Filters and edits against transformers' logits processors, and draws at their edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.sampling.draw import block_sums, draw, padded_width, probabilities, seed_state, total_mass, uniforms
from model.sampling.edits import Penalties
from model.sampling.filters import Filters, largest_threshold, top_values
from model.sampling.nucleus import WideNuclei
from model.sampling_params import SamplingParams

VOCAB = 3_000


def padded(logits: Tensor) -> Tensor:
    scores = torch.full((logits.shape[0], padded_width(logits.shape[1])), -torch.inf)
    scores[:, : logits.shape[1]] = logits
    return scores


def filtered(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """The normalised distributions [B, V] that the draws see."""
    temperature = torch.tensor([p.temperature for p in params])[:, None]
    scores = padded(logits / temperature)
    probs = probabilities(scores)
    filters = Filters.build(params, logits.shape[1], torch.device("cpu"))
    if filters is not None:
        wide = filters.apply(probs, scores)
        if wide is not None:
            threshold = largest_threshold(probs[wide.rows], wide.target, scores[: len(wide.rows)])
            probs[wide.rows] *= probs[wide.rows] >= threshold
    return (probs / probs.sum(-1, keepdim=True))[:, : logits.shape[1]]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=1),
        SamplingParams(top_k=50, temperature=1.5),
        SamplingParams(top_k=2_000),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.1),
        SamplingParams(top_p=0.999, temperature=2.0),
        SamplingParams(min_p=0.05),
        SamplingParams(top_k=40, top_p=0.8, min_p=0.03, temperature=0.9),
        SamplingParams(top_k=1_500, top_p=0.97, temperature=2.0),
    ],
    ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_filters_agree_with_transformers(params: SamplingParams, scale: float) -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1)) * scale
    scores = TemperatureLogitsWarper(params.temperature)(None, logits) if params.temperature != 1.0 else logits
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    ours = filtered(logits, [params] * 6)
    theirs = torch.softmax(scores, dim=-1)
    differing = ((ours > 0) != (theirs > 0)).sum(-1)
    assert int(differing.max()) <= 1  # a float32 sum may end a nucleus one token earlier or later
    torch.testing.assert_close(ours, theirs, atol=2e-4 if bool(differing.any()) else 1e-6, rtol=1e-4)


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_repetition_penalty_agrees_with_transformers(penalty: float) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, VOCAB, generator=generator)
    history = torch.randint(0, VOCAB, (3, 200), generator=generator)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())
    params = [SamplingParams(repetition_penalty=penalty)] * 3
    rows = history.tolist()
    scores = padded(logits)
    penalties = Penalties.build(
        params, [row[:150] for row in rows], [row[150:] for row in rows], VOCAB, scores.shape[1], torch.device("cpu")
    )
    assert penalties is not None
    penalties.apply(scores)
    torch.testing.assert_close(scores[:, :VOCAB], theirs, atol=0.0, rtol=0.0)


def test_a_draw_is_settled_in_its_nucleus_and_nowhere_else() -> None:
    """Started from every id in turn: one inside stays, one outside is redrawn until it is inside."""
    vocab_size, top_p = 1_024, 0.6
    logits = (torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)) * 0.3).expand(vocab_size, -1)
    probs = probabilities(padded(logits).contiguous())
    rows, states = torch.arange(vocab_size), torch.arange(vocab_size) * 12_345
    wide = WideNuclei(rows, torch.full((vocab_size, 1), top_p, dtype=torch.float64) * total_mass(probs)[:, None])
    inside = filtered(logits[:1], [SamplingParams(top_p=top_p)])[0] > 0
    assert 256 < int(inside.sum()) < vocab_size
    token_ids = rows.clone()
    wide.settle(probs, token_ids, states, torch.zeros_like(rows), torch.empty_like(probs))
    assert bool(inside[token_ids].all())
    assert torch.equal(token_ids == rows, inside)


def test_ties_at_a_threshold_are_all_kept() -> None:
    logits = torch.tensor([[5.0, 1.0, 3.0, 3.0, 3.0, 0.0]])
    assert (filtered(logits, [SamplingParams(top_k=2)]) > 0).tolist() == [[True, False, True, True, True, False]]
    assert (filtered(logits, [SamplingParams(top_p=0.85)]) > 0).tolist() == [[True, False, True, True, True, False]]


def test_top_p_counts_within_what_top_k_kept() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = filtered(logits, [SamplingParams(top_k=2, top_p=0.57)]) > 0
    assert kept.tolist() == [[True, False, False, False]]  # 0.4 of 0.7 is already 57%
    assert (filtered(logits, [SamplingParams(top_p=0.57)]) > 0).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("k", [1, 7, 90, 94, 95, 3_072])
def test_top_values_are_those_of_a_full_sort(k: int) -> None:
    values = torch.randint(0, 500, (5, 3_072), generator=torch.Generator().manual_seed(k)).float()
    assert torch.equal(top_values(values, k), values.sort(descending=True).values[:, :k])


def test_largest_threshold_finds_the_kth_value_and_the_nucleus() -> None:
    probs = torch.softmax(torch.randn(4, 2_048, generator=torch.Generator().manual_seed(0)), dim=-1)
    ordered = probs.sort(descending=True).values
    scratch = torch.empty_like(probs)
    for k in (1, 2, 1_000, 2_048):
        counts = torch.full((4, 1), float(k), dtype=torch.float64)
        assert torch.equal(largest_threshold(probs, counts, scratch, count=True), ordered[:, k - 1 : k])
    mass = torch.full((4, 1), 0.4321, dtype=torch.float64)
    ends = (ordered.double().cumsum(-1) < mass).sum(-1, keepdim=True)
    assert torch.equal(largest_threshold(probs, mass, scratch), ordered.gather(1, ends))


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, 1.0 - 2.0**-53])
def test_a_weight_of_zero_is_never_drawn(uniform: float) -> None:
    weights = torch.zeros(4, 1_024)
    weights[0, 700] = 1e-30
    weights[1, [255, 256, 1_023]] = torch.tensor([1e-20, 1.0, 1e-20])
    weights[2, 256:512] = 1.0 / 256
    weights[3, [3, 900]] = torch.tensor([1e-38, 1e-38])
    uniforms_of_rows = torch.full((4,), uniform, dtype=torch.float64)
    for part in (weights, weights[:, 256:512].contiguous(), weights[:, 512:].contiguous()):
        some = part.sum(-1) > 0
        ids = draw(part[some], uniforms_of_rows[some])
        assert bool((part[some].gather(1, ids[:, None]) > 0).all())


def test_draws_invert_the_running_sum_in_order_of_id() -> None:
    weights = torch.zeros(1, 768)
    weights[0, [10, 300, 301, 767]] = torch.tensor([0.125, 0.25, 0.5, 0.125])
    edges = {0.0: 10, 0.1249: 10, 0.125: 300, 0.3749: 300, 0.375: 301, 0.8749: 301, 0.875: 767, 0.9999: 767}
    uniform = torch.tensor(list(edges), dtype=torch.float64)
    assert draw(weights.expand(len(edges), -1).contiguous(), uniform).tolist() == list(edges.values())


def test_uniforms_are_even_and_every_seed_bit_counts() -> None:
    position = torch.zeros(1, dtype=torch.int64)
    first = uniforms(torch.tensor([seed_state(0)]), position)
    flipped = [uniforms(torch.tensor([seed_state(1 << bit)]), position).item() for bit in range(63)]
    assert len({first.item(), *flipped}) == 64
    many = uniforms(torch.tensor([seed_state(99)]), torch.arange(100_000))
    assert 0.0 <= many.min() < many.max() < 1.0
    counts = torch.histc(many.float(), bins=100, min=0.0, max=1.0)
    assert float(((counts - 1_000) ** 2 / 1_000).sum()) < 148.2  # chi-squared, 99 degrees, p = 0.001
    neighbours = uniforms(torch.tensor([seed_state(seed) for seed in range(20_000)]), position.expand(20_000))
    pair = torch.stack((neighbours[:-1], neighbours[1:])) - 0.5
    assert abs(float((pair[0] * pair[1]).mean())) * 12 < 0.028  # correlation of neighbouring seeds, four sigma
    assert float(many.mul(2.0**53).remainder(2).mean()) == pytest.approx(0.5, abs=0.01)  # the 53rd bit is random


def test_uniforms_match_splitmix64_computed_with_plain_integers() -> None:
    mask = 2**64 - 1

    def finalise(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert finalise(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # SplitMix64's first output from seed 0
    for seed in (0, 1, 12_345, 2**62 + 17, 2**63 - 1):
        state = finalise((seed + 0x9E3779B97F4A7C15) & mask)
        for position in (0, 1, 1_000_000):
            expected = (finalise((state + (position + 1) * 0x9E3779B97F4A7C15) & mask) >> 11) / 2**53
            actual = uniforms(torch.tensor([seed_state(seed)]), torch.tensor([position]))
            assert actual.item() == expected


def test_block_sums_are_running_totals() -> None:
    weights = torch.rand(2, 1_024)
    sums = block_sums(weights)
    torch.testing.assert_close(sums, weights.double().cumsum(-1)[:, 255::256], atol=1e-4, rtol=1e-6)
