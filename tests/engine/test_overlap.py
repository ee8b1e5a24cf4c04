"""Steps that are launched before the tokens of the one before are known: the same answers, and nothing left behind.

On the CPU, where a step is over when it has been launched, and the order of the host's work is that of a CUDA device.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.grammar import Grammar
from model.sampling_params import SamplingParams
from server.engine.launched_step import LaunchedStep, RunOutput
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest
from server.engine.model_runner import ModelRunner
from server.engine.scheduler import ScheduledBatch
from tests.engine import grammar_model
from tests.engine.conftest import MODELS, VOCAB_SIZE
from tests.engine.mixed_load import (
    Answers,
    cache_bytes,
    differing,
    make_engine,
    make_lively_checkpoint,
    mixed_requests,
    run_alone,
    run_under_load,
    together,
)

SMALL_POOL = 14


@pytest.fixture(scope="module", params=sorted(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_checkpoint(MODELS[request.param], tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def llama_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lively_checkpoint(MODELS["llama"], tmp_path_factory.mktemp("one") / "model")


def free_requests(count: int) -> list[AddRequest]:
    """None of them waits for its tokens."""
    return [
        AddRequest(
            request.request_id,
            request.prompt_token_ids,
            dataclasses.replace(request.params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0),
            0.0,
        )
        for request in mixed_requests(count, seed=11)
    ]


def prompt(number: int) -> list[int]:
    return [(31 * number + 7 * place) % VOCAB_SIZE for place in range(6)]


def watch(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What happens from now on: ("launch", n) and ("wait", n) of the n-th step from now."""
    events: list[tuple[str, int]] = []
    launch, wait = engine.runner.launch, LaunchedStep.wait
    numbers: dict[int, int] = {}
    kept: list[LaunchedStep] = []

    def launching(batch: ScheduledBatch) -> LaunchedStep:
        step = launch(batch)
        kept.append(step)  # so that no other gets its id
        numbers[id(step)] = len(numbers)
        events.append(("launch", numbers[id(step)]))
        return step

    def waiting(step: LaunchedStep) -> RunOutput:
        if id(step) in numbers:
            events.append(("wait", numbers[id(step)]))
        return wait(step)

    monkeypatch.setattr(engine.runner, "launch", launching)
    monkeypatch.setattr(LaunchedStep, "wait", waiting)
    return events


def lead(events: list[tuple[str, int]]) -> list[int]:
    """How many steps are under way when each is waited for, that one included."""
    return [sum(e == "launch" for e, _ in events[:place]) - n for place, (e, n) in enumerate(events) if e == "wait"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"max_num_batched_tokens": 32}, {"small_pool": True}])
def test_answers_are_those_of_each_request_alone(
    checkpoint: Path, precision: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = free_requests(40)
    alone = run_alone(make_engine(checkpoint, precision, prefix_caching=False), requests)
    changes = dict(changes)
    if changes.pop("small_pool", False):
        changes["kv_cache_memory"] = cache_bytes(make_engine(checkpoint, precision), SMALL_POOL)
    engine = make_engine(checkpoint, precision, overlap=True, **changes)
    events = watch(engine, monkeypatch)
    for seed in (1, 2):
        assert differing(run_under_load(engine, requests, seed, abort_share=0.02), alone) == []
    assert sum(each == 2 for each in lead(events)) > 0.9 * len(lead(events))
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_preemptions > 0 or "kv_cache_memory" not in changes
    assert stats.prefix_cache_hits > 0


def test_each_step_is_launched_before_the_one_before_is_waited_for(
    llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama_checkpoint, "float32", overlap=True)
    for number in range(3):
        engine.add(AddRequest(number, prompt(number), SamplingParams(max_tokens=5, ignore_eos=True), 0.0))
    events = watch(engine, monkeypatch)
    while engine.has_unfinished:
        engine.step()
    assert events == [
        ("launch", 0), ("launch", 1), ("wait", 0), ("launch", 2), ("wait", 1), ("launch", 3), ("wait", 2),
        ("launch", 4), ("wait", 3), ("wait", 4),
    ]  # fmt: skip


def test_without_it_each_step_is_waited_for_at_once(llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llama_checkpoint, "float32")
    engine.add(AddRequest(0, prompt(0), SamplingParams(max_tokens=5, ignore_eos=True), 0.0))
    events = watch(engine, monkeypatch)
    while engine.has_unfinished:
        engine.step()
    assert lead(events) == [1] * 5


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=6, ignore_eos=True, repetition_penalty=1.2),
        SamplingParams(max_tokens=6, ignore_eos=True, frequency_penalty=0.5, temperature=0.0),
    ],
)
def test_penalties_wait_for_the_tokens_that_they_count(
    params: SamplingParams, llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        AddRequest(0, prompt(0), SamplingParams(max_tokens=20, ignore_eos=True), 0.0),
        AddRequest(1, prompt(1), params, 0.0),
    ]
    alone = run_alone(make_engine(llama_checkpoint, "float32"), requests)
    engine = make_engine(llama_checkpoint, "float32", overlap=True)
    events = watch(engine, monkeypatch)
    assert together(engine, requests) == {key: answer.token_ids for key, answer in alone.items()}
    assert lead(events)[:5] == [1] * 5, "as long as the second request runs"
    assert set(lead(events)[7:-1]) == {2}


