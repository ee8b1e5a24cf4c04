"""CUDA graphs for decode steps: for each batch size, a captured step from token ids to the next token ids.

It reads fixed buffers, which one copy fills, and the tokens that the step before it has drawn, so that it can be
launched while that still runs. A step with fewer sequences than its graph is filled up with rows that have no context
and no cache slot: they read and write nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.sampling.draw import padded_width
from model.sampling.triton_sampling import kernel_available, sample_rows
from server.engine.decode_buffers import DecodeBuffers, DeviceStep
from server.engine.scheduler import ScheduledBatch
from server.engine.sequence import Sequence
from server.engine.step_inputs import DecodeArrays

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


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a step of B sequences leaves until the next one: its logits [B, V], the tokens [B] drawn from them (None
    where a sequence asks for more than the graph can do), and how many tokens came before each [B]."""

    logits: Tensor
    token_ids: Tensor | None
    sample_positions: Tensor


class CUDAGraphRunner:
    """Captured decode steps. What they draw is in the runner's `drawn` tokens."""

    def __init__(self, runner: ModelRunner) -> None:
        limits, device = runner.limits, runner.device
        self._runner = runner
        self._sizes = graph_sizes(limits.max_num_seqs)
        max_blocks = -(-limits.max_model_len // limits.block_size)
        self._valid_vocab_size = runner.sampler.valid_vocab_size
        self._buffers = DecodeBuffers(self._sizes, max_blocks, limits.max_model_len, self._valid_vocab_size, device)
        largest, vocab_size = self._sizes[-1], runner.model_config.vocab_size
        self._logits = torch.empty(largest, vocab_size, dtype=runner.dtype, device=device)
        self._scratch = torch.empty(largest, padded_width(self._valid_vocab_size), device=device)
        self._draws = self._can_draw()
        self._replays = self._capture_all()

    def _can_draw(self) -> bool:
        return kernel_available(self._runner.device)

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
    def replay(self, arrays: DecodeArrays) -> Replayed:
        """Run a step that `can_replay`. Nothing is waited for."""
        rows = len(arrays.sequences)
        size = next(size for size in self._sizes if size >= rows)
        self._buffers.load(arrays, size)
        self._replays[size]()
        drawn = self._draws and all(map(_draws_plainly, arrays.sequences))
        return Replayed(
            self._logits[:rows],
            self._runner.drawn.ids[:rows] if drawn else None,
            self._buffers.steps[size].inputs.sample_positions[:rows],
        )

    def _capture_all(self) -> dict[int, Callable[[], None]]:
        """How to replay each size. The largest comes first: the others then fit into the memory that it has taken."""
        stream, pool = torch.cuda.Stream(self._runner.device), torch.cuda.graph_pool_handle()
        return {size: self._capture(size, stream, pool) for size in reversed(self._sizes)}

    def _capture(self, size: int, stream: torch.cuda.Stream, pool: Any) -> Callable[[], None]:
        """Of rows that are empty, so that running them leaves the cache as it is."""
        self._buffers.clear(size)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(size)  # compiles kernels and allocates what must not happen during a capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._run(size)
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay

    def _run(self, size: int) -> None:
        """The step that is captured."""
        step = self._buffers.steps[size]
        input_ids = self._runner.drawn.look_up(step.inputs.input_ids, step.pending)
        hidden = self._runner.forward(replace(step.inputs, input_ids=input_ids))
        self._logits[:size].copy_(self._runner.model.compute_logits(hidden))
        if self._draws:
            self._draw(size, step)

    def _draw(self, size: int, step: DeviceStep) -> None:
        """Replace the first `size` of the runner's drawn tokens by those that follow from the logits."""

        sample_rows(
            self._logits[:size],
            self._valid_vocab_size,
            step.parameters,
            step.inputs.sample_positions,
            self._scratch[:size],
            self._runner.drawn.ids[:size],
        )


def _draws_plainly(seq: Sequence) -> bool:
    """Whether logits, temperature, filters and a seed are all that its next token depends on, and all it wants."""
    params = seq.params
    edits = params.has_penalties or params.logit_bias or params.min_tokens or seq.grammar is not None
    return not edits and params.logprobs is None
