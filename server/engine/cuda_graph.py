"""CUDA graphs for decode steps: one captured forward per batch size, replayed with no launch overhead.

A captured forward reads fixed buffers, into which each step's inputs are copied. A step with fewer sequences than
its graph is filled up with rows that have no context and no cache slot: they read and write nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.paged_attention import AttentionMetadata
from server.engine.scheduler import ScheduledBatch
from server.engine.step_inputs import StepInputs

if TYPE_CHECKING:
    from server.engine.model_runner import ModelRunner

logger = logging.getLogger(__name__)

# Larger steps keep the device busy for longer than it takes to launch them.
_LARGEST = 512


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes to capture, ascending. Less than half of a graph's rows are filled up, above 16 a third."""
    largest = min(max_num_seqs, _LARGEST)
    sizes = {1, 2, 4, 8, largest}
    step = 16
    while step < largest:
        sizes |= {step, step + step // 2}
        step *= 2
    return sorted(size for size in sizes if size <= largest)


class DecodeBuffers:
    """The inputs of decode steps at fixed addresses, for up to `max_num_seqs` sequences."""

    def __init__(self, max_num_seqs: int, max_blocks: int, max_model_len: int, device: torch.device) -> None:
        self._max_model_len = max_model_len
        self._input_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._slot_mapping = torch.full((max_num_seqs,), -1, dtype=torch.int64, device=device)
        self._context_lens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._cu_seqlens_q = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(max_num_seqs, device=device)

    def view(self, size: int) -> StepInputs:
        """The step of the first `size` rows: always the same memory. Its host values hold for any sequences."""
        metadata = AttentionMetadata(
            cu_seqlens_q=self._cu_seqlens_q[: size + 1],
            context_lens=self._context_lens[:size],
            block_tables=self._block_tables[:size],
            slot_mapping=self._slot_mapping[:size],
            num_tokens=size,
            max_query_len=1,
            max_context_len=self._max_model_len,
        )
        rows = self._rows[:size]
        return StepInputs(self._input_ids[:size], self._positions[:size], rows, rows, metadata)

    def load(self, inputs: StepInputs, size: int) -> None:
        """Copy a decode step of at most `size` sequences and make the rows up to `size` empty.

        What earlier steps left in the other buffers of those rows is valid and does no harm.
        """
        metadata = inputs.metadata
        rows, width = metadata.block_tables.shape
        self._input_ids[:rows].copy_(inputs.input_ids[:rows])
        self._positions[:rows].copy_(inputs.positions[:rows])
        self._slot_mapping[:rows].copy_(metadata.slot_mapping[:rows])
        self._context_lens[:rows].copy_(metadata.context_lens)
        self._block_tables[:rows, :width].copy_(metadata.block_tables)
        if rows < size:
            self._slot_mapping[rows:size].fill_(-1)
            self._context_lens[rows:size].zero_()


class CUDAGraphRunner:
    """Captured decode forwards, from token ids to logits."""

    def __init__(self, runner: ModelRunner) -> None:
        limits, device = runner.limits, runner.device
        self._runner = runner
        self._sizes = graph_sizes(limits.max_num_seqs)
        max_blocks = -(-limits.max_model_len // limits.block_size)
        self._buffers = DecodeBuffers(self._sizes[-1], max_blocks, limits.max_model_len, device)
        vocab_size = runner.model_config.vocab_size
        self._logits = torch.empty(self._sizes[-1], vocab_size, dtype=runner.dtype, device=device)
        self._replays = self._capture_all()

    @classmethod
    def create(cls, runner: ModelRunner) -> CUDAGraphRunner | None:
        """Capture for the runner's device, or None where graphs do not apply."""
        if runner.device.type != "cuda" or runner.backend.name == "torch":
            return None  # the reference reads tensors' values on the host, which cannot be captured
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                graphs = cls(runner)
        except RuntimeError:  # out of memory among others
            logger.exception("CUDA graphs could not be captured; decoding goes on without them")
            return None
        logger.info("captured %d CUDA graphs in %.1f s", len(graphs._replays), time.perf_counter() - started)
        return graphs

    def can_replay(self, batch: ScheduledBatch) -> bool:
        """Whether the step only decodes, samples every row, and fits a graph."""
        size = len(batch.sequences)
        return batch.num_decodes == size == batch.num_samples and size <= self._sizes[-1]

    @torch.inference_mode()
    def replay(self, inputs: StepInputs) -> Tensor:
        """Logits [B, V] of a step that `can_replay`; the next replay overwrites them."""
        rows = inputs.metadata.context_lens.shape[0]
        size = next(size for size in self._sizes if size >= rows)
        self._buffers.load(inputs, size)
        self._replays[size]()
        return self._logits[:rows]

    def _capture_all(self) -> dict[int, Callable[[], None]]:
        """How to replay each size. The largest comes first: the others then fit into the memory that it has taken."""
        stream, pool = torch.cuda.Stream(self._runner.device), torch.cuda.graph_pool_handle()
        return {size: self._capture(size, stream, pool) for size in reversed(self._sizes)}

    def _capture(self, size: int, stream: torch.cuda.Stream, pool: Any) -> Callable[[], None]:
        """The buffers' rows are empty at this time, so that running them leaves the cache as it is."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(size)  # compiles kernels and allocates what must not happen during a capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._forward(size)
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

    def _forward(self, size: int) -> None:
        hidden = self._runner.forward(self._buffers.view(size))
        self._logits[:size].copy_(self._runner.model.compute_logits(hidden))
