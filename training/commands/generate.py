"""`python -m training generate`: text from a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.commands import generate_options as options
from training.commands.options import DeviceOption, DtypeOption, JsonFlag, model_folder, print_result
from training.launch import share_cores

if TYPE_CHECKING:
    from training.generation.job import Job, Result

# Options that cannot be meant together: refused, not ignored.
_NOT_WITH = {
    "prompts": ("prompt",),
    "greedy": ("temperature",),
    "chat": ("control",),
    "interactive": ("prompt", "prompts", "num_samples", "out", "as_json", "logprobs", "stream", "batch_size", "beams"),
    "stream": ("as_json", "out", "batch_size"),
    "beams": (
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("logit_bias", "seed", "greedy", "stop", "logprobs", "stream", "batch_size"),
    ),
}
_ONLY_WITH = {
    "length_penalty": ("beams",),
    "early_stopping": ("beams",),
    "system": ("chat", "interactive"),
    "logprobs": ("as_json", "out"),
}


def generate_command(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, or a name on the Hub")],
    prompt: options.Prompt = "",
    prompts: options.Prompts = None,
    control: options.Control = None,
    chat: options.ChatMode = None,
    system: options.System = None,
    interactive: options.Interactive = False,
    max_tokens: options.MaxTokens = 256,
    min_tokens: options.MinTokens = 0,
    temperature: options.Temperature = 0.8,
    greedy: options.Greedy = False,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.Penalty = 0.0,
    frequency_penalty: options.Penalty = 0.0,
    logit_bias: options.LogitBias = None,
    stop: options.Stop = None,
    stop_token_id: options.StopTokenId = None,
    ignore_eos: options.IgnoreEos = False,
    seed: options.Seed = 0,
    num_samples: options.NumSamples = 1,
    beams: options.Beams = None,
    length_penalty: options.LengthPenalty = 1.0,
    early_stopping: options.EarlyStopping = "off",
    stream: options.Stream = False,
    echo: options.Echo = True,
    logprobs: options.LogprobsOption = None,
    out: options.Out = None,
    verbose: options.Verbose = False,
    batch_size: options.BatchSize = 32,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    as_json: JsonFlag = False,
) -> None:
    """Continue prompts with a checkpoint: one, a file of them, or a conversation."""
    _check_together(context)
    share_cores()
    from model.beam_search import BeamParams
    from model.sampling_params import SamplingParams
    from training.generation.job import Job
    from training.generation.prompts import Prompt, read_prompts
    from training.generation.settings import parse_logit_bias, parse_stops

    params = SamplingParams(
        max_tokens=max_tokens, min_tokens=min_tokens, temperature=0.0 if greedy else temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, logit_bias=parse_logit_bias(logit_bias or ()), seed=seed,
        stop_token_ids=tuple(stop_token_id or ()), ignore_eos=ignore_eos, logprobs=logprobs,
    )  # fmt: skip
    params.require_tokens()
    beam_params = None if beams is None else BeamParams(
        num_beams=beams, max_tokens=max_tokens, min_tokens=min_tokens, length_penalty=length_penalty,
        early_stopping=early_stopping, stop_token_ids=params.stop_token_ids, ignore_eos=ignore_eos,
    )  # fmt: skip
    job = Job(
        prompts=[Prompt(prompt)] if prompts is None else read_prompts(prompts), params=params, beams=beam_params,
        stop=parse_stops(stop or ()), num_samples=num_samples, batch_size=batch_size, controls=control or [],
        chat=chat, system=system, echo=echo, stream=stream,
    )  # fmt: skip
    run = _converse if interactive else _continue
    run(model_folder(checkpoint), job, out=out, verbose=verbose, device=device, dtype=dtype, as_json=as_json)


def _continue(
    checkpoint: Path, job: Job, *, out: Path | None, verbose: bool, device: str, dtype: str, as_json: bool
) -> None:
    from training.build import DTYPES
    from training.generate import TextGenerator
    from training.generation.job import check_out, run_job, write_results
    from training.generation.stopwatch import Stopwatch

    if out is not None:
        check_out(out)
    watch = Stopwatch()
    generator = TextGenerator.load(checkpoint, device=device, dtype=DTYPES[dtype])
    results = run_job(generator, job, watch)
    if out is not None:
        write_results(out, results)
    if not job.stream:
        _show(results, job, out, as_json)
    if verbose:
        print(watch.describe(), file=sys.stderr)


def _show(results: list[Result], job: Job, out: Path | None, as_json: bool) -> None:
    from training.generation.job import lines

    if out is not None:
        count = sum(len(result.samples) for result in results)
        print_result(
            as_json, {"out": str(out), "prompts": len(results), "samples": count}, [f"{count:,} texts in {out}"]
        )
        return
    each = [result.values() for result in results]
    single = all(prompt.place is None for prompt in job.prompts)
    print_result(as_json, each[0] if single else {"results": each}, [] if as_json else lines(results, echo=job.echo))


def _converse(checkpoint: Path, job: Job, *, verbose: bool, device: str, dtype: str, **_: Any) -> None:
    from training.build import DTYPES
    from training.generate import TextGenerator
    from training.generation.repl import converse

    converse(TextGenerator.load(checkpoint, device=device, dtype=DTYPES[dtype]), job, verbose=verbose)


def _check_together(context: typer.Context) -> None:
    """Raise RecipeError for options of which one would have no effect."""
    from training.errors import RecipeError

    given = {name for name, value in context.params.items() if value is not False and _is_given(context, name)}
    for name, others in _NOT_WITH.items():
        for other in others:
            if {name, other} <= given:
                raise RecipeError(f"{_flag(other)} has no meaning with {_flag(name)}; leave out one of them")
    for name, others in _ONLY_WITH.items():
        if name in given and not given & set(others):
            raise RecipeError(f"{_flag(name)} needs {' or '.join(map(_flag, others))} beside it")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _flag(name: str) -> str:
    return "--json" if name == "as_json" else "--" + name.replace("_", "-")
