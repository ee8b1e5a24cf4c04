"""The engine against generate(): a request's tokens are the same under any load."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import load_config, load_model
from model.generate import CausalModel, GenerationOutput, generate
from model.packed_model import PackedModel
from model.sampling_params import SamplingParams
from server.engine.config import EngineConfig
from server.engine.launched_step import LaunchedStep
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest, SequenceOutput
from server.engine.scheduler import ScheduledBatch
from server.engine.sequence import InvalidSequenceError
from tests.engine.conftest import VOCAB_SIZE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
# Room for one full context of 160 tokens and little more, so that sequences preempt each other.
SMALL_POOL_BLOCKS = 22


def make_engine(folder: Path, dtype: str, **changes: object) -> LLMEngine:
    settings: dict[str, object] = {"max_num_seqs": 12, "max_num_batched_tokens": 48} | changes
    if dtype == "int8":
        dtype, settings["quantization"] = "bfloat16", "int8"
    return LLMEngine(EngineConfig(str(folder), "test", device="cpu", dtype=dtype, **settings))  # type: ignore[arg-type]


def small_pool(folder: Path, dtype: str) -> int:
    """Bytes of a cache with SMALL_POOL_BLOCKS blocks."""
    config = load_config(folder)
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * DTYPES[dtype].itemsize
    return SMALL_POOL_BLOCKS * 16 * per_token


def mixed_requests(count: int) -> list[AddRequest]:
    """Prompts of 1 to 90 tokens, half of them behind a shared prefix; every kind of sampling parameter."""
    rng = random.Random(5)
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
    requests = []
    for request_id in range(count):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 50))]
        params = SamplingParams(
            max_tokens=rng.randrange(1, 60),
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0, 1.6]),
            top_k=rng.choice([0, 0, 5, 50]),
            top_p=rng.choice([1.0, 0.9, 0.5]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.0, 0.6]),
            logit_bias={3: 4.0} if rng.random() < 0.2 else {},
            min_tokens=rng.choice([0, 1]),
            seed=rng.getrandbits(63),
            stop_token_ids=(11,) if rng.random() < 0.3 else (),
            ignore_eos=rng.random() < 0.3,
        )
        prompt = shared + own if rng.random() < 0.5 else own
        requests.append(AddRequest(request_id, prompt, params, time.monotonic()))
    return requests


def run_under_load(engine: LLMEngine, requests: list[AddRequest]) -> dict[int, tuple[list[int], str]]:
    """Send requests in bursts while earlier ones run, abort every ninth on the way; tokens and ends by request."""
    rng = random.Random(6)
    waiting = list(requests)
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    finished: dict[int, tuple[list[int], str]] = {}
    while waiting or engine.has_unfinished:
        for _ in range(rng.randrange(4)):
            if waiting:
                engine.add(waiting.pop(0))
        if rng.random() < 0.15:
            engine.abort(9 * rng.randrange(len(requests) // 9))
        for output in engine.step().outputs:
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                finished[output.request_id] = (tokens[output.request_id], output.finish_reason)
    return finished


def generate_alone(
    folder: Path, dtype: str, requests: list[AddRequest], *, same_kernels: bool = False
) -> dict[int, GenerationOutput]:
    """In float32 by torch's own operators; otherwise, where other roundings give other tokens, by the same kernels."""
    model: CausalModel = load_model(folder, dtype=DTYPES[dtype])
    if dtype != "float32" or same_kernels:
        model = PackedModel(model, "int8" if dtype == "int8" else "none")
    with torch.inference_mode():
        return {request.request_id: generate(model, request.prompt_token_ids, request.params) for request in requests}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_mixed_requests_under_load_equal_generate_alone(checkpoint: Path, dtype: str) -> None:
    requests = mixed_requests(64)
    engine = make_engine(checkpoint, dtype, kv_cache_memory=small_pool(checkpoint, dtype))
    finished = run_under_load(engine, requests)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert stats.num_free_blocks == stats.num_blocks
    assert 50 <= len(finished) < 64
    alone = generate_alone(checkpoint, dtype, requests)
    for request_id, (token_ids, finish_reason) in finished.items():
        assert token_ids == alone[request_id].token_ids, f"request {request_id}"
        assert finish_reason == alone[request_id].finish_reason


