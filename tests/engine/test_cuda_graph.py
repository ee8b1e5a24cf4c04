"""CUDA graphs: the padded steps are checked on the CPU, the captured ones against generate() on a device (`gpu`)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence as List
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import load_model
from model.generate import generate
from model.sampling import SamplingRow
from model.sampling.draw import seed_state
from model.sampling_params import SamplingParams
from server.engine.config import EngineConfig
from server.engine.cuda_graph import graph_sizes
from server.engine.decode_buffers import DecodeBuffers, DeviceStep
from server.engine.drawn_tokens import DrawnTokens, PendingTokens
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest
from server.engine.scheduler import ScheduledBatch
from server.engine.sequence import Sequence
from server.engine.step_inputs import DecodeArrays, InputBuilder
from server.engine.transfer import HostCopy, HostToDevice
from tests.engine.conftest import VOCAB_SIZE
from tests.engine.mixed_load import differing, mixed_requests, run_under_load, together
from tests.engine.uncaptured import UncapturedGraphs

ROOT = Path(__file__).parents[2]


class EagerReplays(UncapturedGraphs):
    """The sampler draws where the kernel would, by the parameters that lie in the buffers."""

    def _draw(self, size: int, step: DeviceStep) -> None:
        tensors = (getattr(step.parameters, name) for name in ("temperature", "top_k", "top_p", "min_p"))
        rows = zip(*(tensor.tolist() for tensor in tensors), strict=True)
        params = [SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in rows]
        batch = self._runner.sampler.build_batch([SamplingRow(each) for each in params])
        states = step.parameters.states[step.parameters.temperature > 0]
        if batch.random is not None:
            batch = replace(batch, random=replace(batch.random, states=states))
        drawn = self._runner.sampler.sample(self._logits[:size], batch, step.inputs.sample_positions)
        self._runner.drawn.ids[:size] = drawn.token_ids


def make_engine(folder: Path, device: str, **changes: object) -> LLMEngine:
    settings: dict[str, object] = {"max_num_seqs": 12, "max_num_batched_tokens": 48} | changes
    return LLMEngine(EngineConfig(str(folder), "test", device=device, dtype="float32", **settings))  # type: ignore[arg-type]


def greedy_requests() -> list[AddRequest]:
    """Twelve prompts that end at different times, one of which is a block's length: many batch sizes."""
    rng = np.random.default_rng(2)
    lengths = [1, 16, 17, 40, 5, 9, 33, 2, 15, 60, 7, 21]
    return [
        AddRequest(
            i,
            rng.integers(0, VOCAB_SIZE, length).tolist(),
            SamplingParams(max_tokens=4 + 3 * i, temperature=0.0, ignore_eos=True),
            0.0,
        )
        for i, length in enumerate(lengths)
    ]


