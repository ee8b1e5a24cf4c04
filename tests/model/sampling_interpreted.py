"""Run by test_sampling_kernel.py in a process of its own: the sampling kernel in Triton's interpreter, on the CPU."""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from model.sampling import Sampler, SamplingRow, sampler, sampling_kernel, triton_sampling
from model.sampling.draw import draw, padded_width, probabilities, seed_state, total_mass, uniforms
from model.sampling.filters import largest_threshold
from model.sampling.kernel_check import check_kernel
from model.sampling.rows import RowParameters
from model.sampling.triton_sampling import sample_rows
from model.sampling_params import SamplingParams
from tests.model.sampling_oracle import Comparison, mixed_logits, mixed_params
from tests.model.test_sampling import exact_distribution
from tests.model.test_sampling_frequencies import SIGNIFICANCE, p_value
from tests.model.triton_interpreted import mend_interpreter

SMALL_TILE = 128


@triton.jit
def uniform_kernel(out, states, positions):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    tl.store(out + row, sampling_kernel._uniform(tl.load(states + row), tl.load(positions + row)))


def hasten_interpreter() -> None:
    """It prepares triton's language anew at each call of one function by another; once per kernel is enough."""
    # What is prepared is what the kernel's module names; triton's own functions, such as sums, look there.
    setattr(sampling_kernel, "core", tl.core)  # noqa: B010

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def run(logits: Tensor, params: list[SamplingParams], positions: Tensor, valid: int | None = None) -> Tensor:
    """Token ids [B]; the scratch holds NaN at first, which must not matter."""
    rows, width = logits.shape
    valid = valid or width
    out = torch.full((rows,), -7)
    scratch = torch.full((rows, padded_width(valid)), torch.nan)
    sample_rows(logits, valid, RowParameters.build(params, valid, "cpu"), positions, scratch, out)
    return out


def torch_path(logits: Tensor, params: list[SamplingParams], positions: Tensor) -> Tensor:
    """The torch operations as they run on CUDA, where every nucleus is bisected."""
    scores = torch.full((len(params), padded_width(logits.shape[1])), -torch.inf)
    scores[:, : logits.shape[1]] = logits
    scores /= torch.tensor([p.temperature for p in params])[:, None]
    probs = probabilities(scores)
    for row, p in enumerate(params):
        mine, floor, buffer = probs[row : row + 1], torch.zeros(1, 1), torch.empty(1, probs.shape[1])
        least = mine.amax(dim=-1, keepdim=True) * p.min_p
        if 0 < p.top_k < logits.shape[1]:
            floor = largest_threshold(mine, torch.tensor([[float(p.top_k)]]).double(), buffer, count=True)
        if p.top_p < 1.0:
            target = total_mass(mine * (mine >= floor))[:, None] * p.top_p
            floor = torch.maximum(floor, largest_threshold(mine, target, buffer))
        mine *= mine >= torch.maximum(floor, least)
    states = torch.tensor([seed_state(p.seed) for p in params])
    return draw(probs, uniforms(states, positions))


def check_uniforms() -> None:
    generator = torch.Generator().manual_seed(5)
    states = torch.randint(-(2**63), 2**63 - 1, (500,), generator=generator)
    positions = torch.cat((torch.arange(250), torch.randint(0, 2**40, (250,), generator=generator)))
    out = torch.zeros(500, dtype=torch.float64)
    uniform_kernel[(500,)](out, states, positions)
    assert torch.equal(out, uniforms(states, positions))


def check_draws(vocab_size: int, rows: int, *, padding: int = 0) -> None:
    """Against float64, and against the torch path, from which rounding may part it once in a while."""
    logits = mixed_logits(rows, vocab_size + padding, seed=vocab_size)
    logits[:, vocab_size:] = 1e9
    valid, params, positions = logits[:, :vocab_size], mixed_params(rows, vocab_size), torch.arange(rows) % 11
    token_ids = run(logits, params, positions, vocab_size)
    compared = Comparison()
    compared.add(valid, params, positions, token_ids)
    assert compared.rounded <= 1 + rows // 200, compared
    assert compared.close <= 1 + rows // 10, compared
    random = torch.tensor([not p.is_greedy for p in params])
    drawing = [p for p in params if not p.is_greedy]
    same = torch_path(valid[random], drawing, positions[random]) == token_ids[random]
    assert int((~same).sum()) <= 2 + rows // 100, same
    print(f"{vocab_size}: {compared}, {int((~same).sum())} are not the torch path's", flush=True)


