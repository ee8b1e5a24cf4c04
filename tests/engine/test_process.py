"""The engine's process behind AsyncEngine: a real child process on a small checkpoint."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import torch

from model.checkpoint import load_model
from model.errors import ConfigError
from model.generate import generate
from model.packed_model import pack_model
from model.sampling_params import SamplingParams
from server.engine.channel import FrameSplitter, frame
from server.engine.client import AsyncEngine
from server.engine.config import EngineConfig
from server.engine.environment import engine_environment
from server.engine.interface import EngineRequestError, EngineUnavailableError, QueueFullError
from server.engine.llm_engine import LLMEngine
from server.engine.messages import EngineInfo, EngineStats, SequenceOutput, StepOutput

# A child imports torch before it answers, on machines that may be busy.
PATIENCE = 60.0


def run(folder: Path, scenario: Callable[[AsyncEngine], Awaitable[None]], *, max_queued: int = 64) -> None:
    """Start an engine on the folder, run the scenario, close."""

    async def main() -> None:
        engine = AsyncEngine(EngineConfig(str(folder), "test", device="cpu", dtype="float32"), max_queued)
        await engine.start()
        try:
            async with asyncio.timeout(PATIENCE):
                await scenario(engine)
        finally:
            await engine.close()
        assert engine.state == "dead"

    asyncio.run(main())


async def collect(engine: AsyncEngine, prompt: list[int], params: SamplingParams) -> list[int]:
    return [token_id async for output in engine.submit(prompt, params) for token_id in output.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    # Polling: what is awaited are numbers that another process reports, and no event tells of them.
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def test_concurrent_requests_equal_generate(llama_checkpoint: Path) -> None:
    requests = [([1 + i, 2, 3], SamplingParams(max_tokens=12, seed=i, temperature=0.9)) for i in range(8)]

    async def scenario(engine: AsyncEngine) -> None:
        await engine.wait_ready()
        results = await asyncio.gather(*(collect(engine, prompt, params) for prompt, params in requests))
        model = pack_model(load_model(llama_checkpoint, dtype=torch.float32))
        with torch.inference_mode():
            assert results == [generate(model, prompt, params).token_ids for prompt, params in requests]
        assert engine.info is not None
        assert engine.info.models[0].weights_digest.startswith("sha256:")
        assert engine.stats.generation_tokens == sum(map(len, results))

    run(llama_checkpoint, scenario)


def test_an_aborted_request_frees_its_blocks(llama_checkpoint: Path) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        await engine.wait_ready()
        stream = engine.submit([1, 2], SamplingParams(max_tokens=150, ignore_eos=True))
        await anext(stream)
        stream.abort()
        stream.abort()
        await until(lambda: engine.stats.num_free_blocks == engine.stats.num_blocks)
        assert engine.stats.num_running == 0
        assert [output async for output in stream] == []

    run(llama_checkpoint, scenario)


def test_a_request_that_the_engine_refuses_fails_alone(llama_checkpoint: Path) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        await engine.wait_ready()
        good = asyncio.ensure_future(collect(engine, [1, 2], SamplingParams(max_tokens=9, ignore_eos=True)))
        with pytest.raises(EngineRequestError):
            await collect(engine, [10**6], SamplingParams())
        assert len(await good) == 9

    run(llama_checkpoint, scenario)


def test_requests_before_readiness_and_beyond_the_queue_are_turned_away(llama_checkpoint: Path) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        with pytest.raises(EngineUnavailableError):
            engine.submit([1], SamplingParams())
        await engine.wait_ready()
        assert engine.info is not None
        streams = [
            engine.submit([1], SamplingParams(max_tokens=100, ignore_eos=True))
            for _ in range(engine.info.max_num_seqs + 3)
        ]
        with pytest.raises(QueueFullError) as refusal:
            engine.submit([1], SamplingParams())
        assert 1 <= refusal.value.retry_after <= 60
        for stream in streams:
            stream.abort()
        assert len(await collect(engine, [1], SamplingParams(max_tokens=3, ignore_eos=True))) == 3

    run(llama_checkpoint, scenario, max_queued=3)


def test_a_rate_from_idle_times_predicts_no_queue(llama_checkpoint: Path) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        await engine.wait_ready()
        assert engine.info is not None
        for _ in range(3):
            await collect(engine, [1], SamplingParams(max_tokens=1))
            await asyncio.sleep(0.2)  # idle, and not because the engine is slow
        streams = [engine.submit([1], SamplingParams(max_tokens=50)) for _ in range(engine.info.max_num_seqs + 10)]
        streams.append(engine.submit([1], SamplingParams(max_tokens=1), time.monotonic() + 1.5))
        for stream in streams:
            stream.abort()

    run(llama_checkpoint, scenario)


def test_requests_that_are_ended_from_outside_count_in_the_rate() -> None:
    def tell(message: EngineInfo | StepOutput) -> None:
        engine.data_received(frame(msgspec.msgpack.encode(message)))

    engine = AsyncEngine(EngineConfig("folder", "test"), 99)
    tell(EngineInfo([], "cpu", "cpu", "float32", "torch", 16, 8, 2, 64, 64, "2", 0.0))
    streams = [engine.submit([1], SamplingParams()) for _ in range(12)]
    for stream in streams[:3]:  # as a stop string does
        tell(StepOutput([SequenceOutput(stream.request_id, [1])], EngineStats()))
        time.sleep(0.05)
        stream.abort()
    streams[-1].abort()  # it never ran, and frees no seat
    engine.submit([1], SamplingParams(), time.monotonic() + 9)
    with pytest.raises(QueueFullError):
        engine.submit([1], SamplingParams(), time.monotonic() + 0.2)


@pytest.mark.parametrize(("number", "words"), [(signal.SIGSEGV, "by SIGSEGV"), (40, "by signal 40")])
def test_any_manner_of_death_is_put_in_words(number: int, words: str) -> None:
    engine = AsyncEngine(EngineConfig("folder", "test"), 1)
    engine._process = subprocess.Popen(["sleep", "60"])
    engine._process.send_signal(number)
    engine._process.wait()
    engine.connection_lost(None)
    assert engine.state == "dead"
    assert words in (engine.fault or "")


def test_a_killed_engine_ends_its_streams_with_an_error(llama_checkpoint: Path) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        await engine.wait_ready()
        stream = engine.submit([1, 2], SamplingParams(max_tokens=150, ignore_eos=True))
        await anext(stream)
        assert engine._process is not None
        os.kill(engine._process.pid, signal.SIGKILL)
        with pytest.raises(EngineRequestError):
            async for _ in stream:
                pass
        assert engine.state == "dead"
        assert engine.fault is not None
        assert "SIGKILL" in engine.fault
        with pytest.raises(EngineUnavailableError):
            engine.submit([1], SamplingParams())

    run(llama_checkpoint, scenario)


def test_more_cache_than_memory_is_a_users_error(llama_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_memory"):
        LLMEngine(EngineConfig(str(llama_checkpoint), "test", device="cpu", kv_cache_memory=2**50))


def test_a_folder_without_weights_is_a_users_error(tmp_path: Path) -> None:
    async def scenario(engine: AsyncEngine) -> None:
        with pytest.raises(EngineUnavailableError):
            await engine.wait_ready()
        assert engine.fault is not None
        assert "config.json" in engine.fault

    run(tmp_path, scenario)


def test_the_client_imports_no_torch() -> None:
    code = "import sys, server.engine.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE).returncode == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_frames_survive_any_cut(size: int) -> None:
    messages = [b"", b"a", b"bc" * 300, bytes(range(256))]
    stream = b"".join(frame(message) for message in messages)
    splitter = FrameSplitter()
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert [bytes(message) for piece in pieces for message in splitter.feed(piece)] == messages


def test_the_engines_environment_keeps_what_the_operator_set() -> None:
    plain = engine_environment({"A": "b"})
    assert plain == {
        "A": "b",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "THP_MEM_ALLOC_ENABLE": "1",
        "GOMP_SPINCOUNT": "10000",
    }
    assert engine_environment(plain) == plain
    chosen = {
        "GLIBC_TUNABLES": "glibc.malloc.arena_max=1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "THP_MEM_ALLOC_ENABLE": "0",
    }
    assert engine_environment(chosen) == chosen | {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"}
