"""Explanations out of the engine: they tell of the very distributions that the tokens were drawn from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from model.sampling_params import SamplingParams
from server.engine.config import EngineConfig
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest, Explain, SequenceOutput, TokenExplanation

PROMPT = [5, 6, 7, 8, 9, 10, 11]
REQUESTS = [
    SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=3),
    SamplingParams(max_tokens=20, temperature=0.7, top_k=40, top_p=0.8, min_p=0.02, seed=3, logprobs=3),
    SamplingParams(
        max_tokens=20, min_tokens=20, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, seed=11,
        logit_bias={9: 4.0, 30: -100.0}, logprobs=3,
    ),
    SamplingParams(max_tokens=20, temperature=1.6, top_p=0.99, seed=5, ignore_eos=True, logprobs=3),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine(llama_checkpoint: Path) -> LLMEngine:
    return LLMEngine(EngineConfig(str(llama_checkpoint), "test", device="cpu", dtype="bfloat16", num_threads=1))


def run(engine: LLMEngine, requests: list[AddRequest]) -> dict[int, list[SequenceOutput]]:
    for request in requests:
        engine.add(request)
    outputs: dict[int, list[SequenceOutput]] = {request.request_id: [] for request in requests}
    while engine.has_unfinished:
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
    return outputs


def explanation(number: int, tokens: list[int], params: SamplingParams, start: int, num_top: int = 4) -> AddRequest:
    return AddRequest(
        number, PROMPT + tokens, SamplingParams(max_tokens=0), 0.0, prompt_logprobs=0,
        prompt_logprobs_start=len(PROMPT) + start, explain=Explain(params, PROMPT[0], len(PROMPT), num_top),
    )  # fmt: skip


def told(outputs: list[SequenceOutput]) -> list[TokenExplanation]:
    return [entry for output in outputs for entry in output.explained or ()]


def test_every_drawn_token_is_found_again(engine: LLMEngine) -> None:
    """Explained together, beside a text that is being written: what the seed draws from the explained distribution is
    what was generated, and its probability the one that the log-probabilities tell."""
    generated = run(engine, [AddRequest(i, PROMPT, params, 0.0) for i, params in enumerate(REQUESTS)])
    tokens = {i: [token for output in outputs for token in output.token_ids] for i, outputs in generated.items()}
    requests = [explanation(10 + i, tokens[i], params, 0) for i, params in enumerate(REQUESTS)]
    answers = run(engine, [*requests, AddRequest(99, PROMPT, REQUESTS[0], 0.0)])
    for i, params in enumerate(REQUESTS):
        found = told(answers[10 + i])
        assert [each.token_id for each in found] == tokens[i]
        assert [each.drawn_id for each in found] == tokens[i], params
        logprobs = [entry for output in generated[i] for entry in output.logprobs or ()]
        for each, logprob in zip(found, logprobs, strict=True):
            chosen = next(one for one in each.alternatives if one.token_id == each.token_id)
            assert chosen.probability == pytest.approx(math.exp(logprob.logprob), rel=1e-4)
            assert chosen.final_probability > 0
            raw = {one.token_id for one in each.alternatives}
            assert {token_id for token_id, _ in logprob.top} <= raw, "the best of the raw distribution are told of"


def test_a_part_of_a_text_is_explained_as_in_the_whole(engine: LLMEngine) -> None:
    params = REQUESTS[2]
    tokens = [t for output in run(engine, [AddRequest(0, PROMPT, params, 0.0)])[0] for t in output.token_ids]
    whole = told(run(engine, [explanation(1, tokens, params, 0)])[1])
    part = told(run(engine, [explanation(2, tokens[:13], params, 9)])[2])
    assert part == whole[9:13]
    assert {effect.name for effect in part[0].filters} == {"logit_bias", "penalties", "min_tokens"}


def test_tokens_that_were_not_drawn_are_told_apart(engine: LLMEngine) -> None:
    params = REQUESTS[1]
    tokens = [t for output in run(engine, [AddRequest(0, PROMPT, params, 0.0)])[0] for t in output.token_ids]
    other = (tokens[4] + 1) % 200
    found = told(run(engine, [explanation(1, [*tokens[:4], other], params, 4)])[1])
    assert [(each.token_id, each.drawn_id) for each in found] == [(other, tokens[4])]


def test_nobody_else_gets_one(engine: LLMEngine) -> None:
    request = AddRequest(0, PROMPT, SamplingParams(max_tokens=0), 0.0, prompt_logprobs=0)
    outputs = run(engine, [request, AddRequest(1, PROMPT, REQUESTS[0], 0.0)])
    assert all(output.explained is None for each in outputs.values() for output in each)
