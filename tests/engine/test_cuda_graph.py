"""CUDA graphs: the padded steps are checked on the CPU, the captured ones against generate() on a device (`gpu`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import load_model
from model.generate import generate
from model.sampling_params import SamplingParams
from server.engine.config import EngineConfig
from server.engine.cuda_graph import CUDAGraphRunner, DecodeBuffers, graph_sizes
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest
from server.engine.scheduler import ScheduledBatch
from server.engine.sequence import Sequence
from server.engine.transfer import HostToDevice
from tests.engine.conftest import VOCAB_SIZE


class EagerReplays(CUDAGraphRunner):
    """Everything but the capture: replaying runs the padded forward. Counts the sizes that were replayed."""

    def _capture_all(self) -> dict[int, Callable[[], None]]:
        self.replayed: list[int] = []
        return {size: partial(self._replay, size) for size in self._sizes}

    def _replay(self, size: int) -> None:
        self.replayed.append(size)
        self._forward(size)


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


def run(engine: LLMEngine, requests: list[AddRequest]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        for output in engine.step().outputs:
            tokens[output.request_id] += output.token_ids
    return tokens


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


def test_filled_up_steps_give_the_tokens_of_generate(llama_checkpoint: Path) -> None:
    engine = make_engine(llama_checkpoint, "cpu", attention_backend="torch")
    graphs = EagerReplays(engine.runner)
    engine.runner._graphs = graphs
    requests = greedy_requests()
    assert run(engine, requests) == generate_alone(llama_checkpoint, requests)
    assert set(graphs.replayed) == {1, 2, 4, 8, 12}


def test_capturing_leaves_the_cache_as_it_is(llama_checkpoint: Path) -> None:
    """What the capture runs, forward passes over empty rows, before and after sequences have left their traces."""
    engine = make_engine(llama_checkpoint, "cpu", attention_backend="torch")
    for _ in range(2):
        before = [tensor.clone() for tensor in engine.runner.cache.keys + engine.runner.cache.values]
        with torch.inference_mode():
            EagerReplays(engine.runner)._forward(12)
        after = engine.runner.cache.keys + engine.runner.cache.values
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        run(engine, greedy_requests()[:3])


def test_only_steps_that_decode_and_sample_every_row_are_replayed(llama_checkpoint: Path) -> None:
    engine = make_engine(llama_checkpoint, "cpu", attention_backend="torch", max_num_seqs=2)
    graphs = EagerReplays(engine.runner)
    sequences = [Sequence(number, [1], SamplingParams(), (), 16, 0.0) for number in range(2)]
    for decodes, samples, wanted in [(2, [True, True], True), (1, [True, True], False), (2, [True, False], False)]:
        batch = ScheduledBatch(sequences, [1, 1], samples, num_decodes=decodes, num_tokens=2)
        assert graphs.can_replay(batch) is wanted
    many = ScheduledBatch(sequences[:1] * 3, [1] * 3, [True] * 3, num_decodes=3, num_tokens=3)
    assert not graphs.can_replay(many)


def test_buffers_stay_where_they_are() -> None:
    buffers = DecodeBuffers(8, 4, 64, torch.device("cpu"))
    first, second = buffers.view(4), buffers.view(4)
    assert first.input_ids.data_ptr() == second.input_ids.data_ptr()
    assert first.metadata.block_tables.data_ptr() == second.metadata.block_tables.data_ptr()
    assert first.metadata.context_lens.tolist() == [0] * 4
    assert first.metadata.slot_mapping.tolist() == [-1] * 4
    assert first.metadata.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4]


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
        assert run(engine, requests) == generate_alone(checkpoint, requests)
        assert engine.stats().num_free_blocks == engine.stats().num_blocks

    def test_graphs_change_no_token(self, checkpoint: Path) -> None:
        requests = greedy_requests()
        with_graphs, without = (
            run(make_engine(checkpoint, "cuda", cuda_graphs=enabled), requests) for enabled in (True, False)
        )
        assert with_graphs == without

    def test_captured_and_eager_logits_agree(self, llama_checkpoint: Path) -> None:
        engine = make_engine(llama_checkpoint, "cuda")
        graphs = engine.runner._graphs
        assert graphs is not None
        for request in greedy_requests()[:3]:
            engine.add(request)
        engine.step()
        batch = engine.scheduler.schedule()
        while not graphs.can_replay(batch):
            engine._run(batch)
            batch = engine.scheduler.schedule()
        inputs = engine.runner._inputs.build(batch)
        with torch.inference_mode():
            captured = graphs.replay(inputs).clone()
            eager = engine.runner.model.compute_logits(engine.runner.forward(inputs))
        torch.testing.assert_close(captured, eager[: captured.shape[0]], rtol=1e-4, atol=1e-4)

    def test_capture_writes_nothing(self, llama_checkpoint: Path) -> None:
        engine = make_engine(llama_checkpoint, "cuda")
        assert engine.runner._graphs is not None
        assert not any(tensor.any() for tensor in engine.runner.cache.keys + engine.runner.cache.values)
