"""`python -m training generate`: text from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.commands.options import DeviceOption, DtypeOption, JsonFlag, print_result


def generate_command(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder")],
    prompt: Annotated[str, typer.Option(help="text to continue; empty starts from the end-of-text token")] = "",
    max_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 256,
    temperature: Annotated[float, typer.Option(help="0 = greedy")] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 = off")] = 0,
    top_p: Annotated[float, typer.Option(help="1 = off")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 = off")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 = off")] = 1.0,
    seed: Annotated[int, typer.Option(help="the same seed gives the same text")] = 0,
    num_samples: Annotated[int, typer.Option(min=1, help="texts to generate, with seeds seed, seed + 1 …")] = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    as_json: JsonFlag = False,
) -> None:
    """Continue a prompt with a checkpoint."""
    from dataclasses import replace

    from model.sampling_params import SamplingParams
    from training.build import DTYPES
    from training.generate import generate_from_checkpoint

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    each = [replace(params, seed=seed + number) for number in range(num_samples)]
    samples = generate_from_checkpoint(checkpoint, prompt, each, device=device, dtype=DTYPES[dtype])
    values = {"prompt": prompt, "samples": [
        {"text": s.text, "token_ids": s.token_ids, "finish_reason": s.finish_reason, "seed": s.seed} for s in samples
    ]}  # fmt: skip
    print_result(as_json, values, lines=[prompt + sample.text for sample in samples])
