"""What `python -m training generate` does once its options are read: prompts in, samples out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.atomic_folder import replace_file
from model.beam_search import BeamParams
from model.errors import TokenizerError
from model.generate import PromptError, check_prompt
from model.sampling_params import SamplingParams
from training.errors import RecipeError
from training.generate import Request, TextGenerator, seeded
from training.generation.prompts import Prompt
from training.generation.sample import Delta, Sample, sample_values
from training.generation.stopwatch import Stopwatch
from training.generation.terminal import printable

SEPARATOR = "---"
"""A line of its own between two texts."""


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts and how to continue them.

    `controls` are name=value choices of control tokens. `chat` makes each prompt a message, after one of the role
    system where there is one; None leaves it to who asks. With `beams` the samples are the best hypotheses.
    `stream` writes each text as it comes, one text after the other.
    """

    prompts: Sequence[Prompt]
    params: SamplingParams
    beams: BeamParams | None = None
    stop: tuple[str, ...] = ()
    num_samples: int = 1
    batch_size: int = 32
    controls: Sequence[str] = ()
    chat: bool | None = None
    system: str | None = None
    echo: bool = True
    stream: bool = False

    def __post_init__(self) -> None:
        if self.beams is not None and self.num_samples > self.beams.num_beams:
            raise RecipeError(
                f"--num-samples is {self.num_samples} but --beams gives {self.beams.num_beams}; ask for more beams"
            )


@dataclass(frozen=True, slots=True)
class Result:
    prompt: Prompt
    samples: list[Sample]

    def values(self) -> dict[str, Any]:
        return {"prompt": self.prompt.text, "samples": [sample_values(sample) for sample in self.samples]}


def run_job(generator: TextGenerator, job: Job, watch: Stopwatch) -> list[Result]:
    """All samples. Raises PromptError or TokenizerError, naming a file's line, before the first is made."""
    ids = all_prompt_ids(generator, job)
    if job.beams is not None:
        return _search(generator, job, ids, job.beams, watch)
    requests = [Request(each, params, job.stop) for each in ids for params in seeded(job.params, job.num_samples)]
    run = _run_streaming if job.stream else _run_batched
    samples = run(generator, job, requests, watch)
    starts = range(0, len(samples), job.num_samples)
    groups = [samples[start : start + job.num_samples] for start in starts]
    return [Result(prompt, group) for prompt, group in zip(job.prompts, groups, strict=True)]


def _run_batched(generator: TextGenerator, job: Job, requests: Sequence[Request], watch: Stopwatch) -> list[Sample]:
    deltas = watch.timed(generator.stream_requests(requests, batch_size=job.batch_size))
    samples = {delta.index: delta.sample for delta in deltas if delta.sample is not None}
    return [samples[index] for index in range(len(requests))]


def _run_streaming(generator: TextGenerator, job: Job, requests: Sequence[Request], watch: Stopwatch) -> list[Sample]:
    """One after the other, each written to the standard output as it comes."""
    samples = []
    for index, request in enumerate(requests):
        if index:
            print(SEPARATOR)
        if job.echo:
            print(printable(job.prompts[index // job.num_samples].text), end="", flush=True)
        deltas = generator.stream(request.token_ids, request.params, stop=request.stop)
        samples.append(_write_stream(watch.timed(deltas)))
    return samples


def _search(
    generator: TextGenerator, job: Job, prompts: Sequence[Sequence[int]], beams: BeamParams, watch: Stopwatch
) -> list[Result]:
    """The `num_samples` best hypotheses of each prompt."""
    results = []
    for prompt, ids in zip(job.prompts, prompts, strict=True):
        watch.start()
        samples = generator.beam_search(ids, beams)[: job.num_samples]
        watch.count(sum(len(sample.token_ids) for sample in samples))
        results.append(Result(prompt, samples))
    return results


def all_prompt_ids(generator: TextGenerator, job: Job) -> list[list[int]]:
    """The ids of every prompt, each checked, so that a bad line is known before the first text is made."""
    ids = []
    for prompt in job.prompts:
        try:
            ids.append(_ids(generator, job, prompt))
            check_prompt(ids[-1], generator.model.config)
        except (PromptError, RecipeError, TokenizerError) as error:
            if prompt.place is None:
                raise
            raise type(error)(f"{prompt.place}: {error}") from None
    return ids


def lines(results: Sequence[Result], *, echo: bool) -> list[str]:
    """The texts for a reader, with a line between two of them."""
    texts = [
        printable((result.prompt.text if echo else "") + sample.text) for result in results for sample in result.samples
    ]
    return [line for text in texts for line in (SEPARATOR, text)][1:]


def check_out(path: Path) -> None:
    """Raise RecipeError for a file that is there already or whose folder is not: before the work, not after it."""
    if path.exists():
        raise RecipeError(f"--out {path} is there already; choose another name or remove it")
    if not path.parent.is_dir():
        raise RecipeError(f"--out {path}: its folder is not there; make it first")


def write_results(path: Path, results: Sequence[Result]) -> None:
    """A JSON object for each text, a line each, with its prompt; the file appears whole or not at all.

    Raises CheckpointError when the disk refuses.
    """
    rows = [{"prompt": result.prompt.text, **sample_values(each)} for result in results for each in result.samples]
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _ids(generator: TextGenerator, job: Job, prompt: Prompt) -> list[int]:
    if not job.chat:
        return generator.prompt_ids(prompt.text, job.controls)
    system = [] if job.system is None else [{"role": "system", "content": job.system}]
    return generator.chat_ids([*system, {"role": "user", "content": prompt.text}])


def _write_stream(deltas: Iterator[Delta]) -> Sample:
    sample = None
    for delta in deltas:
        print(printable(delta.text), end="", flush=True)
        sample = delta.sample
    print()
    assert sample is not None, "the last delta of a request has its sample"
    return sample