def test_greedy_tokens_equal_transformers(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(checkpoint)
    engine = make_engine(checkpoint, "float32")
    prompt = [5, 17, 3, 101, 44]
    engine.add(AddRequest(1, prompt, SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True), 0.0))
    tokens = drain(engine)[1]
    expected = reference.generate(
        torch.tensor([prompt]), max_new_tokens=30, min_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert tokens == expected[0, len(prompt) :].tolist()


def drain(engine: LLMEngine) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for output in drain_outputs(engine):
        tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


def drain_outputs(engine: LLMEngine) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    while engine.has_unfinished:
        outputs += engine.step().outputs
    return outputs


def test_logprobs_equal_generates(llama_checkpoint: Path) -> None:
    requests = [
        AddRequest(i, [9, 8, 7, i], SamplingParams(max_tokens=6, seed=i, logprobs=count), 0.0)
        for i, count in enumerate([None, 0, 3, 20])
    ]
    engine = make_engine(llama_checkpoint, "float32")
    for request in requests:
        engine.add(request)
    outputs = drain_outputs(engine)
    alone = generate_alone(llama_checkpoint, "float32", requests, same_kernels=True)
    for request in requests:
        got = [
            entry for output in outputs if output.request_id == request.request_id for entry in output.logprobs or []
        ]
        expected = alone[request.request_id].logprobs
        assert [(entry.logprob, tuple(entry.top)) for entry in got] == [(e.logprob, e.top) for e in expected or []]


def test_a_request_out_of_bounds_is_refused_and_harms_nobody(llama_checkpoint: Path) -> None:
    engine = make_engine(llama_checkpoint, "float32")
    engine.add(AddRequest(1, [1, 2, 3], SamplingParams(max_tokens=8, temperature=0.0), 0.0))
    for prompt, params in [
        ([VOCAB_SIZE], SamplingParams()),
        ([-1], SamplingParams()),
        ([], SamplingParams()),
        ([1] * 160, SamplingParams()),
        ([1] * 100, SamplingParams(max_tokens=100, logit_bias={VOCAB_SIZE: 1.0})),
    ]:
        with pytest.raises(InvalidSequenceError):
            engine.add(AddRequest(2, prompt, params, 0.0))
    assert len(drain(engine)[1]) <= 8
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("a bug")])
def test_a_step_that_fails_costs_only_the_request_that_fails_alone(
    error: Exception, llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = mixed_requests(6)
    expected = generate_alone(llama_checkpoint, "float32", requests)
    engine = make_engine(llama_checkpoint, "float32")
    for request in requests:
        engine.add(request)
    launch = engine.runner.launch

    def fail(batch: ScheduledBatch) -> LaunchedStep:
        if any(seq.request_id == 3 and seq.num_output_tokens == 2 for seq in batch.sequences):
            raise error
        return launch(batch)

    monkeypatch.setattr(engine.runner, "launch", fail)
    outputs = drain_outputs(engine)
    assert [output.request_id for output in outputs if output.finish_reason == "error"] == [3]
    for request in requests:
        if request.request_id != 3:
            got = [token for output in outputs if output.request_id == request.request_id for token in output.token_ids]
            assert got == expected[request.request_id].token_ids


def test_an_engine_in_which_nothing_works_gives_up(llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llama_checkpoint, "float32")

    def fail(batch: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine.runner, "launch", fail)
    for request_id in range(3):
        engine.add(AddRequest(request_id, [1, 2, 3], SamplingParams(max_tokens=8), 0.0))
        assert [output.finish_reason for output in engine.step().outputs] == ["error"]
    engine.add(AddRequest(9, [1, 2, 3], SamplingParams(max_tokens=8), 0.0))
    with pytest.raises(RuntimeError, match="a bug"):
        engine.step()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_end_their_request(
    temperature: float, llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama_checkpoint, "float32")
    logits_of = engine.runner.logits

    def spoil_second(hidden: Tensor) -> Tensor:
        logits = logits_of(hidden)
        logits[1:2] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "logits", spoil_second)
    for request_id in range(3):
        engine.add(AddRequest(request_id, [1, 2, 3], SamplingParams(max_tokens=1, temperature=temperature), 0.0))
    reasons = {output.request_id: output.finish_reason for output in drain_outputs(engine)}
    assert reasons == {0: "length", 1: "error", 2: "length"}


def test_a_passed_deadline_ends_a_request(llama_checkpoint: Path) -> None:
    engine = make_engine(llama_checkpoint, "float32")
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    engine.add(AddRequest(1, [1, 2], params, time.monotonic(), deadline=time.monotonic() - 1.0))
    engine.add(AddRequest(2, [1, 2], params, time.monotonic(), deadline=time.monotonic() + 600.0))
    reasons = {output.request_id: output.finish_reason for output in drain_outputs(engine) if output.finish_reason}
    assert reasons == {1: "deadline", 2: "length"}
