"""Run by test_attention_cuda.py in a process of its own: the Triton kernels in Triton's interpreter, on the CPU.

The interpreter must be asked for before triton is imported. bfloat16 is left out: it cannot multiply that.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import torch
from triton.runtime import interpreter

from model.attention_check import PagedStep, check_backend
from model.attention_cuda import TritonBackend
from tests.model.attention_steps import head_config, last_tokens

# heads, kv heads, head_dim, window, block size, dtype
CASES: list[tuple[int, int, int, int | None, int, torch.dtype]] = [
    (2, 2, 16, None, 16, torch.float32),
    (4, 2, 24, None, 16, torch.float16),
    (6, 2, 16, 37, 8, torch.float32),
    (3, 1, 16, 300, 256, torch.float32),
]


def mend_interpreter() -> None:
    """numpy 2.5 no longer turns arrays of one element into numbers, as the interpreter does for bounds of loops."""
    patch: Any = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def check_many_splits() -> None:
    """A context of so many keys that splits are longer than the least length."""
    config = head_config(1, 1, 16)
    step = PagedStep.random(config, ((1, 9000), (1, 3)), 256, torch.float32, torch.device("cpu"), seed=7, padding=0)
    with torch.inference_mode():
        step.compare(TritonBackend(config, torch.float32), None)


def check_determinism(window: int | None, dtype: torch.dtype, *, rows: tuple[int, ...]) -> None:
    """A context of 300 tokens, computed token by token at its end and in chunks cut in several places, beside a
    neighbour and alone: with `deterministic` every token's result has the same bits."""
    config = head_config(2, 1, 16, window)
    backend = TritonBackend(config, dtype, deterministic=True)
    length, cpu = 300, torch.device("cpu")
    whole = PagedStep.random(config, ((length, length), (5, 40)), 16, dtype, cpu, seed=3, padding=0)
    with torch.inference_mode():
        whole.compare(backend, window)
        expected = whole.attend(backend, window)
        for count in rows:
            # The keys and values of the whole are in the caches now; the last `count` tokens are computed again.
            part = last_tokens(whole, length, count)
            assert torch.equal(part.attend(backend, window), expected[length - count : length]), (window, dtype, count)


def main() -> None:
    torch.set_num_threads(1)
    mend_interpreter()
    for heads, kv_heads, head_dim, window, block_size, dtype in CASES:
        config = head_config(heads, kv_heads, head_dim, window)
        for deterministic in (False, True):
            backend = TritonBackend(config, dtype, deterministic=deterministic)
            check_backend(backend, config, torch.device("cpu"), dtype, block_size)
        print(heads, kv_heads, head_dim, window, block_size, dtype, flush=True)
    check_many_splits()
    for window in (None, 37):
        check_determinism(window, torch.float32, rows=(1, 2, 45))
    print("all equal the reference")


if __name__ == "__main__":
    main()
