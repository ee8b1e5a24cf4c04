"""Guessed tokens change the number of steps and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.native import load_kernels
from model.sampling_params import SamplingParams
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest, SequenceOutput
from server.engine.speculation import PromptLookup
from tests.engine.test_llm_engine import make_engine, mixed_requests, run_under_load, small_pool

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="the compiled kernels were not built")


def naive_guess(token_ids: list[int], most: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest of the last 5, 4 or 3 tokens."""
    for length in (5, 4, 3):
        for end in range(len(token_ids) - 1, length - 1, -1):
            if len(token_ids) > length and token_ids[end - length : end] == token_ids[-length:]:
                return token_ids[end : end + most]
    return []


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 8), st.lists(st.integers(1, 7), max_size=20)
)
def test_a_guess_is_what_followed_last_time(token_ids: list[int], most: int, strides: list[int]) -> None:
    lookup = PromptLookup()
    end = 1
    for stride in strides:
        assert lookup.propose(token_ids[:end], most) == naive_guess(token_ids[:end], most)
        end = min(end + stride, len(token_ids))


def test_wrong_guesses_make_the_pauses_longer_and_a_right_one_ends_them() -> None:
    lookup = PromptLookup()
    text = [1, 2, 3] * 4

    def steps_without_guess() -> int:
        for count in range(200):
            if lookup.propose(text, 2):
                return count
        raise AssertionError("no guess came")

    assert steps_without_guess() == 0
    pauses = []
    for _ in range(8):
        lookup.settle(0)
        pauses.append(steps_without_guess())
    assert pauses == [2, 4, 8, 16, 32, 64, 64, 64]
    lookup.settle(1)
    assert steps_without_guess() == 0
    lookup.settle(0)
    assert steps_without_guess() == 2


def run_to_the_end(engine: LLMEngine, requests: list[AddRequest]) -> tuple[dict[int, list[SequenceOutput]], int]:
    for request in requests:
        engine.add(request)
    outputs: dict[int, list[SequenceOutput]] = {request.request_id: [] for request in requests}
    steps = 0
    while engine.has_unfinished:
        steps += 1
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
    return outputs, steps


def told(outputs: list[SequenceOutput]) -> tuple[object, ...]:
    tokens = [token for output in outputs for token in output.token_ids]
    logprobs = [(e.token_id, e.logprob, tuple(e.top)) for output in outputs for e in output.logprobs or []]
    return tokens, logprobs, outputs[-1].finish_reason, outputs[-1].stop_token_id


def repetitive_requests(count: int) -> list[AddRequest]:
    """Prompts that repeat themselves; cold draws, which soon repeat too, and warm ones, which do not."""
    rng = random.Random(8)
    requests = []
    for request_id in range(count):
        phrase = [rng.randrange(200) for _ in range(rng.randrange(3, 9))]
        params = SamplingParams(
            max_tokens=rng.choice((1, 2, 30, 60)),
            temperature=rng.choice((0.0, 0.2, 1.0)),
            top_p=rng.choice((1.0, 0.9)),
            seed=request_id,
            logprobs=rng.choice((None, 3)),
            ignore_eos=rng.random() < 0.5,
            min_tokens=rng.choice((0, 1)),
        )
        requests.append(AddRequest(request_id, phrase * 4, params, 0.0))
    return requests


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_fewer_steps_give_the_same_tokens(checkpoint: Path, dtype: str) -> None:
    for request in repetitive_requests(12):
        guessing, plain = (make_engine(checkpoint, dtype, speculation=on) for on in (True, False))
        got, _ = run_to_the_end(guessing, [request])
        expected, _ = run_to_the_end(plain, [request])
        assert told(got[request.request_id]) == told(expected[request.request_id])
        assert guessing.stats().num_free_blocks == guessing.stats().num_blocks


@needs_kernels
def test_a_text_that_repeats_itself_takes_far_fewer_steps(checkpoint: Path) -> None:
    request = AddRequest(1, [5, 6, 7, 8] * 8, SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True), 0.0)
    engine = make_engine(checkpoint, "float32")
    outputs, steps = run_to_the_end(engine, [request])
    stats = engine.stats()
    assert sum(len(output.token_ids) for output in outputs[1]) == 100
    assert 0 < stats.spec_decode_num_accepted_tokens <= stats.spec_decode_num_draft_tokens
    assert stats.spec_decode_num_drafts > 0
    assert steps + stats.spec_decode_num_accepted_tokens == 100
    assert steps < 60


@needs_kernels
def test_guesses_beside_neighbours_and_preemptions_change_nothing(checkpoint: Path) -> None:
    requests = [
        replace_params(request, max_tokens=40)
        for request in (*mixed_requests(24)[:12], *shifted(repetitive_requests(12)))
    ]
    limits = {"kv_cache_memory": small_pool(checkpoint, "float32"), "max_num_seqs": 3}
    finished = run_under_load(make_engine(checkpoint, "float32", **limits), requests)
    for request in requests:
        if request.request_id in finished:
            plain = make_engine(checkpoint, "float32", speculation=False)
            tokens = told(run_to_the_end(plain, [request])[0][request.request_id])[0]
            assert finished[request.request_id][0] == tokens[: len(finished[request.request_id][0])]


def shifted(requests: list[AddRequest]) -> list[AddRequest]:
    return [AddRequest(request.request_id + 12, request.prompt_token_ids, request.params, 0.0) for request in requests]


def replace_params(request: AddRequest, **changes: int) -> AddRequest:
    params = replace(request.params, min_tokens=0, **changes)  # type: ignore[arg-type]
    return AddRequest(request.request_id, request.prompt_token_ids, params, 0.0)
