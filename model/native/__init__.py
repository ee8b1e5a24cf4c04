"""The compiled CPU kernels, loaded through ctypes; absent where no C compiler was at hand at installation."""

from __future__ import annotations

import ctypes
import importlib.machinery
from functools import cache
from pathlib import Path


@cache
def load_kernels() -> ctypes.CDLL | None:
    """The library built from kernels.c, initialised with torch's own thread pool, or None if it was not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            return _initialise(ctypes.CDLL(str(path)))
    return None


def variant_name() -> str | None:
    """The instruction set that the bfloat16 kernels use on this machine."""
    library = load_kernels()
    return None if library is None else library.quill_init(_gomp_parallel()).decode()


def _initialise(library: ctypes.CDLL) -> ctypes.CDLL:
    library.quill_init.argtypes = [ctypes.c_void_p]
    library.quill_init.restype = ctypes.c_char_p
    library.quill_paged_attention.argtypes = [ctypes.c_void_p]
    library.quill_paged_attention.restype = ctypes.c_int
    library.quill_init(_gomp_parallel())
    return library


@cache
def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded.

    A second runtime would keep a second pool of spinning threads; where torch ships none, the kernels run in one
    thread.
    """
    import torch

    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")) + sorted(
        Path(torch.__file__).parent.parent.glob("torch.libs/libgomp*.so*")
    ):
        runtime = ctypes.CDLL(str(path))
        return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    return None
