"""The start-up check: it passes an engine that keeps its rows apart, notices one that does not, and leaves nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from model.errors import ConfigError
from model.sampling_params import SamplingParams
from server.engine.client import AsyncEngine
from server.engine.config import EngineConfig
from server.engine.invariance import InvarianceCheck
from server.engine.llm_engine import LLMEngine
from server.engine.messages import NO, UNCHECKED, YES, AddRequest
from tests.engine.mixed_load import split_sums


def make_engine(folder: Path, **changes: object) -> LLMEngine:
    settings: dict[str, object] = {"dtype": "float32", "max_num_seqs": 8} | changes
    return LLMEngine(EngineConfig(str(folder), "test", device="cpu", **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_passes_and_keeps_no_block(checkpoint: Path, dtype: str) -> None:
    engine = make_engine(checkpoint, dtype=dtype)
    assert engine.info.deterministic == UNCHECKED
    steps = 1
    while not engine.advance_check():
        steps += 1
    assert engine.info.deterministic == YES
    assert 5 < steps < 20
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_steps == stats.prompt_tokens == 0


def test_sums_that_depend_on_the_number_of_rows_are_noticed(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    split_sums(engine, checkpoint)
    assert engine.invariance.run() == NO


def test_attention_that_depends_on_the_chunk_is_noticed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(checkpoint)
    forward = engine.runner.hidden_states

    def rounded(inputs: object) -> torch.Tensor:
        hidden = forward(inputs)  # type: ignore[arg-type]
        return hidden.bfloat16().float() if inputs.metadata.max_query_len == 1 else hidden  # type: ignore[attr-defined]

    monkeypatch.setattr(engine.runner, "hidden_states", rounded)
    assert engine.invariance.run() == NO


@pytest.mark.parametrize("limits", [{"max_num_seqs": 2}, {"max_num_batched_tokens": 40}])
def test_limits_too_small_leave_it_unchecked(llama_checkpoint: Path, limits: dict[str, int]) -> None:
    engine = make_engine(llama_checkpoint, **limits)
    assert engine.invariance.run() == UNCHECKED
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_a_check_that_was_dropped_begins_again(llama_checkpoint: Path) -> None:
    engine = make_engine(llama_checkpoint)
    for _ in range(3):
        assert not engine.advance_check()
    assert engine.stats().num_free_blocks < engine.stats().num_blocks
    engine.invariance.reset()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    engine.add(AddRequest(1, [1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True), 0.0))
    while engine.has_unfinished:
        engine.step()
    assert engine.invariance.run() == YES


def test_the_answer_reaches_the_clients_of_an_engine_process(llama_checkpoint: Path) -> None:
    async def main() -> None:
        engine = AsyncEngine(EngineConfig(str(llama_checkpoint), "test", device="cpu", dtype="float32"), 8)
        await engine.start()
        try:
            async with asyncio.timeout(60):
                await engine.wait_ready()
                stream = engine.submit([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
                assert sum([len(output.token_ids) async for output in stream]) == 5
                while engine.info is None or engine.info.deterministic == UNCHECKED:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)  # polling: no event tells of what another process reports
                assert engine.info.deterministic == YES
                assert engine.stats.num_free_blocks == engine.stats.num_blocks
        finally:
            await engine.close()

    asyncio.run(main())


def test_deterministic_is_checked_before_the_engine_is_ready(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, deterministic=True)
    assert engine.info.deterministic == YES
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_deterministic_is_refused_where_it_cannot_be_had(
    llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="cannot be checked: raise max_num_seqs"):
        make_engine(llama_checkpoint, deterministic=True, max_num_seqs=2)
    monkeypatch.setattr(InvarianceCheck, "advance", lambda self: NO)
    with pytest.raises(ConfigError, match="deterministic cannot be had here"):
        make_engine(llama_checkpoint, deterministic=True)
