"""check_backend: does a backend compute on this device what the torch reference does?"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.paged_attention import AttentionBackend, AttentionMetadata, TorchBackend

# How far results of about unit size may lie from the reference in float64, by what they are rounded to.
TOLERANCES = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}

# (query tokens, context) of each sequence: a step of chunks and decodes, one of short decodes and one of long ones.
# Between them they take every branch of our kernels, which so are compiled before the first request comes.
_STEPS = (
    ((1, 5), (40, 40), (3, 290), (1, 300), (150, 177)),
    ((1, 3), (1, 1), (1, 19)),
    ((1, 290), (1, 0), (1, 700)),
)


class BackendMismatchError(Exception):
    """A backend's results are not the reference's."""


def check_backend(
    backend: AttentionBackend, config: ModelConfig, device: torch.device, dtype: torch.dtype, block_size: int
) -> None:
    """Run small random steps with the model's heads. Raises BackendMismatchError, or what the backend raises."""
    with torch.inference_mode():
        for number, sequences in enumerate(_STEPS):
            step = PagedStep.random(config, sequences, block_size, dtype, device, seed=number)
            step.compare(backend, config.sliding_window)


class PagedStep:
    """One step's queries, keys, values and half-filled caches. Unwritten slots hold NaN: nothing may read them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.key_cache, self.value_cache = key_cache, value_cache
        self.metadata = metadata

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        sequences: tuple[tuple[int, int], ...],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        padding: int = 1,
    ) -> PagedStep:
        """`sequences` gives query tokens and context of each; a context of 0 is a padding row of one token.

        `padding` tokens of slot -1 follow, which belong to no sequence.
        """
        generator = torch.Generator().manual_seed(seed)
        counts = [count for count, _ in sequences]
        contexts = [context for _, context in sequences]
        num_tokens = sum(counts)
        widest = max(-(-context // block_size) for context in contexts)
        num_blocks = len(sequences) * widest + 1
        tables = torch.randperm(num_blocks, generator=generator)[:-1].view(len(sequences), widest)
        slots, written = [], []
        for row, (count, context) in enumerate(sequences):
            positions = torch.arange(context)
            own = tables[row, positions // block_size] * block_size + positions % block_size
            slots.append(own[context - count :] if context else torch.full((count,), -1))
            written.append(own[: max(context - count, 0)])
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        # As the model's one product leaves them: views of one tensor, not contiguous.
        qkv = torch.randn(num_tokens + padding, heads + 2 * kv_heads, head_dim, generator=generator)
        q, k, v = qkv.to(device, dtype).split([heads, kv_heads, kv_heads], dim=1)
        past = torch.cat(written)
        caches = []
        for _ in range(2):
            cache = torch.full((num_blocks * block_size, kv_heads, head_dim), torch.nan)
            cache[past] = torch.randn(len(past), kv_heads, head_dim, generator=generator)
            caches.append(cache.view(num_blocks, block_size, kv_heads, head_dim).to(device, dtype))
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32),
            context_lens=torch.tensor(contexts).to(device, torch.int32),
            block_tables=tables.to(device, torch.int32),
            slot_mapping=torch.cat([*slots, torch.full((padding,), -1)]).to(device, torch.int64),
            num_tokens=num_tokens,
            max_query_len=max(counts),
            max_context_len=max(contexts),
        )
        return cls(q, k, v, caches[0], caches[1], metadata)

    def attend(self, backend: AttentionBackend, window: int | None) -> Tensor:
        """Through `backend`, on the step's own caches, which must have the layout [blocks, block_size, K, d]."""
        return backend.attend(self.q, self.k, self.v, self.key_cache, self.value_cache, self.metadata, window)

    def compare(self, backend: AttentionBackend, window: int | None) -> None:
        """Raise BackendMismatchError unless `backend` stores and returns what the reference does in float64.

        Products in float64 are exact enough whatever precision the process has chosen for those in float32.
        """
        exact = self._in_float64()
        expected = exact.attend(TorchBackend(), window)
        out = self.attend(backend, window)
        for ours, reference in ((self.key_cache, exact.key_cache), (self.value_cache, exact.value_cache)):
            if not torch.allclose(ours.double(), reference, rtol=0.0, atol=0.0, equal_nan=True):
                raise BackendMismatchError("keys or values were stored wrongly")
        error = float((out.double() - expected).abs().max())
        if not error <= TOLERANCES[self.q.dtype]:
            raise BackendMismatchError(f"attention differs from the reference by {error:.1e}")

    def _in_float64(self) -> PagedStep:
        """The same step with caches of its own."""
        tensors = (x.to(torch.float64, copy=True) for x in (self.q, self.k, self.v, self.key_cache, self.value_cache))
        q, k, v, key_cache, value_cache = tensors
        return PagedStep(q, k, v, key_cache, value_cache, self.metadata)
