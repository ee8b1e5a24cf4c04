"""Does this machine give a sequence the same logits, to the bit, alone, beside others and computed in chunks?

The kernels are built so that it does, but another processor may choose other kernels inside a library. This check runs
a few small steps of the loaded model on blocks that nobody holds, and compares. It goes one step at a time, so that an
engine can do it while it is idle and drop it when a request comes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling_params import SamplingParams
from server.engine.block_manager import BlockManager
from server.engine.messages import NO, UNCHECKED, YES
from server.engine.model_runner import ModelRunner
from server.engine.scheduler import ScheduledBatch
from server.engine.sequence import Sequence

# The ways below have steps of 1, 3, 15, 17, 33, 34 and 58 rows: products switch kernels at such numbers.
_PROMPT = 33
_LEAST_PROMPT = 20
_NEIGHBOURS = (18, 7)


class _NoRoomError(Exception):
    """The engine's limits or its free blocks are too small for the check's sequences."""


@dataclass(frozen=True, slots=True)
class _Way:
    """How to compute the probe's tokens: `cuts` are the tokens of each step. The neighbours' prompts run in its first
    step, and one more token of each in every other."""

    cuts: tuple[int, ...]
    neighbours: tuple[int, ...] = ()


class InvarianceCheck:
    """A check of one engine. `advance` until it answers, or `run`; `reset` gives its blocks back at any time."""

    def __init__(self, runner: ModelRunner, block_manager: BlockManager, generation: int = 0) -> None:
        """`generation` is that of the runner's weights."""
        self._runner = runner
        self._generation = generation
        self._blocks = block_manager
        self._sequences: list[Sequence] = []
        self._num_made = 0
        self._steps: Generator[None, None, bool] | None = None

    def run(self) -> str:
        """All steps at once: yes, no or unchecked."""
        while (answer := self.advance()) is None:
            pass
        return answer

    def advance(self) -> str | None:
        """Run the model once. None while there is more to do, then yes or no, or unchecked for want of room."""
        if self._steps is None:
            self._steps = self._ways_agree()
        try:
            next(self._steps)
        except StopIteration as end:
            self.reset()
            return YES if end.value else NO
        except _NoRoomError:
            self.reset()
            return UNCHECKED
        return None

    def reset(self) -> None:
        """Free all blocks; the next `advance` begins from the start."""
        self._free()
        self._steps = None

    def _free(self) -> None:
        for seq in self._sequences:
            self._blocks.free(seq)
        self._sequences.clear()

    def _ways_agree(self) -> Generator[None, None, bool]:
        """Yields after each step; returns whether all ways gave the bits that the probe has alone."""
        prompt = self._prompt_len()
        expected = yield from self._take(_Way((prompt, 1)))
        others = (
            _Way((1, 15, prompt - 16, 1)),
            _Way((prompt + 1,)),  # as after a preemption: the generated token in one step with its prompt
            _Way((prompt, 1), _NEIGHBOURS),
        )
        for way in others:
            found = yield from self._take(way)
            if not all(_same_bits(found[end], expected[end]) for end in found.keys() & expected.keys()):
                return False
        return True

    def _take(self, way: _Way) -> Generator[None, None, dict[int, Tensor]]:
        """The probe's logits [V] after each step, by the number of its tokens computed until then."""
        probe = self._new(sum(way.cuts))
        others = [self._new(length + len(way.cuts) - 1) for length in way.neighbours]
        rows = [*others[:1], probe, *others[1:]]
        logits = {}
        for index, count in enumerate(way.cuts):
            taken = way.neighbours if index == 0 else (1,) * len(others)
            output = self._step(rows, [*taken[:1], count, *taken[1:]])
            logits[probe.num_computed_tokens] = output[rows.index(probe)].clone()
            yield
        self._free()
        return logits

    def _step(self, sequences: list[Sequence], counts: list[int]) -> Tensor:
        """Logits [sequences, V] after the next `counts` tokens. Raises _NoRoomError."""
        for seq, count in zip(sequences, counts, strict=True):
            if not self._blocks.allocate_slots(seq, count):
                raise _NoRoomError
        decoding = all(seq.num_computed_tokens and seq.num_computed_tokens + 1 == seq.num_tokens for seq in sequences)
        batch = ScheduledBatch(
            sequences=sequences,
            num_scheduled_tokens=counts,
            needs_sample=[True] * len(sequences),
            num_decodes=len(sequences) if decoding else 0,
            num_tokens=sum(counts),
        )
        logits = self._runner.compute_logits(batch)
        assert logits is not None, "every row asked for logits"
        for seq, count in zip(sequences, counts, strict=True):
            seq.num_computed_tokens += count
        return logits

    def _new(self, num_tokens: int) -> Sequence:
        """A sequence of arbitrary tokens; equal lengths begin with equal tokens. Its id is no request's."""
        self._num_made += 1
        limits, vocab_size = self._runner.limits, self._runner.model_config.vocab_size
        token_ids = [(7919 * index + 13) % vocab_size for index in range(num_tokens)]
        seq = Sequence(
            -self._num_made, token_ids, SamplingParams(), (), limits.max_model_len, 0.0, generation=self._generation
        )
        self._sequences.append(seq)
        return seq

    def _prompt_len(self) -> int:
        """Raises _NoRoomError where the limits leave less than a prompt that can be cut."""
        limits = self._runner.limits
        length = min(_PROMPT, limits.max_model_len - 2, limits.max_num_batched_tokens - sum(_NEIGHBOURS))
        if length < _LEAST_PROMPT or limits.max_num_seqs <= len(_NEIGHBOURS):
            raise _NoRoomError
        return length


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than equality: zeros of two signs differ, and equal NaN are the same."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