def check_invariance(vocab_size: int, rows: int) -> None:
    """To the bit: alone and in a batch, in another order, from a part of a wider tensor, and in half precision."""
    logits = mixed_logits(rows, vocab_size, seed=3).half()
    params, positions = mixed_params(rows, seed=9), torch.arange(rows)
    together = run(logits, params, positions)
    assert torch.equal(run(logits.float(), params, positions), together)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    shuffled = run(logits[order], [params[row] for row in order.tolist()], positions[order])
    assert torch.equal(shuffled, together[order])
    wide = torch.full((rows, vocab_size + 9), torch.nan, dtype=torch.float16)
    wide[:, :vocab_size] = logits
    for row in range(0, rows, 3):
        one = slice(row, row + 1)
        assert torch.equal(run(wide[one], params[one], positions[one], vocab_size), together[one])


def check_bfloat16() -> None:
    logits = mixed_logits(40, 200, seed=4).bfloat16()
    params, positions = mixed_params(40, seed=10), torch.arange(40)
    assert torch.equal(run(logits, params, positions), run(logits.float(), params, positions))


def check_odd_values() -> None:
    """NaN, infinities, ties and padding ids, greedy and drawn, in the first tile and in the last."""
    inf, nan, size = torch.inf, torch.nan, 300
    for params in (SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=5, top_p=0.9, min_p=0.1)):
        logits = torch.zeros(6, size + 3)
        logits[:, size:] = torch.tensor([nan, inf, 1e9])
        logits[0, 2] = nan
        logits[1, size - 1] = nan
        logits[2, [7, 290]] = inf
        logits[3] = -inf
        logits[4, :size] = -inf
        logits[4, 299] = -3e38
        logits[5, :size] = -inf
        logits[5, [150, 151]] = 3e38
        for position in range(2):
            ids = run(logits, [params] * 6, torch.full((6,), position), size).tolist()
            assert ids[:2] == [-1, -1]
            assert ids[2] in ((7,) if params.is_greedy else (7, 290))
            assert ids[3:5] == [0, 299]
            assert ids[5] in ((150,) if params.is_greedy else (150, 151))
    tied = torch.zeros(1, size)
    tied[0, [40, 41, 200]] = 1.0
    assert run(tied, [SamplingParams(temperature=0.0)], torch.tensor([0])).tolist() == [40]