def test_grammars_wait_for_the_tokens_that_they_follow(tmp_path: Path) -> None:
    folder = grammar_model.make_model(tmp_path / "model")
    requests = [
        grammar_model.request(n, Grammar.regex("(red|green|blue)( (red|green))*") if n % 2 else None) for n in range(6)
    ]
    plain, ahead = (grammar_model.make_engine(folder, overlap=overlap) for overlap in (False, True))
    assert ahead.runner.runs_ahead
    assert grammar_model.run(ahead, requests) == grammar_model.run(plain, requests)


def test_a_sequence_that_has_ended_gets_nothing_of_the_step_too_many(
    llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = SamplingParams(max_tokens=30, seed=4, ignore_eos=True)
    alone = run_alone(make_engine(llama_checkpoint, "float32"), [AddRequest(0, prompt(0), drawn, 0.0)])[0].token_ids
    last = next(place for place, token in enumerate(alone) if place > 3 and token not in alone[:place])
    engine = make_engine(llama_checkpoint, "float32", overlap=True)
    events = watch(engine, monkeypatch)
    stopping = dataclasses.replace(drawn, stop_token_ids=(alone[last],))
    assert together(engine, [AddRequest(0, prompt(0), stopping, 0.0)]) == {0: alone[: last + 1]}
    assert sum(event == "launch" for event, _ in events) == last + 2, "one more than tokens"
    stats = engine.stats()
    assert stats.generation_tokens == last + 1
    assert stats.num_free_blocks == stats.num_blocks


def test_a_request_that_is_aborted_under_way_leaves_its_neighbours_alone(llama_checkpoint: Path) -> None:
    requests = [AddRequest(n, prompt(n), SamplingParams(max_tokens=20, ignore_eos=True, seed=n), 0.0) for n in range(3)]
    alone = run_alone(make_engine(llama_checkpoint, "float32"), requests)
    engine = make_engine(llama_checkpoint, "float32", overlap=True)
    for request in requests:
        engine.add(request)
    tokens: dict[int, list[int]] = {n: [] for n in range(3)}
    for step in range(100):
        if step == 5:
            engine.abort(1)
        for output in engine.step().outputs:
            tokens[output.request_id] += output.token_ids
    assert not engine.has_unfinished
    assert [tokens[0], tokens[2]] == [alone[0].token_ids, alone[2].token_ids]
    assert tokens[1] == alone[1].token_ids[: len(tokens[1])]
    assert len(tokens[1]) < 6


def test_logits_that_are_not_numbers_end_their_request_only(
    llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [AddRequest(n, prompt(n), SamplingParams(max_tokens=9, ignore_eos=True, seed=n), 0.0) for n in range(3)]
    alone = run_alone(make_engine(llama_checkpoint, "float32"), requests)
    engine = make_engine(llama_checkpoint, "float32", overlap=True)
    logits_of = engine.runner.logits
    steps = iter(range(100))

    def spoil(hidden: Tensor) -> Tensor:
        logits = logits_of(hidden)
        if next(steps) == 3:
            logits[1:2] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "logits", spoil)
    assert together(engine, requests) == {
        0: alone[0].token_ids, 1: alone[1].token_ids[:3], 2: alone[2].token_ids
    }  # fmt: skip


def test_a_step_that_fails_while_another_is_under_way(llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = free_requests(8)
    alone = run_alone(make_engine(llama_checkpoint, "float32"), requests)
    engine = make_engine(llama_checkpoint, "float32", overlap=True)
    launch = engine.runner.launch

    def fail(batch: ScheduledBatch) -> LaunchedStep:
        if any(seq.request_id == 3 and seq.num_output_tokens + seq.num_pending == 2 for seq in batch.sequences):
            raise torch.OutOfMemoryError("out of memory")
        return launch(batch)

    monkeypatch.setattr(engine.runner, "launch", fail)
    answers: Answers = run_under_load(engine, requests, seed=4)
    assert [n for n, answer in answers.items() if answer.finish_reason == "error"] == [3]
    assert answers[3].token_ids == alone[3].token_ids[:2]
    del answers[3]
    assert differing(answers, alone) == []


def test_nothing_is_guessed_where_the_tokens_before_are_not_known(llama_checkpoint: Path) -> None:
    engine = make_engine(llama_checkpoint, "float32", overlap=True, speculation=True)
    engine.add(AddRequest(0, [5, 6, 7] * 8, SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True), 0.0))
    while engine.has_unfinished:
        engine.step()
    assert engine.stats().spec_decode_num_drafts == 0


@pytest.mark.parametrize(("overlap", "device", "expected"), [
    (None, "cuda", True), (None, "cpu", False), (True, "cpu", True), (False, "cuda", False),
])  # fmt: skip
def test_it_is_what_a_device_of_its_own_is_good_for(
    overlap: bool | None, device: str, expected: bool, llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_engine(llama_checkpoint, "float32", overlap=overlap).runner
    monkeypatch.setattr(runner, "device", torch.device(device))
    assert ModelRunner.runs_ahead.fget(runner) is expected  # type: ignore[attr-defined]
