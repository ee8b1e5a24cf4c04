"""The compiled CPU kernels, loaded through ctypes; absent where no C compiler was at hand at installation."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from functools import cache
from pathlib import Path

from model.errors import ConfigError
from model.native.decoder_structs import STRUCTURES

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
"""Weakest first, by their numbers in kernels.c."""


@cache
def load_kernels() -> ctypes.CDLL | None:
    """The library built from kernels.c, initialised with torch's own thread pool, or None if it was not built.

    Raises ConfigError if it was built from another version of the source.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            return _initialise(ctypes.CDLL(str(path)))
    return None


def variant_names() -> tuple[str, str] | None:
    """What the float32 and the bfloat16 kernels use on this machine."""
    library = load_kernels()
    return None if library is None else (library.quill_variant(0).decode(), library.quill_variant(1).decode())


def limit_instruction_set(most: str) -> None:
    """Use nothing above `most` of INSTRUCTION_SETS, to compare the variants. No kernel may be running."""
    library = load_kernels()
    if library is not None:
        library.quill_init(*_thread_pool(), INSTRUCTION_SETS.index(most))


def _initialise(library: ctypes.CDLL) -> ctypes.CDLL:
    try:
        library.quill_init.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        library.quill_init.restype = None
        library.quill_variant.argtypes = [ctypes.c_int]
        library.quill_variant.restype = ctypes.c_char_p
        library.quill_step_size.argtypes = []
        library.quill_step_size.restype = ctypes.c_int64
        library.quill_paged_attention.argtypes = [ctypes.c_void_p]
        library.quill_paged_attention.restype = ctypes.c_int
        library.quill_dense_step_size.argtypes = []
        library.quill_dense_step_size.restype = ctypes.c_int64
        library.quill_dense_attention.argtypes = [ctypes.c_void_p]
        library.quill_dense_attention.restype = ctypes.c_int
        library.quill_dropout.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_float,
            ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip
        library.quill_dropout.restype = None
        library.quill_elementwise_size.argtypes = []
        library.quill_elementwise_size.restype = ctypes.c_int64
        library.quill_elementwise.argtypes = [ctypes.c_void_p]
        library.quill_elementwise.restype = None
        _declare_decoder(library)
    except AttributeError:
        raise ConfigError("the compiled CPU kernels are of another version; run make install") from None
    library.quill_init(*_thread_pool(), len(INSTRUCTION_SETS) - 1)
    return library


def _declare_decoder(library: ctypes.CDLL) -> None:
    library.quill_decoder_sizes.argtypes = [ctypes.c_int]
    library.quill_decoder_sizes.restype = ctypes.c_int64
    library.quill_decoder_forward.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.quill_decoder_forward.restype = ctypes.c_int
    library.quill_decoder_logits.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.quill_decoder_logits.restype = ctypes.c_int
    library.quill_tile_rows.argtypes = [ctypes.c_int]
    library.quill_tile_rows.restype = ctypes.c_int
    library.quill_pack.argtypes = [ctypes.c_void_p]
    library.quill_pack.restype = None
    library.quill_gather.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    ]  # fmt: skip
    library.quill_gather.restype = None
    library.quill_reads_compact.argtypes = []
    library.quill_reads_compact.restype = ctypes.c_int
    library.quill_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.quill_huge_pages.restype = None
    for which, structure in enumerate(STRUCTURES):
        if library.quill_decoder_sizes(which) != ctypes.sizeof(structure):
            raise AttributeError("another layout")


@cache
def _thread_pool() -> tuple[int | None, int | None]:
    """The addresses of GOMP_parallel and omp_get_num_threads in the OpenMP runtime that torch has loaded.

    A second runtime would keep a second pool of spinning threads, so none is loaded here: where torch brought
    another kind or none, the kernels run in one thread.
    """
    import torch

    folder = Path(torch.__file__).parent
    shipped = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    for name in [*map(str, sorted(shipped)), "libgomp.so.1"]:
        try:
            runtime = ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        except (OSError, AttributeError):  # not loaded; or a system without RTLD_NOLOAD
            continue
        functions = runtime.GOMP_parallel, runtime.omp_get_num_threads
        start, size = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        return start, size
    return None, None
