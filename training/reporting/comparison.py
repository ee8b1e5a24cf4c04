"""Several runs beside each other: curves over what they share, and the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.reporting.figures import NOISY, Chart, Curve, curve_style, smooth
from training.reporting.run_record import RunRecord, is_number

Setting = tuple[str, tuple[str, ...]]

# Where a run lies and how often it speaks does not change what it learns.
_NOT_COMPARED = frozenset({"run.dir", "run.wandb", "run.tensorboard", "train.log_interval"})


@dataclass(frozen=True, slots=True)
class Comparison:
    """`labels` tell the runs apart; `differences` are rows of a key and each run's value."""

    runs: Sequence[RunRecord]
    labels: Sequence[str]
    charts: Sequence[Chart]
    differences: Sequence[Setting]
    winner: RunRecord | None
    note: str


def compare(runs: Sequence[RunRecord]) -> Comparison:
    """Runs on different data are compared by bits per byte, and runs with different steps by tokens."""
    labels = _labels(runs)
    same_data = len({_data_of(run) for run in runs}) <= 1
    measure = "loss" if same_data or not _all_have(runs, "bits_per_byte") else "bits_per_byte"
    note = "" if same_data else (
        "The runs saw different data: bits per byte can be compared where the text is the same, losses per token "
        "only with the same tokenizer."
    )  # fmt: skip
    charts = [chart for chart in (_chart(runs, labels, measure, kind) for kind in ("val", "train")) if chart.curves]
    return Comparison(runs, labels, charts, _differences([run.config for run in runs]), _winner(runs, measure), note)


def _chart(runs: Sequence[RunRecord], labels: Sequence[str], measure: str, split: str) -> Chart:
    over = "step" if len({_tokens_per_step(run) for run in runs}) <= 1 else "tokens"
    measure = measure if split == "val" else "loss"
    curves, legend = [], []
    for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
        lines = [
            line for line in (run.val if split == "val" else run.train)
            if is_number(line.get(measure)) and is_number(line.get(over))
        ]  # fmt: skip
        if lines:
            colour, dashed = curve_style(index)
            values = [line[measure] for line in lines]
            if len(values) > NOISY and split == "train":
                values = list(smooth(values))
            curves.append(Curve([line[over] for line in lines], values, colour, dashed=dashed, strong=True))
            legend.append((colour, dashed, label))
    unit = "nats per token" if measure == "loss" else "bits per byte"
    title = "Validation" if split == "val" else "Training, means of neighbours where there are many"
    return Chart(split, title, over, unit, curves, "log", legend=legend)


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """Folder names, with their parents where two are the same."""
    names = Counter(run.name for run in runs)
    return [
        run.name if names[run.name] == 1 else str(run.folder) for run in runs
    ]  # fmt: skip


def _differences(configs: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Setting]:
    flat = [{f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()}
            for config in configs]  # fmt: skip
    rows = []
    for key in sorted({key for values in flat for key in values} - _NOT_COMPARED):
        values = [values.get(key) for values in flat]
        if any(value != values[0] for value in values):
            rows.append((key, tuple("not set" if value is None else str(value) for value in values)))
    return rows


def _winner(runs: Sequence[RunRecord], measure: str) -> RunRecord | None:
    scores = [(run.best[measure], index) for index, run in enumerate(runs)
              if run.best is not None and is_number(run.best.get(measure))]  # fmt: skip
    return runs[min(scores)[1]] if scores else None


def _all_have(runs: Sequence[RunRecord], measure: str) -> bool:
    return all(is_number(line.get(measure)) for run in runs for line in run.val)


def _data_of(run: RunRecord) -> str:
    return run.provenance.data or str(run.config.get("data", {}).get("dir"))


def _tokens_per_step(run: RunRecord) -> float | None:
    line = next((line for line in reversed(run.train) if is_number(line.get("tokens")) and line["step"]), None)
    return None if line is None else line["tokens"] / line["step"]
