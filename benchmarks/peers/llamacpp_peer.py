"""llama.cpp through its C API: batched decoding of parallel sequences, flash attention, greedy.

    python -m benchmarks.peers.llamacpp_peer --model FILE.gguf --variant bf16

The next tokens are taken with one numpy argmax over the logits of all sequences, which is quicker than
llama.cpp's own sampler objects. Variants name the file's weights: bf16 or q8_0.
"""

from __future__ import annotations

import argparse
import ctypes
from time import perf_counter

import llama_cpp
import numpy as np

from benchmarks.peers.common import parse_args, print_figures, workload_of
from benchmarks.workload import BatchTiming, random_prompts


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: object) -> None:
    """llama.cpp reports every load on stderr otherwise."""


class BatchedContext:
    """A model and a context with room for `max_seqs` sequences of `seq_len` tokens."""

    def __init__(self, args: argparse.Namespace, max_seqs: int, seq_len: int) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(args.model).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp could not load {args.model.name}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max_seqs * _round_up(seq_len, 256)
        params.n_batch = max(max_seqs * args.prompt_len, 512)
        params.n_ubatch = args.ubatch
        params.n_seq_max = max_seqs
        params.n_threads = params.n_threads_batch = args.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = args.kv_unified
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not create a context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def forward(self, tokens: list[list[int]], position: int) -> list[int]:
        """Feed `tokens[s]` to sequence s from `position` on; returns each sequence's greedy next token."""
        batch = self._batch
        index = 0
        for sequence, ids in enumerate(tokens):
            for offset, token in enumerate(ids):
                batch.token[index] = token
                batch.pos[index] = position + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = offset == len(ids) - 1
                index += 1
        batch.n_tokens = index
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        pointer = llama_cpp.llama_get_logits(self._context)
        logits = np.ctypeslib.as_array(pointer, shape=(len(tokens), self._vocab_size))
        return logits.argmax(axis=1).tolist()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ubatch", type=int, default=512, help="llama.cpp's own default")
    parser.add_argument("--kv-unified", action="store_true", help="one cache for all sequences (every row sees it all)")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def main() -> None:
    args = parse_args(__doc__.split("\n")[0], ("bf16", "q8_0"), add_arguments)
    seq_len = args.prompt_len + args.output_len
    # The context is sized for each batch: attention over a cache with room for more sequences would cost more.
    contexts = {batch: BatchedContext(args, batch, seq_len) for batch in args.batches}
    workload = workload_of(args)

    def generate(batch: int, seed: int) -> tuple[BatchTiming, list[list[int]]]:
        context = contexts[batch]
        context.clear()
        start = perf_counter()
        steps = [context.forward(random_prompts(workload, batch, seed), 0)]
        first = perf_counter()
        for position in range(args.prompt_len, seq_len - 1):
            steps.append(context.forward([[token] for token in steps[-1]], position))
        end = perf_counter()
        decoded = batch * (args.output_len - 1)
        timing = BatchTiming(first - start, end - first, decoded, decoded + batch, end - start)
        return timing, [list(sequence) for sequence in zip(*steps, strict=True)]

    if args.tokens_only:
        print(generate(args.batches[0], 0)[1])
        return
    print_figures("llama.cpp", "llama-cpp-python", args, lambda batch, seed: generate(batch, seed)[0])


if __name__ == "__main__":
    main()