def generate_alone(folder: Path, requests: list[AddRequest]) -> dict[int, list[int]]:
    model = load_model(folder, dtype=torch.float32)
    with torch.inference_mode():
        return {r.request_id: generate(model, r.prompt_token_ids, r.params).token_ids for r in requests}


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 12, 17, 64, 100, 256, 512])
def test_graph_sizes_leave_little_to_fill_up(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for rows in range(1, max_num_seqs + 1):
        filled = next(size for size in sizes if size >= rows) - rows
        assert filled < max(rows, 1)
        assert rows <= 16 or filled <= rows // 2


def test_sizes_end_where_launching_no_longer_matters() -> None:
    assert graph_sizes(10_000)[-1] == 512


def replaying(engine: LLMEngine) -> EagerReplays:
    """The graphs of an engine on the CPU."""
    graphs = EagerReplays(engine.runner)
    engine.runner._graphs = graphs
    return graphs


@pytest.mark.parametrize("overlap", [False, True])
def test_filled_up_steps_give_the_tokens_of_generate(llama_checkpoint: Path, overlap: bool) -> None:
    engine = make_engine(llama_checkpoint, "cpu", attention_backend="torch", overlap=overlap)
    graphs = replaying(engine)
    requests = greedy_requests()
    assert together(engine, requests) == generate_alone(llama_checkpoint, requests)
    assert set(graphs.replayed) == {1, 2, 4, 8, 12}


@pytest.mark.parametrize("overlap", [False, True])
def test_graphs_give_the_answers_that_the_engine_gives_without(llama_checkpoint: Path, overlap: bool) -> None:
    """Every kind of request: drawn in the graph, or after it where that cannot be."""
    requests = mixed_requests(40, seed=3)
    plain, replayed = (
        make_engine(llama_checkpoint, "cpu", attention_backend="torch", overlap=each) for each in (False, overlap)
    )
    graphs = replaying(replayed)
    assert differing(run_under_load(replayed, requests, seed=1), run_under_load(plain, requests, seed=1)) == []
    assert len(graphs.replayed) > 40


def test_only_what_the_graph_cannot_do_is_drawn_after_it(
    llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(llama_checkpoint, "cpu", attention_backend="torch")
    graphs = replaying(engine)
    kinds = [
        (SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.01), 0),
        (SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2), 3),
        (SamplingParams(max_tokens=4, ignore_eos=True, logit_bias={3: 2.0}), 3),
        (SamplingParams(max_tokens=4, ignore_eos=True, min_tokens=2), 3),
        (SamplingParams(max_tokens=4, ignore_eos=True, presence_penalty=0.5), 3),
    ]
    drawn: list[int] = []
    draw = engine.runner._draw
    monkeypatch.setattr(engine.runner, "_draw", lambda *args: drawn.append(1) or draw(*args))
    for number, (params, after) in enumerate(kinds):
        drawn.clear()
        graphs.replayed.clear()
        together(engine, [AddRequest(number, [1, 2, 3], params, 0.0)])
        assert len(graphs.replayed) == 3
        assert len(drawn) == 1 + after, "the first token is that of the prompt's step"


def test_capturing_leaves_the_cache_as_it_is(llama_checkpoint: Path) -> None:
    """What the capture runs, steps of empty rows, before and after sequences have left their traces."""
    engine = make_engine(llama_checkpoint, "cpu", attention_backend="torch")
    for _ in range(2):
        before = [tensor.clone() for tensor in engine.runner.cache.keys + engine.runner.cache.values]
        with torch.inference_mode():
            graphs = EagerReplays(engine.runner)
            for size in graphs._sizes:
                graphs._buffers.clear(size)
                graphs._run(size)
        after = engine.runner.cache.keys + engine.runner.cache.values
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        together(engine, greedy_requests()[:3])


def test_only_steps_that_decode_and_sample_every_row_are_replayed(llama_checkpoint: Path) -> None:
    engine = make_engine(llama_checkpoint, "cpu", attention_backend="torch", max_num_seqs=2)
    graphs = EagerReplays(engine.runner)
    sequences = [Sequence(number, [1], SamplingParams(), (), 16, 0.0) for number in range(2)]
    for decodes, samples, wanted in [(2, [True, True], True), (1, [True, True], False), (2, [True, False], False)]:
        batch = ScheduledBatch(sequences, [1, 1], samples, num_decodes=decodes, num_tokens=2)
        assert graphs.can_replay(batch) is wanted
    many = ScheduledBatch(sequences[:1] * 3, [1] * 3, [True] * 3, num_decodes=3, num_tokens=3)
    assert not graphs.can_replay(many)


def arrays_of(sequences: List[Sequence]) -> DecodeArrays:
    builder = InputBuilder(8, 4, 16, torch.device("cpu"))
    for number, seq in enumerate(sequences):
        seq.block_table, seq.num_computed_tokens = [number], seq.num_tokens - 1
    size = len(sequences)
    return builder.decodes(ScheduledBatch(sequences, [1] * size, [True] * size, num_decodes=size, num_tokens=size))


