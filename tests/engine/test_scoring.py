"""Prompts' log-probabilities: against transformers, in bounded memory, beside sequences that decode."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from model.sampling_params import SamplingParams
from server.engine import prompt_scoring
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest, EngineInput, SequenceOutput, StepOutput, TokenLogprobs
from server.engine.sequence import InvalidSequenceError
from tests.engine.conftest import VOCAB_SIZE
from tests.engine.test_llm_engine import drain_outputs, make_engine, small_pool

SCORE_ONLY = SamplingParams(max_tokens=0)
CONTEXT = 160


def random_ids(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(count)]


def score(request_id: int, ids: list[int], num_top: int = 0, start: int = 1, **changes: object) -> AddRequest:
    request = AddRequest(request_id, ids, SCORE_ONLY, 0.0, prompt_logprobs=num_top, prompt_logprobs_start=start)
    return msgspec.structs.replace(request, **changes)


def joined(outputs: list[SequenceOutput], request_id: int) -> list[TokenLogprobs]:
    return [entry for each in outputs if each.request_id == request_id for entry in each.prompt_logprobs or ()]


def run(engine: LLMEngine, *requests: AddRequest) -> list[SequenceOutput]:
    for request in requests:
        engine.add(request)
    return drain_outputs(engine)


def expected_logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """[len(ids) - 1, V]: row i is transformers' distribution of token i + 1."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])[:, :-1]).logits[0].log_softmax(-1)


def check(found: list[TokenLogprobs], expected: torch.Tensor, ids: list[int], num_top: int, start: int = 1) -> None:
    assert [entry.token_id for entry in found] == ids[start:]
    for row, entry in enumerate(found, start=start - 1):
        assert entry.logprob == pytest.approx(expected[row, ids[row + 1]].item(), abs=1e-4)
        best = expected[row].topk(num_top).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best, abs=1e-4)
        assert all(value == pytest.approx(expected[row, each].item(), abs=1e-4) for each, value in entry.top)


@pytest.mark.parametrize("length", [2, 3, 49, 97, CONTEXT, CONTEXT + 1])
def test_scores_equal_transformers(checkpoint: Path, length: int) -> None:
    """In chunks of 48 tokens; the longest has its last prediction at the context's last position."""
    ids = random_ids(length)
    engine = make_engine(checkpoint, "float32")
    outputs = run(engine, score(1, ids, 5))
    check(joined(outputs, 1), expected_logprobs(checkpoint, ids), ids, 5)
    assert all(output.token_ids == [] for output in outputs)
    assert [output.finish_reason for output in outputs if output.finish_reason] == ["length"]
    assert outputs[-1].timings is not None
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert (engine.stats().prompt_tokens, engine.stats().generation_tokens) == (length - 1, 0)


def test_a_prompt_of_one_token_has_nothing_to_tell(llama_checkpoint: Path) -> None:
    outputs = run(make_engine(llama_checkpoint, "float32"), score(1, [5], 3))
    assert [(output.finish_reason, output.prompt_logprobs) for output in outputs] == [("length", None)]


def test_echo_scores_and_generates_what_it_would_without(checkpoint: Path) -> None:
    ids = random_ids(100)
    params = SamplingParams(max_tokens=12, seed=4, logprobs=2, ignore_eos=True)
    plain = run(make_engine(checkpoint, "float32"), AddRequest(1, ids, params, 0.0))
    echoed = run(make_engine(checkpoint, "float32"), AddRequest(1, ids, params, 0.0, prompt_logprobs=3))
    assert [t for o in echoed for t in o.token_ids] == [t for o in plain for t in o.token_ids]
    assert [e for o in echoed for e in o.logprobs or ()] == [e for o in plain for e in o.logprobs or ()]
    check(joined(echoed, 1), expected_logprobs(checkpoint, ids), ids, 3)
    first_token = next(index for index, output in enumerate(echoed) if output.token_ids)
    assert all(output.prompt_logprobs is None for output in echoed[first_token + 1 :])