def state_of(numerator: int) -> int:
    """The state whose uniform at position 0 is `numerator` · 2^-53: SplitMix64 the other way round."""

    def unshift(z: int, shift: int) -> int:
        undone = z
        for _ in range(64 // shift):
            undone = z ^ (undone >> shift)
        return undone

    z = unshift(numerator << 11, 31)
    for multiplier, shift in ((0x94D049BB133111EB, 27), (0xBF58476D1CE4E5B9, 30)):
        z = unshift(z * pow(multiplier, -1, 2**64) % 2**64, shift)
    return (z - 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63


def check_ends() -> None:
    """The least and the largest uniform draw the first and the last id that can be drawn, wherever in a tile it is."""
    size, positions, out = 1_000, torch.tensor([0]), torch.zeros(1, dtype=torch.int64)
    for first, last in ((0, 999), (3, 990), (127, 128), (128, 128), (500, 895)):
        logits = torch.full((1, size), -torch.inf)
        logits[0, first : last + 1] = 2.0
        for numerator, expected in ((0, first), (2**53 - 1, last)):
            rows = RowParameters.build([SamplingParams()], size, "cpu")
            rows.states.fill_(state_of(numerator))
            assert float(uniforms(rows.states, positions)) == numerator * 2.0**-53
            sample_rows(logits, size, rows, positions, torch.full((1, size), torch.nan), out)
            assert int(out) == expected, (first, last, numerator, out)


def check_frequencies(logits: Tensor, params: SamplingParams, count: int) -> None:
    kinds = [SamplingParams(params.max_tokens, 0, params.temperature, params.top_k, params.top_p, params.min_p, seed=s)
             for s in range(count)]  # fmt: skip
    ids = run(logits.expand(count, -1), kinds, torch.arange(count) % 13)
    observed = torch.bincount(ids, minlength=len(logits))
    assert p_value(observed, exact_distribution(logits, params) * count) > SIGNIFICANCE, params


def check_sampler() -> None:
    """The sampler that uses the kernel, with edits and log-probabilities, against the one that does not."""
    vocab_size, rows = 90, 24
    logits = mixed_logits(rows, vocab_size, seed=8)
    logits[:, :5] = torch.arange(5.0)
    prompts = [
        SamplingRow(
            SamplingParams(
                temperature=(0.0, 0.9)[index % 2],
                top_k=(0, 12)[index % 3 == 0],
                top_p=(1.0, 0.9)[index % 4 == 0],
                repetition_penalty=(1.0, 1.3)[index % 5 == 0],
                logit_bias={3: 2.0, 9: -100.0} if index % 6 == 0 else {},
                min_tokens=2 * (index % 2),
                seed=index,
                logprobs=2,
            ),
            [1, 2, 3],
        )
        for index in range(rows)
    ]
    plain = Sampler(vocab_size, valid_vocab_size=87, eos_token_ids=(4,))
    setattr(sampler, "kernel_available", lambda device: True)  # noqa: B010
    kernel = Sampler(vocab_size, valid_vocab_size=87, eos_token_ids=(4,))
    batches = plain.build_batch(prompts), kernel.build_batch(prompts)
    assert batches[1].random is None
    for position in range(4):
        positions = torch.full((rows,), position)
        expected, found = plain.sample(logits, batches[0], positions), kernel.sample(logits, batches[1], positions)
        assert torch.equal(found.token_ids, expected.token_ids)
        assert found.logprobs is not None
        assert expected.logprobs is not None
        assert torch.equal(found.logprobs.chosen, expected.logprobs.chosen)
        for batch in batches:
            batch.record(expected.token_ids)
    logits[5, 20] = torch.nan
    broken = kernel.sample(logits, batches[1], positions)
    batches[1].record(broken.token_ids)
    assert broken.token_ids[5] == -1
    assert broken.logprobs is not None
    assert broken.logprobs.chosen[5].isnan()
    assert (broken.token_ids >= 0).sum() == rows - 1


def main(times: int) -> None:
    """`times` scales the number of draws; 1 takes about a minute."""
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # infinity less infinity is meant
    mend_interpreter()
    hasten_interpreter()
    check_uniforms()
    check_kernel(torch.device("cpu"))
    check_draws(4_500, 4 * times)
    triton_sampling.TILE = SMALL_TILE
    check_odd_values()
    check_ends()
    check_draws(5, 40 * times)
    check_draws(65, 150 * times, padding=3)
    check_draws(SMALL_TILE, 40 * times)
    check_draws(257, 60 * times, padding=1)
    check_draws(1_000, 12 * times)
    check_invariance(300, 12 * times)
    check_bfloat16()
    check_sampler()
    peaked, flat = torch.tensor([5.0, 2.0, 2.0, 1.0, 0.0, -1.0, 4.5, 3.0]), torch.linspace(0.0, 0.8, 20)
    for logits in (peaked, flat):
        check_frequencies(logits, SamplingParams(temperature=1.3), 800 * times)
        check_frequencies(logits, SamplingParams(top_k=15, top_p=0.7, min_p=0.2), 60 * times)
    print("all equal the reference")


if __name__ == "__main__":
    main(int(sys.argv[1]))
