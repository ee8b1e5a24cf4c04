"""transformers' `generate`, batched, greedy, in bfloat16 or float32.

python -m benchmarks.peers.transformers_peer --model HF_FOLDER --variant bf16
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.common import parse_args, print_figures, timing_by_difference, workload_of
from benchmarks.workload import BatchTiming, random_prompts

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu")


def main() -> None:
    args = parse_args(__doc__.split("\n")[0], tuple(DTYPES), add_arguments)
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.variant], local_files_only=True)
    model = model.to(args.device).eval()
    # Without an end token every sequence runs to its full length, and no logits processor is needed for that.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        input_ids = torch.tensor(prompts, device=args.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=new_tokens,
            )
        generated = output[:, input_ids.shape[1] :]
        if generated.shape != (len(prompts), new_tokens):
            raise RuntimeError(f"generate returned {tuple(generated.shape)}, not {(len(prompts), new_tokens)}")
        return generated.tolist()

    workload = workload_of(args)
    if args.tokens_only:
        print(generate(random_prompts(workload, args.batches[0], 0), args.output_len))
        return

    def run_batch(batch: int, seed: int) -> BatchTiming:
        return timing_by_difference(generate, random_prompts(workload, batch, seed), args.output_len)

    print_figures("transformers", "transformers", args, run_batch)


if __name__ == "__main__":
    main()