def test_a_step_lies_where_the_graph_of_its_size_reads_it() -> None:
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=3)]
    sequences = [Sequence(n, [5 + n] * (n + 2), params[n % 2], (), 64, 0.0) for n in range(3)]
    sequences[1].num_pending, sequences[1].pending_row, sequences[1].num_computed_tokens = 1, 2, 3
    buffers = DecodeBuffers([1, 4, 8], 4, 64, 211, torch.device("cpu"))
    step = buffers.steps[4]
    addresses = step.inputs.input_ids.data_ptr(), step.parameters.top_p.data_ptr()
    buffers.load(arrays_of(sequences[:1]), 1)
    buffers.load(arrays_of(sequences), 4)
    metadata = step.inputs.metadata
    assert (buffers.steps[4].inputs.input_ids.data_ptr(), buffers.steps[4].parameters.top_p.data_ptr()) == addresses
    assert step.inputs.input_ids.tolist() == [5, 6, 7, 0]
    assert step.inputs.positions.tolist()[:3] == [1, 2, 3]
    assert step.inputs.sample_positions.tolist()[:3] == [0, 1, 0]
    assert metadata.slot_mapping.tolist() == [1, 18, 35, -1]
    assert metadata.context_lens.tolist() == [2, 3, 4, 0]
    assert metadata.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4]
    assert metadata.block_tables[:3, 0].tolist() == [0, 1, 2]
    assert step.pending.mask.tolist() == [False, True, False, False]
    assert step.pending.rows.tolist()[1] == 2
    assert step.parameters.temperature.tolist() == [0.0, 0.5, 0.0, 0.0]
    assert step.parameters.top_k.tolist()[1] == 7
    assert step.parameters.top_p.tolist()[:3] == [1.0, 0.9, 1.0]
    assert step.parameters.states.tolist()[1] == seed_state(3)
    buffers.clear(4)
    assert step.inputs.metadata.context_lens.tolist() == [0] * 4
    assert step.inputs.metadata.slot_mapping.tolist() == [-1] * 4
    assert step.parameters.temperature.tolist() == [0.0] * 4
    buffers.load(arrays_of(sequences[:1]), 4)
    assert step.parameters.temperature.tolist() == [0.0] * 4


def test_pending_tokens_come_from_the_step_before() -> None:
    drawn = DrawnTokens(4, torch.device("cpu"))
    drawn.keep(torch.tensor([11, -1, 13]))
    ids = torch.tensor([1, 2, 3, 4, 5])
    drawn.fill_in(ids, PendingTokens(torch.tensor([True, False, True, True]), torch.tensor([2, 0, 1, 0])))
    assert ids.tolist() == [13, 2, 0, 11, 5]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_whole_engine_in_the_interpreter_answers_as_on_the_cpu() -> None:
    command = [sys.executable, "-m", "tests.engine.triton_engine"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("answers as on the CPU's\n")


def test_no_graphs_on_the_cpu(llama_checkpoint: Path) -> None:
    assert make_engine(llama_checkpoint, "cpu").runner._graphs is None


def test_arrays_are_sent_together_and_stay_apart() -> None:
    transfer = HostToDevice(torch.device("cpu"))
    table = np.arange(60, dtype=np.int32).reshape(5, 12)
    arrays = [
        np.arange(7, dtype=np.int64),
        np.empty(0, dtype=np.int64),
        table[:, :3],
        np.full(1, -1, dtype=np.int64),
    ]
    sent = transfer.send(arrays)
    again = transfer.send([np.zeros(500, dtype=np.int64)])
    for array, tensor in zip(arrays, sent, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array.copy()))
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0 or tensor.numel() == 0
    assert not again[0].any()


def test_arrays_of_the_same_sizes_come_to_lie_at_the_same_places() -> None:
    transfer, memory = HostToDevice(torch.device("cpu")), torch.zeros(1024, dtype=torch.uint8)
    arrays = [np.arange(3.0), np.ones(2, dtype=np.bool_), np.arange(5, dtype=np.int32)]
    first = transfer.send(arrays, memory)
    second = transfer.send([array * 2 for array in arrays], memory)
    assert [tensor.data_ptr() for tensor in first] == [tensor.data_ptr() for tensor in second]
    assert first[0].tolist() == [0.0, 2.0, 4.0]
    assert first[2].tolist() == [0, 2, 4, 6, 8]


