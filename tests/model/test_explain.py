"""What the filters are said to do, against their definitions written out in plain Python."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling import Sampler, SamplingRow
from model.sampling.explain import Explanation, explain_token
from model.sampling_params import SamplingParams

VOCAB, VALID, EOS = 300, 290, 7
Distribution = dict[int, float]


def softmax(scores: Distribution) -> Distribution:
    most = max(scores.values())
    weights = {each: math.exp(score - most) for each, score in scores.items()}
    total = math.fsum(weights.values())
    return {each: weight / total for each, weight in weights.items()}


def renormalised(probs: Distribution, kept: set[int]) -> Distribution:
    total = math.fsum(probs[each] for each in kept)
    return {each: (probs[each] / total if each in kept else 0.0) for each in probs}


def reference(logits: list[float], row: SamplingRow) -> list[tuple[str, Distribution]]:
    """Every stage's distribution, by the definitions of the API's documentation."""
    p = row.params
    scores = dict(enumerate(logits[:VALID]))
    stages = [("raw", softmax(scores))]
    if p.logit_bias:
        scores = {each: score + p.logit_bias.get(each, 0.0) for each, score in scores.items()}
        stages.append(("logit_bias", softmax(scores)))
    if p.has_penalties:
        seen, counts = {*row.prompt_token_ids, *row.output_token_ids}, Counter(row.output_token_ids)
        for each in scores:
            if each in seen:
                factor = p.repetition_penalty
                scores[each] = scores[each] / factor if scores[each] > 0 else scores[each] * factor
            scores[each] -= counts[each] * p.frequency_penalty + (counts[each] > 0) * p.presence_penalty
        stages.append(("penalties", softmax(scores)))
    if p.min_tokens:
        barred = {EOS, *p.stop_token_ids} if len(row.output_token_ids) < p.min_tokens else set()
        scores = {each: (-math.inf if each in barred else score) for each, score in scores.items()}
        stages.append(("min_tokens", softmax(scores)))
    if p.temperature != 1.0:
        scores = {each: score / p.temperature for each, score in scores.items()}
        stages.append(("temperature", softmax(scores)))
    probs = stages[-1][1]
    ranked = sorted(probs, key=lambda each: -probs[each])
    kept = set(probs)
    if p.top_k:
        kept = set(ranked[: p.top_k])
        stages.append(("top_k", renormalised(probs, kept)))
    if p.top_p < 1:
        inside, mass, whole = set(), 0.0, math.fsum(probs[each] for each in kept)
        for each in ranked:
            if each in kept and mass < p.top_p * whole:
                inside.add(each)
                mass += probs[each]
        kept = inside
        stages.append(("top_p", renormalised(probs, kept)))
    if p.min_p:
        kept = {each for each in kept if probs[each] >= p.min_p * probs[ranked[0]]}
        stages.append(("min_p", renormalised(probs, kept)))
    return stages


def check(told: Explanation, stages: list[tuple[str, Distribution]]) -> None:
    raw, final = stages[0][1], stages[-1][1]
    assert [effect.name for effect in told.filters] == [name for name, _ in stages[1:]]
    for effect, (_, before), (_, after) in zip(told.filters, stages, stages[1:], strict=False):
        gone = {each for each in before if before[each] > 0 and after[each] == 0}
        assert effect.removed_tokens == len(gone), effect.name
        assert effect.removed_mass == pytest.approx(math.fsum(before[each] for each in gone), abs=1e-5)
        moved = math.fsum(abs(before[each] - after[each]) for each in before) / 2
        assert effect.moved_mass == pytest.approx(moved, abs=1e-5)
        assert effect.cut == [each.token_id for each in told.alternatives if each.token_id in gone]
    for each in told.alternatives:
        assert each.probability == pytest.approx(raw[each.token_id], abs=1e-6)
        assert each.final_probability == pytest.approx(final[each.token_id], abs=1e-5)
        assert (each.final_probability > 0) == (final[each.token_id] > 0)
    shown = {each.token_id for each in told.alternatives}
    for probs in (raw, final):
        best = sorted((each for each in probs if probs[each] > 0), key=lambda each: -probs[each])[:4]
        assert {*best, told.token_id} <= shown


def spaced_logits(seed: int, width: float) -> torch.Tensor:
    """Random ones of which no two are so close that rounding could order them otherwise."""
    steps = torch.linspace(-width, width, VOCAB)
    return steps[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))][None]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000), width=st.sampled_from([2.0, 6.0, 15.0]), temperature=st.sampled_from([1.0, 0.5, 1.7]),
    top_k=st.sampled_from([0, 1, 20, 289]), top_p=st.sampled_from([1.0, 0.93, 0.31]),
    min_p=st.sampled_from([0.0, 0.07]), bias=st.booleans(), penalties=st.booleans(), min_tokens=st.integers(0, 6),
)  # fmt: skip
def test_filters_do_what_their_definitions_say(
    seed: int, width: float, temperature: float, top_k: int, top_p: float, min_p: float, bias: bool, penalties: bool,
    min_tokens: int,
) -> None:  # fmt: skip
    drawn = random.Random(seed)
    penalty: dict[str, Any] = {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": -0.2}
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, min_tokens=min_tokens, stop_token_ids=(9,),
        seed=seed, logit_bias={drawn.randrange(VALID): drawn.uniform(-8, 8) for _ in range(3)} if bias else {},
        **(penalty if penalties else {}),
    )  # fmt: skip
    row = SamplingRow(params, [1, 2, 3, 3], [3, 5, 5, 8])
    logits = spaced_logits(seed, width)
    sampler = Sampler(VOCAB, valid_vocab_size=VALID, eos_token_ids=[EOS])
    before = logits.clone()
    told = explain_token(sampler, logits, row, drawn.randrange(VALID), 4)
    assert torch.equal(logits, before)
    check(told, reference([float(each) for each in logits[0]], row))


def test_every_draw_comes_from_the_final_distribution() -> None:
    """Over many positions of one seed; and what is said to be drawn is what the sampler draws among neighbours."""
    sampler = Sampler(VOCAB, valid_vocab_size=VALID, eos_token_ids=[EOS])
    params = SamplingParams(top_k=30, top_p=0.8, min_p=0.1, temperature=0.9, seed=77)
    logits = spaced_logits(4, 6.0)
    rows = [SamplingRow(params, [1], [2] * position) for position in range(200)]
    batch = sampler.build_batch([row for row in rows for _ in range(2)])
    together = sampler.sample(logits.expand(400, -1), batch, torch.arange(200).repeat_interleave(2)).token_ids[::2]
    told = [explain_token(sampler, logits, row, 0, 290) for row in rows]
    assert [each.drawn_id for each in told] == together.tolist()
    possible = {each.token_id for each in told[0].alternatives if each.final_probability > 0}
    assert {each.drawn_id for each in told} == possible


def test_a_nucleus_that_is_wider_than_what_the_sampler_sorts() -> None:
    """The sampler draws from it without cutting it out; the explanation says what it would have cut."""
    width = 2048
    logits = torch.linspace(0.0, 1.0, width)[None]
    sampler, params = Sampler(width), SamplingParams(top_p=0.7, seed=1)
    told = explain_token(sampler, logits, SamplingRow(params), 0, 5)
    probs = softmax(dict(enumerate(float(each) for each in logits[0])))
    kept, mass = 0, 0.0
    for each in sorted(probs, key=lambda each: -probs[each]):
        if mass >= 0.7:
            break
        kept, mass = kept + 1, mass + probs[each]
    assert kept > 256
    assert abs(told.filters[0].removed_tokens - (width - kept)) <= 1
    assert told.filters[0].cut == [0]
    assert told.filters[0].removed_mass == pytest.approx(1 - mass, abs=1e-3)


def test_greedy_keeps_the_first_of_the_best() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [20, 50, 295]] = torch.tensor([3.0, 3.0, 9.0])
    sampler = Sampler(VOCAB, valid_vocab_size=VALID, eos_token_ids=[EOS])
    told = explain_token(sampler, logits, SamplingRow(SamplingParams(temperature=0.0, top_k=5)), 50, 2)
    assert told.drawn_id == 20
    [effect] = told.filters
    assert (effect.name, effect.removed_tokens, effect.cut) == ("temperature", VALID - 1, [50])
    assert [(each.token_id, each.final_probability) for each in told.alternatives] == [(20, 1.0), (50, 0.0)]


def test_no_filter_no_effect() -> None:
    told = explain_token(Sampler(VOCAB), spaced_logits(1, 3.0), SamplingRow(SamplingParams(seed=2)), 3, 1)
    assert told.filters == []
    assert all(each.probability == each.final_probability for each in told.alternatives)
