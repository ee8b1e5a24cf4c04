"""CTranslate2's generator, batched, greedy, with int8 or float32 weights.

python -m benchmarks.peers.ctranslate2_peer --model CONVERTED_FOLDER --variant int8
"""

from __future__ import annotations

import json

import ctranslate2

from benchmarks.peers.common import parse_args, print_figures, timing_by_difference, workload_of
from benchmarks.workload import BatchTiming, random_prompts


def main() -> None:
    args = parse_args(__doc__.split("\n")[0], ("int8", "float32"))
    generator = ctranslate2.Generator(
        str(args.model), device="cpu", compute_type=args.variant, inter_threads=1, intra_threads=args.threads
    )
    # The generator speaks in token strings; ids are their places in its vocabulary.
    tokens: list[str] = json.loads((args.model / "vocabulary.json").read_text())

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        results = generator.generate_batch(
            [[tokens[i] for i in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        ids = [result.sequences_ids[0] for result in results]
        if any(len(sequence) != new_tokens for sequence in ids):
            raise RuntimeError(f"generate_batch returned {[len(s) for s in ids]} tokens, not {new_tokens} each")
        return ids

    workload = workload_of(args)
    if args.tokens_only:
        print(generate(random_prompts(workload, args.batches[0], 0), args.output_len))
        return

    def run_batch(batch: int, seed: int) -> BatchTiming:
        return timing_by_difference(generate, random_prompts(workload, batch, seed), args.output_len)

    print_figures("ctranslate2", "ctranslate2", args, run_batch)


if __name__ == "__main__":
    main()
