"""Make a checkpoint with random weights: speed does not depend on what the weights say.

python -m benchmarks.make_model --preset gpt2 --out DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.checkpoint import save_model
from model.errors import QuillError
from model.presets import create_config
from model.tokenizer import Tokenizer
from model.transformer import Transformer

GPT2_VOCAB_SIZE = 50_257


def make_model(preset: str, out: Path, seed: int = 0, **overrides: Any) -> None:
    """Write a checkpoint folder in float32, with GPT-2's tokenizer where the vocabulary is GPT-2's.

    `overrides` are fields of the preset's config. Raises ConfigError for an unknown preset or field and CheckpointError
    if the folder cannot be written.
    """
    config = create_config(preset, **overrides)
    model = Transformer(config)
    model.init_weights(seed)
    tokenizer = Tokenizer.gpt2() if config.vocab_size == GPT2_VOCAB_SIZE else None
    out.parent.mkdir(parents=True, exist_ok=True)
    save_model(out, model, tokenizer=tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        make_model(args.preset, args.out, args.seed)
    except QuillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
