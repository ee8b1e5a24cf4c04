"""What the engine tells of a request: timings with its first token, and what it met where that is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from model.sampling_params import SamplingParams
from server.engine.config import EngineConfig
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest, RequestTrace, SequenceOutput

REPEATED = [5, 6, 7, 8, 9] * 6


def run(config: EngineConfig) -> tuple[LLMEngine, dict[int, list[SequenceOutput]]]:
    """Three requests, the last of which comes when the others have begun."""
    engine = LLMEngine(config)
    outputs: dict[int, list[SequenceOutput]] = {0: [], 1: [], 2: []}
    for number in (0, 1):
        params = SamplingParams(max_tokens=12 + number, temperature=0.0, ignore_eos=True)
        engine.add(AddRequest(number, REPEATED[number:], params, 0.5))
    for step in range(200):
        if step == 4:
            engine.add(AddRequest(2, [3, 4], SamplingParams(max_tokens=3, seed=1, ignore_eos=True), 0.5))
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
    return engine, outputs


def test_what_is_counted_adds_up(llama_checkpoint: Path) -> None:
    config = EngineConfig(
        str(llama_checkpoint), "test", device="cpu", dtype="bfloat16", num_threads=1, trace_requests=True
    )
    engine, outputs = run(config)
    traces: list[RequestTrace] = []
    for number, found in outputs.items():
        assert all(output.trace is not None and output.timings is not None for output in found)
        trace = found[-1].trace
        assert trace is not None
        traces.append(trace)
        num_tokens = sum(len(output.token_ids) for output in found)
        assert num_tokens == (12, 13, 3)[number]
        assert trace.num_steps == num_tokens - trace.num_accepted_tokens, (
            "a step gives a token, and those guessed right"
        )
        assert 1 <= trace.min_batch_size <= trace.sum_batch_sizes / trace.num_steps <= trace.max_batch_size <= 3
    assert traces[2].max_batch_size == 3
    stats = engine.stats()
    assert sum(trace.num_draft_tokens for trace in traces) == stats.spec_decode_num_draft_tokens
    assert sum(trace.num_accepted_tokens for trace in traces) == stats.spec_decode_num_accepted_tokens


def test_timings_come_with_the_first_token_and_with_the_last(llama_checkpoint: Path) -> None:
    """A stop string ends a request without the engine's knowledge: by then its time in the queue is known."""
    config = EngineConfig(str(llama_checkpoint), "test", device="cpu", dtype="bfloat16", num_threads=1)
    for found in run(replace(config, speculation=False))[1].values():
        assert all(output.trace is None for output in found)
        assert [output.timings is not None for output in found] == [True, *[False] * (len(found) - 2), True]
        first, last = found[0].timings, found[-1].timings
        assert first is not None
        assert last is not None
        assert 0.5 == first.arrival < first.first_scheduled < first.first_token
        assert first.finished == 0.0 < last.finished
        assert (last.first_scheduled, last.first_token) == (first.first_scheduled, first.first_token)
