"""What a run on a card comes down to: the project's goals beside what was measured, and a few ratios that have none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

from benchmarks.gpu_job import Job

Results = dict[str, dict[str, Any]]
"""Part → what `benchmarks.gpu_process.run_part` returned."""

SWITCHED = {
    "no overlap": "with ÷ without overlap",
    "no graphs": "with ÷ without graphs",
    "deterministic": "free ÷ deterministic",
    "varlen": "our kernels ÷ torch's varlen",
}
"""What the parts that switch something are held against the engine's defaults for."""


class MissingFigureError(Exception):
    """A figure that the run does not have, with the reason where there is one."""


@dataclass(frozen=True, slots=True)
class Row:
    """`least` is the goal, None for what is only told; `missing` says why nothing was measured."""

    name: str
    unit: str
    least: float | None
    measured: float | None
    missing: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return f"not measured: {self.missing}"
        if self.least is None:
            return ""
        return "met" if self.measured >= self.least else "MISSED"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def find(results: Results, part: str, figure: str, key: str) -> float:
    """Raises MissingFigureError."""
    result = results.get(part)
    if result is None:
        raise MissingFigureError(f"part {part} was not asked for")
    value = result["figures"].get(figure)
    if value is None:
        reason = str(result.get("error") or result.get("skipped") or "no such figure").rpartition("\n")[2]
    elif value.get(key) is not None:
        return float(value[key])
    else:
        reason = str(value.get("error") or value.get("skipped") or f"no {key}").partition("\n")[0]
    raise MissingFigureError(f"{part}, {figure}: {reason[:120]}")


def goal_rows(results: Results, job: Job) -> list[Row]:
    """The goals in the order of the parts' importance, then what is only told."""
    one, many = job.streams[0], job.streams[-1]
    large = f"{job.large_preset}, {one} stream"
    engine = partial(speed, results, job)
    share = partial(large_share, results, job)
    correct = partial(equal_share, results)
    rows = [
        _row("attention of GPT-2's heads equals the reference", "of backends", 1.0, partial(attention_share, results)),
        _row(
            f"sampling kernel draws torch's tokens, {many} rows",
            "of rows",
            0.99,
            partial(correct, f"sampling/{many}", "rows"),
        ),
        _row(
            f"greedy tokens of {job.compared} prompts are generate()'s, float32",
            "of prompts",
            1.0,
            partial(correct, "greedy float32", "prompts"),
        ),
        _row(f"GPT-2, {one} stream, decoding", "tokens/s", 3_000, partial(engine, one)),
        _row(
            f"GPT-2, {many} streams, in {job.prompt_len} / out {job.output_len}",
            "tokens/s",
            100_000,
            partial(engine, many),
        ),
        _row(
            f"over HTTP, {many} clients ÷ engine",
            "times",
            0.9,
            lambda: find(results, "http", f"greedy/{many}", "end_to_end") / engine(many),
        ),
        _row(f"{large}, decoding", "tokens/s", 960, partial(engine, one, "large")),
        _row(f"{large}, weights read", "of copy bandwidth", 0.7, partial(share, "copy", "gb_per_second")),
        _row(
            f"{large}, weights read (data sheet)",
            "of data-sheet bandwidth",
            None,
            partial(share, "card", "data_sheet_gb_per_second"),
        ),
        _row(
            f"GPT-2, {many} streams ÷ transformers' continuous batching",
            "times",
            10.0,
            lambda: engine(many) / best_batching(results, many),
        ),
        _row(
            f"GPT-2, {one} stream, decoding ÷ transformers' generate()",
            "times",
            None,
            lambda: engine(one) / find(results, "transformers", f"generate/{one}", "decode"),
        ),
        _row(f"sampled ÷ greedy, {many} streams", "times", None, lambda: engine(many, kind="sampled") / engine(many)),
    ]
    for (part, name), streams in product(SWITCHED.items(), (one, many)):
        rows.append(_row(f"{name}, streams: {streams}", "times", None, partial(speed_up, results, job, streams, part)))
    return rows


def speed(results: Results, job: Job, streams: int, part: str = "engine", kind: str = "greedy") -> float:
    """Tokens per second: of one stream while it decodes, of many with their prefill. Raises MissingFigureError."""
    return find(results, part, f"{kind}/{streams}", "decode" if streams == job.streams[0] else "end_to_end")


def speed_up(results: Results, job: Job, streams: int, part: str) -> float:
    """Of the engine's defaults over those of a part that switches something. Raises MissingFigureError."""
    return speed(results, job, streams) / speed(results, job, streams, part)


def large_share(results: Results, job: Job, figure: str, key: str) -> float:
    """Bytes of weights that one stream's steps read in a second, over a bandwidth of the card."""
    weights = find(results, "large", "start", "weight_bytes")
    return speed(results, job, job.streams[0], "large") * weights / 1e9 / find(results, "device", figure, key)


def equal_share(results: Results, figure: str, of: str) -> float:
    return find(results, "correct", figure, "equal") / find(results, "correct", figure, of)


def _row(name: str, unit: str, least: float | None, measure: Callable[[], float]) -> Row:
    try:
        return Row(name, unit, least, measure())
    except MissingFigureError as error:
        return Row(name, unit, least, None, str(error))


def attention_share(results: Results) -> float:
    """Of the backends that were checked for GPT-2. Raises MissingFigureError without any."""
    figures = results.get("correct", {}).get("figures", {})
    checked = [value for name, value in figures.items() if name.startswith("attention ")]
    if not checked:
        raise MissingFigureError("no backend was checked")
    return sum("within" in value for value in checked) / len(checked)


def best_batching(results: Results, streams: int) -> float:
    """The better of the two ways in which transformers was run. Raises MissingFigureError without either."""
    rates: list[float] = []
    missing = ""
    for way in ("default", "sized"):
        try:
            rates.append(find(results, "transformers", f"batching, {way}/{streams}", "end_to_end"))
        except MissingFigureError as error:
            missing = str(error)
    if not rates:
        raise MissingFigureError(missing)
    return max(rates)
