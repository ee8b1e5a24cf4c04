"""DecodeBuffers: the inputs of decode steps at fixed addresses, where captured graphs read them."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.paged_attention import AttentionMetadata
from model.sampling.rows import RowParameters
from server.engine.drawn_tokens import PendingTokens
from server.engine.sequence import Sequence
from server.engine.step_inputs import DecodeArrays, StepInputs
from server.engine.transfer import HostToDevice, num_bytes, view_arrays

Array = TypeVar("Array", np.ndarray, Tensor)


class StepFields(NamedTuple, Generic[Array]):
    """A decode step of `size` rows, as DecodeArrays names them."""

    input_ids: Array
    positions: Array
    slots: Array
    generated: Array
    pending_rows: Array
    is_pending: Array
    context_lens: Array
    block_tables: Array


class DeviceStep(NamedTuple):
    """What a graph of one size reads: always the same memory."""

    inputs: StepInputs
    pending: PendingTokens
    parameters: RowParameters


class DecodeBuffers:
    """For each of `sizes`, arrays on the host and the memory that they are sent to in one copy. All sizes share that
    memory, since only one step is in it at a time. `steps` are the views of it, by size."""

    def __init__(
        self, sizes: List[int], max_blocks: int, max_model_len: int, vocab_size: int, device: torch.device
    ) -> None:
        """`vocab_size` counts the tokens that can be drawn."""
        self._max_model_len, self._vocab_size = max_model_len, vocab_size
        self._transfer = HostToDevice(device)
        self._host = {size: _blank_step(size, max_blocks) for size in sizes}
        self._parameters = {size: RowParameters.empty(size, "cpu") for size in sizes}
        self._known: tuple[int, list[int]] = (0, [])
        length = max(num_bytes(self._arrays(size)) for size in sizes)
        self._memory = torch.zeros(length, dtype=torch.uint8, device=device)
        self._cu_seqlens_q = torch.arange(max(sizes) + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(max(sizes), device=device)
        self.steps = {size: self._view(size) for size in sizes}

    def clear(self, size: int) -> None:
        """Send a step of that size without sequences."""
        self._send(size, num_rows=0)

    def load(self, arrays: DecodeArrays, size: int) -> None:
        """Send a step of at most `size` sequences; the rows behind them are empty.

        What earlier steps left in the other fields of those rows is valid and does no harm.
        """
        rows, host = len(arrays.sequences), self._host[size]
        for name, array in zip(host._fields, host, strict=True):
            array[:rows] = getattr(arrays, name)
        self._load_parameters(arrays.sequences, size)
        self._send(size, rows)

    def _send(self, size: int, num_rows: int) -> None:
        """Rows from `num_rows` on are greedy and have neither context nor slot: they read and write nothing."""
        host = self._host[size]
        host.slots[num_rows:] = -1
        host.context_lens[num_rows:] = 0
        host.is_pending[num_rows:] = False
        self._parameters[size].temperature[num_rows:] = 0.0
        self._transfer.send(self._arrays(size), self._memory)

    def _arrays(self, size: int) -> list[np.ndarray]:
        return [*self._host[size], self._parameters[size].packed.numpy()]

    def _view(self, size: int) -> DeviceStep:
        """The step of `size` rows on the device. Its host values hold for any sequences."""
        *tensors, packed = view_arrays(self._memory, self._arrays(size))
        fields = StepFields(*tensors)
        metadata = AttentionMetadata(
            cu_seqlens_q=self._cu_seqlens_q[: size + 1],
            context_lens=fields.context_lens,
            block_tables=fields.block_tables,
            slot_mapping=fields.slots,
            num_tokens=size,
            max_query_len=1,
            max_context_len=self._max_model_len,
        )
        inputs = StepInputs(fields.input_ids, fields.positions, self._rows[:size], fields.generated, metadata)
        pending = PendingTokens(fields.is_pending, fields.pending_rows)
        return DeviceStep(inputs, pending, RowParameters.over(packed, size))

    def _load_parameters(self, sequences: List[Sequence], size: int) -> None:
        """Only where the step's composition has changed."""
        known = size, [seq.request_id for seq in sequences]
        if known == self._known:
            return
        self._known = known
        params = [seq.params for seq in sequences]
        self._parameters[size].load(RowParameters.build(params, self._vocab_size, "cpu"))


def _blank_step(size: int, max_blocks: int) -> StepFields[np.ndarray]:
    return StepFields(
        input_ids=np.zeros(size, dtype=np.int64),
        positions=np.zeros(size, dtype=np.int64),
        slots=np.zeros(size, dtype=np.int64),
        generated=np.zeros(size, dtype=np.int64),
        pending_rows=np.zeros(size, dtype=np.int64),
        is_pending=np.zeros(size, dtype=np.bool_),
        context_lens=np.zeros(size, dtype=np.int32),
        block_tables=np.zeros((size, max_blocks), dtype=np.int32),
    )