def test_a_later_start_leaves_the_earlier_tokens_out(llama_checkpoint: Path) -> None:
    ids = random_ids(120)
    engine = make_engine(llama_checkpoint, "float32")
    expected = expected_logprobs(llama_checkpoint, ids)
    for start in (1, 2, 70, 119, 120, 500):
        check(joined(run(engine, score(1, ids, start=start)), 1), expected, ids, 0, start)


def test_logits_exist_for_few_rows_at_a_time(llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_scoring, "MAX_ROWS", 10)
    engine = make_engine(llama_checkpoint, "float32", max_num_batched_tokens=100)
    rows: list[int] = []
    compute = engine.runner.logits

    def count(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return compute(hidden)

    monkeypatch.setattr(engine.runner, "logits", count)
    first, second = random_ids(130, 1), random_ids(130, 2)
    outputs = run(engine, score(1, first, 20), score(2, second))
    assert max(rows) == 10
    assert sum(rows) == 2 * 129
    check(joined(outputs, 1), expected_logprobs(llama_checkpoint, first), first, 20)
    check(joined(outputs, 2), expected_logprobs(llama_checkpoint, second), second, 0)


def neighbours() -> list[AddRequest]:
    kinds = [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 9, "logprobs": 2}, {"repetition_penalty": 1.3}]
    params = [SamplingParams(max_tokens=40, seed=number, **kinds[number % 4]) for number in range(8)]
    return [AddRequest(number, random_ids(5 + 3 * number, number), params[number], 0.0) for number in range(8)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neighbours_get_the_same_tokens_and_a_token_in_every_step(checkpoint: Path, dtype: str) -> None:
    """Scores come in while eight sequences decode; the small pool makes them preempt each other."""
    alone = run(make_engine(checkpoint, dtype), *neighbours())
    engine = make_engine(checkpoint, dtype, kv_cache_memory=2 * small_pool(checkpoint, dtype))
    for request in neighbours():
        engine.add(request)
    outputs = engine.step().outputs
    texts = {100 + number: random_ids(CONTEXT - number, 50 + number) for number in range(8)}
    waiting = [score(request_id, ids, request_id % 3) for request_id, ids in texts.items()]
    while engine.has_unfinished or waiting:
        if waiting:
            engine.add(waiting.pop())
        running = {seq.request_id for seq in engine.scheduler.running if seq.num_output_tokens}
        step = engine.step()
        assert step.step_tokens <= engine.scheduler.max_num_batched_tokens
        kept = {seq.request_id for seq in engine.scheduler.running} & running
        assert kept <= {output.request_id for output in step.outputs if output.token_ids}
        outputs += step.outputs
    for request in neighbours():
        mine = [output for output in outputs if output.request_id == request.request_id]
        theirs = [output for output in alone if output.request_id == request.request_id]
        assert [t for o in mine for t in o.token_ids] == [t for o in theirs for t in o.token_ids]
        assert [e for o in mine for e in o.logprobs or ()] == [e for o in theirs for e in o.logprobs or ()]
    again = make_engine(checkpoint, dtype)
    for request_id, ids in texts.items():
        found = joined(outputs, request_id)
        assert [entry.token_id for entry in found] == ids[1:]
        # The same to the bit as alone, in an engine with other chunks.
        assert found == joined(run(again, score(request_id, ids, request_id % 3)), request_id)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


@pytest.mark.parametrize("max_tokens", [0, 20])
def test_a_preempted_score_tells_each_token_once(llama_checkpoint: Path, max_tokens: int) -> None:
    """Older sequences grow until they take the blocks of the scored one."""
    pool = small_pool(llama_checkpoint, "float32")
    engine = make_engine(
        llama_checkpoint, "float32", kv_cache_memory=pool, max_num_seqs=5, max_num_batched_tokens=6
    )  # fmt: skip
    params = SamplingParams(max_tokens=140, ignore_eos=True)
    growing = [AddRequest(number, random_ids(6, number), params, 0.0) for number in range(4)]
    ids = random_ids(130, 9)
    scored = score(7, ids, 1, params=SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    outputs = run(engine, *growing, scored)
    timings = [each.timings for each in outputs if each.request_id == 7 and each.finish_reason is not None]
    assert [each is not None and each.num_preemptions > 0 for each in timings] == [True]
    check(joined(outputs, 7), expected_logprobs(llama_checkpoint, ids), ids, 1)
    assert sum(len(output.token_ids) for output in outputs if output.request_id == 7) == max_tokens


def test_cached_blocks_serve_no_row_that_is_scored(llama_checkpoint: Path) -> None:
    ids = random_ids(100)
    engine = make_engine(llama_checkpoint, "float32")
    run(engine, AddRequest(1, ids, SamplingParams(max_tokens=2, ignore_eos=True), 0.0))
    expected = expected_logprobs(llama_checkpoint, ids)
    outputs = run(engine, score(2, ids))
    check(joined(outputs, 2), expected, ids, 0)
    assert outputs[-1].cached_tokens == 0
    outputs = run(engine, score(3, ids, start=50))  # the rows before the first one wanted may come from the cache
    check(joined(outputs, 3), expected, ids, 0, 50)
    assert outputs[-1].cached_tokens == 48
    assert engine.stats().prefix_cache_queries == 100 + 0 + 49


def test_what_is_only_scored_leaves_the_prefix_cache_alone(llama_checkpoint: Path) -> None:
    engine = make_engine(llama_checkpoint, "float32")
    shared = random_ids(64)
    run(engine, AddRequest(1, shared, SamplingParams(max_tokens=1), 0.0))
    cached = engine.block_manager.num_cached_blocks
    run(engine, *(score(10 + number, random_ids(150, number)) for number in range(12)))
    assert engine.block_manager.num_cached_blocks == cached
    run(engine, AddRequest(2, random_ids(64, 3), SamplingParams(max_tokens=1), 0.0, prompt_logprobs=0))
    assert engine.block_manager.num_cached_blocks == cached + 4  # what is continued as well is worth keeping


def test_an_abort_in_the_middle_frees_the_blocks(llama_checkpoint: Path) -> None:
    engine = make_engine(llama_checkpoint, "float32", max_num_batched_tokens=16)
    engine.add(score(1, random_ids(150)))
    engine.add(score(2, random_ids(20, 2)))
    output = engine.step().outputs[0]
    assert (len(output.prompt_logprobs or ()), output.finish_reason) == (16, None)
    assert engine.stats().num_free_blocks < engine.stats().num_blocks
    engine.abort(1)
    outputs = drain_outputs(engine)
    assert {output.request_id for output in outputs} == {2}
    assert len(joined(outputs, 2)) == 19
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_a_passed_deadline_ends_a_score(llama_checkpoint: Path) -> None:
    engine = make_engine(llama_checkpoint, "float32")
    outputs = run(engine, score(1, random_ids(150), deadline=1e-9))
    assert [(output.finish_reason, output.prompt_logprobs) for output in outputs] == [("deadline", None)]


def test_what_cannot_be_scored_is_refused(llama_checkpoint: Path) -> None:
    engine = make_engine(llama_checkpoint, "float32")
    for request, words in [
        (score(1, []), "at least one token"),
        (score(1, random_ids(CONTEXT + 2)), "162 tokens"),
        (score(1, [1, VOCAB_SIZE]), "token id outside"),
        (score(1, [1, 2], -1), "prompt_logprobs must lie"),
        (score(1, [1, 2], 21), "prompt_logprobs must lie"),
        (score(1, [1, 2], start=0), "prompt_logprobs_start must be at least 1"),
        (AddRequest(1, [1, 2], SCORE_ONLY, 0.0), "max_tokens must be at least 1"),
        (AddRequest(1, random_ids(CONTEXT), SamplingParams(), 0.0, prompt_logprobs=0), "leaves no room"),
    ]:
        with pytest.raises(InvalidSequenceError, match=words):
            engine.add(request)
    assert not engine.has_unfinished


def test_requests_and_outputs_cross_the_process_boundary(llama_checkpoint: Path) -> None:
    request = score(1, random_ids(30), 2, 7)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=EngineInput)
    assert sent == request
    engine = make_engine(llama_checkpoint, "float32")
    engine.add(request)
    output = engine.step()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=StepOutput) == output
    assert len(joined(output.outputs, 1)) == 23