def test_a_copy_to_the_host_holds_what_was_there_when_it_began() -> None:
    source = torch.arange(4)
    copy = HostCopy.begin([source, source[:1]])
    source.zero_()
    assert [tensor.tolist() for tensor in copy.wait()] == [[0, 1, 2, 3], [0]]


# As `pytest.mark.gpu`, but also harmless when asked for where there is no device.
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class TestOnDevice:
    pytestmark = on_gpu

    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize("cuda_graphs", [True, False])
    def test_greedy_tokens_equal_generate_on_the_cpu(self, checkpoint: Path, backend: str, cuda_graphs: bool) -> None:
        engine = make_engine(checkpoint, "cuda", attention_backend=backend, cuda_graphs=cuda_graphs)
        assert (engine.runner._graphs is not None) == (cuda_graphs and backend == "triton")
        requests = greedy_requests()
        assert together(engine, requests) == generate_alone(checkpoint, requests)
        assert engine.stats().num_free_blocks == engine.stats().num_blocks

    def test_graphs_change_no_token(self, checkpoint: Path) -> None:
        requests = greedy_requests()
        with_graphs, without = (
            together(make_engine(checkpoint, "cuda", cuda_graphs=enabled), requests) for enabled in (True, False)
        )
        assert with_graphs == without

    def test_captured_and_eager_logits_agree(self, llama_checkpoint: Path) -> None:
        engine = make_engine(llama_checkpoint, "cuda", overlap=False)
        runner = engine.runner
        graphs = runner._graphs
        assert graphs is not None
        for request in greedy_requests()[:3]:
            engine.add(request)
        batch = engine.scheduler.schedule()
        while not graphs.can_replay(batch):
            engine.scheduler.advance(batch)
            engine.scheduler.settle(batch, [1] * batch.num_samples)
            batch = engine.scheduler.schedule()
        with torch.inference_mode():
            captured = graphs.replay(runner._inputs.decodes(batch)).logits.clone()
            eager = runner.model.compute_logits(runner.forward(runner._inputs.build(batch)))
        torch.testing.assert_close(captured, eager[: captured.shape[0]], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_every_kind_of_request_is_answered_the_same_way(self, llama_checkpoint: Path, overlap: bool) -> None:
        requests = mixed_requests(60, seed=3)
        with_graphs, without = (
            run_under_load(make_engine(llama_checkpoint, "cuda", cuda_graphs=on, overlap=each), requests, seed=1)
            for on, each in ((True, overlap), (False, False))
        )
        assert len(differing(with_graphs, without)) <= 3  # other kernels for other shapes: rounding decides a few

    @pytest.mark.parametrize("overlap", [False, True])
    def test_a_decode_step_is_one_copy_each_way_and_one_launch(self, llama_checkpoint: Path, overlap: bool) -> None:
        engine = make_engine(llama_checkpoint, "cuda", overlap=overlap)
        params = SamplingParams(max_tokens=40, temperature=0.8, top_p=0.9, ignore_eos=True)
        for number in range(4):
            engine.add(AddRequest(number, [1, 2, 3 + number], params, 0.0))
        for _ in range(4):
            engine.step()
        steps = 8
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                engine.step()
            torch.cuda.synchronize()
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts.get("cudaGraphLaunch") == steps
        assert counts.get("cudaMemcpyAsync") == 2 * steps
        assert counts.get("cudaStreamSynchronize", 0) == 0

    def test_capture_writes_nothing(self, llama_checkpoint: Path) -> None:
        engine = make_engine(llama_checkpoint, "cuda")
        assert engine.runner._graphs is not None
        assert not any(tensor.any() for tensor in engine.runner.cache.keys + engine.runner.cache.values)
