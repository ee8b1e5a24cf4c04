"""A row's token depends on nothing but that row: to the bit, whatever the batch around it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.sampling import Sampler, SamplingRow
from model.sampling.draw import block_sums, padded_width, probabilities
from model.sampling.filters import Filters
from model.sampling.logprobs import raw_logprobs
from model.sampling_params import SamplingParams

GPT2_VOCAB = 50_257


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-4, 0.7, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 3, 40, 1_100])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.05, 0.6, 0.95, 0.9999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.02, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.2, 0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.3])),
        logit_bias=draw(st.dictionaries(st.integers(0, 60), st.sampled_from([-100.0, 0.5, 3.0]), max_size=3)),
        seed=draw(st.integers(0, 2**63 - 1)),
        min_tokens=draw(st.sampled_from([0, 0, 5])),
        logprobs=draw(st.sampled_from([None, None, 0, 4, 20])),
    )


def make_logits(seed: int, rows: int, vocab_size: int, levels: int, dtype: torch.dtype) -> Tensor:
    """Random logits; with few `levels` most of them are ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=generator) * 3
    return (logits if levels == 0 else (logits * levels).round() / levels).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    params=st.lists(sampling_params(), min_size=2, max_size=9),
    vocab_size=st.sampled_from([65, 300, 2_500, 5_000]),
    levels=st.sampled_from([0, 1, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_batched_equals_alone_bit_for_bit(
    params: list[SamplingParams], vocab_size: int, levels: int, dtype: torch.dtype, seed: int
) -> None:
    logits = make_logits(seed, len(params), vocab_size, levels, dtype)
    rows = [SamplingRow(p, list(range(20)), [3, 3, 5]) for p in params]
    sampler = Sampler(vocab_size, valid_vocab_size=vocab_size - 3, eos_token_ids=(1,))
    positions = torch.arange(len(params)) % 7
    together = sampler.sample(logits, sampler.build_batch(rows), positions)
    for index, row in enumerate(rows):
        alone = sampler.sample(logits[index : index + 1], sampler.build_batch([row]), positions[index : index + 1])
        assert alone.token_ids[0] == together.token_ids[index]
        k = row.params.logprobs
        if k is None:
            assert alone.logprobs is None
            continue
        assert alone.logprobs is not None
        assert together.logprobs is not None
        assert torch.equal(alone.logprobs.chosen[0], together.logprobs.chosen[index])
        assert torch.equal(alone.logprobs.top_ids[0, :k], together.logprobs.top_ids[index, :k])
        assert torch.equal(alone.logprobs.top_logprobs[0, :k], together.logprobs.top_logprobs[index, :k])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def padded(logits: Tensor) -> Tensor:
    scores = torch.full((logits.shape[0], padded_width(logits.shape[1])), -torch.inf)
    scores[:, : logits.shape[1]] = logits
    return scores


@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_arithmetic_of_a_row_does_not_depend_on_the_number_of_rows(
    levels: int, dtype: torch.dtype, two_threads: None
) -> None:
    """Stronger than equal tokens: equal probabilities, sums, thresholds and log-probabilities."""
    logits = make_logits(5, 7, GPT2_VOCAB, levels, dtype)
    params = [SamplingParams(top_p=0.9), SamplingParams(top_k=50, top_p=0.8), SamplingParams(top_k=2_000)]
    params += [SamplingParams(), SamplingParams(min_p=0.1), SamplingParams(top_p=0.9999), SamplingParams(top_k=7)]

    def compute(rows: list[int]) -> tuple[Tensor, ...]:
        scores = padded(logits[rows])
        probs = probabilities(scores)
        sums = block_sums(probs)
        filters = Filters.build([params[row] for row in rows], GPT2_VOCAB, torch.device("cpu"))
        if filters is not None:
            filters.apply(probs, scores)
        ids = torch.zeros(len(rows), dtype=torch.int64)
        logprobs = raw_logprobs(logits[rows], ids, 20, scores, torch.empty_like(scores))
        return probs, sums, logprobs.chosen, logprobs.top_ids, logprobs.top_logprobs

    together = compute(list(range(7)))
    for rows in ([0], [1], [2], [3], [4], [5], [6], [6, 1], [5, 4, 0]):
        for part, whole in zip(compute(rows), together, strict=True):
            assert torch.equal(part, whole[rows])


@pytest.mark.gpu
def test_batched_equals_alone_on_cuda() -> None:
    rows = [
        SamplingRow(SamplingParams(seed=i, top_k=(0, 50)[i % 2], top_p=(1.0, 0.9, 0.99)[i % 3], logprobs=i % 5), [1, 2])
        for i in range(24)
    ]
    for dtype in (torch.float32, torch.bfloat16):
        logits = make_logits(9, 24, GPT2_VOCAB, 2, dtype).cuda()
        sampler = Sampler(GPT2_VOCAB, device="cuda")
        for position in range(20):
            positions = torch.full((24,), position, device="cuda")
            together = sampler.sample(logits, sampler.build_batch(rows), positions)
            for index, row in enumerate(rows):
                alone = sampler.sample(logits[index : index + 1], sampler.build_batch([row]), positions[:1])
                assert alone.token_ids[0] == together.token_ids[index]
                assert alone.logprobs is not None
                assert together.logprobs is not None
                assert torch.equal(alone.logprobs.chosen[0], together.logprobs.chosen[index])


@pytest.mark.gpu
def test_sampling_can_be_captured_in_a_cuda_graph() -> None:
    sampler = Sampler(GPT2_VOCAB, device="cuda")
    batch = sampler.build_batch([SamplingRow(SamplingParams(seed=i, top_k=50, top_p=0.9)) for i in range(8)])
    logits = make_logits(9, 8, GPT2_VOCAB, 0, torch.bfloat16).cuda()
    positions = torch.zeros(8, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sampler.sample(logits, batch, positions)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sampler.sample(logits, batch, positions)
    for position in range(5):
        positions.fill_(position)
        graph.replay()
        assert torch.equal(captured.token_ids, sampler.sample(logits, batch, positions).token_ids)
