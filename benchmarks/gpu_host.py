"""What the host does in a decode step, beside how long the step takes: microseconds, medians over steps."""

from __future__ import annotations

from functools import partial
from time import perf_counter

from benchmarks.gpu_engine import PARAMS, start_engine
from benchmarks.gpu_job import Figures, Job
from benchmarks.scaling import Stopwatch
from benchmarks.summary import median
from benchmarks.workload import Workload, random_prompts
from model.sampling_params import SamplingParams
from server.engine.launched_step import LaunchedStep
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest
from server.engine.model_runner import ModelRunner
from server.engine.scheduler import Scheduler
from server.engine.step_inputs import InputBuilder

WATCHED: dict[str, tuple[type, str]] = {
    "schedule": (Scheduler, "schedule"),
    "advance": (Scheduler, "advance"),
    "build": (InputBuilder, "build"),
    "decodes": (InputBuilder, "decodes"),
    "launch": (ModelRunner, "launch"),
    "wait": (LaunchedStep, "wait"),
    "settle": (Scheduler, "settle"),
}
# Steps before those that are timed: the first ones prefill, capture or fill caches of the host.
_WARM_UP = 8


def measure(job: Job, figures: Figures) -> None:
    engine = start_engine(job)
    for kind in PARAMS:
        for streams in (job.streams[0], job.streams[-1]):
            figures.add(f"{kind}/{streams}", partial(time_steps, job, engine, PARAMS[kind], streams))


def time_steps(job: Job, engine: LLMEngine, params: SamplingParams, streams: int) -> dict[str, float]:
    """Medians over steps in which all streams decode."""
    steps = 4 if job.tiny else 64
    _add_streams(job, engine, params, streams, 2 * _WARM_UP + steps)
    started: set[int] = set()
    while len(started) < streams:
        started |= {output.request_id for output in engine.step().outputs if output.token_ids}
    for _ in range(_WARM_UP):
        engine.step()
    samples = [_time_step(engine, streams) for _ in range(steps)]
    for request_id in range(streams):
        engine.abort(request_id)
    while engine.has_unfinished:
        engine.step()
    return {name: round(1e6 * median([sample[name] for sample in samples]), 1) for name in samples[0]}


def _add_streams(job: Job, engine: LLMEngine, params: SamplingParams, streams: int, spare: int) -> None:
    """Requests 0 … `streams` - 1, none of which ends before all have had `spare` tokens together."""
    vocab_size = engine.runner.model_config.vocab_size
    prompts = random_prompts(Workload(job.prompt_len, 0, vocab_size), streams, seed=streams)
    # While prompts are computed, in steps of a limited size, the first streams decode already.
    prefill_steps = -(-streams * job.prompt_len // engine.info.max_num_batched_tokens) + 1
    ends = SamplingParams(
        max_tokens=spare + prefill_steps + 2, temperature=params.temperature, top_p=params.top_p, ignore_eos=True
    )
    for request_id, prompt in enumerate(prompts):
        engine.add(AddRequest(request_id, prompt, ends, 0.0))


def _time_step(engine: LLMEngine, streams: int) -> dict[str, float]:
    """Seconds of one step: `step` all of it, `wait` for the device, `host` what is left, and the parts of that."""
    watch = Stopwatch()
    with watch.watching(**WATCHED):
        start = perf_counter()
        output = engine.step()
        total = perf_counter() - start
    assert len(output.outputs) == streams, "every stream decodes"
    part = {name: watch.parts.get(name, 0.0) for name in WATCHED}
    build = part["build"] + part["decodes"]
    return {
        "step": total,
        "wait": part["wait"],
        "host": total - part["wait"],
        "schedule": part["schedule"],
        "build": build,
        "launch": part["launch"] - build,
        "update": part["advance"] + part["settle"],
    }
