"""report.html: one run, or several beside each other, as a page that needs nothing but itself.

    write_report(Path("runs/shakespeare"))                    # runs/shakespeare/report.html
    write_comparison([Path("runs/a"), Path("runs/b")], out)

The page works from the disk and offline: no scripts, no fonts, no images from elsewhere; its content policy forbids
them, and what users wrote (names, settings) is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from model.atomic_folder import replace_file
from model.errors import CheckpointError
from training.errors import RecipeError
from training.reporting.comparison import Comparison, compare
from training.reporting.figures import Chart, draw
from training.reporting.quantities import compact, duration
from training.reporting.run_charts import run_charts
from training.reporting.run_record import Line, RunRecord, finite, is_number, read_run

REPORT_FILE = "report.html"
_UNKNOWN = "–"


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """The run's page, written whole or not at all, to `out` or RUN/report.html. Returns where it is.

    Raises RecipeError for a folder that holds no run and for an `out` that cannot be written.
    """
    run = read_run(run_dir)
    page = _template("report.html").render(
        title=run.run_id, status=run.status, facts=_facts(run), best=_best(run), settings=_settings(run),
        charts=_figures(run_charts(run)), validations=_validations(run), config=run.config_toml,
    )  # fmt: skip
    return _write(out or run_dir / REPORT_FILE, page)


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """A page of several runs: their validation curves, results, and the settings in which they differ."""
    comparison = compare([read_run(folder) for folder in run_dirs])
    page = _template("comparison.html").render(
        title=f"{len(run_dirs)} runs", charts=_figures(comparison.charts), runs=_results(comparison),
        differences=comparison.differences, note=comparison.note,
    )  # fmt: skip
    return _write(out, page)


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("training.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name)


def _write(path: Path, page: str) -> Path:
    try:
        replace_file(path, page.encode("utf-8", errors="replace"))
    except CheckpointError as error:
        raise RecipeError(f"{error}; name another file with --out") from None
    return path


def _figures(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    return [{"title": chart.title, "svg": draw(chart), "legend": chart.legend} for chart in charts]


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """What the run is and what it cost, in a line each."""
    model, speed = run.model, _median(run.train, "tokens_per_second")
    shape = model and f"{model.architecture}, {model.num_layers} layers × {model.hidden_size} wide"
    mfu, skipped = _median(run.train, "mfu"), run.train[-1].get("skipped_steps") if run.train else None
    return [
        ("Model", f"{run.parameters:,} parameters" if run.parameters else _UNKNOWN),
        ("Shape", f"{shape}, context {model.max_seq_len:,}, vocabulary {model.vocab_size:,}" if model else _UNKNOWN),
        ("Data", f"{run.provenance.data[:19]}…" if run.provenance.data else _UNKNOWN),
        ("Trained on", f"{run.tokens:,} tokens" if run.tokens else _UNKNOWN),
        ("Time in steps", duration(run.seconds) if run.seconds else _UNKNOWN),
        *([("Skipped", f"{skipped:,} steps, whose loss or gradient was no number")] if skipped else []),
        ("Speed", _UNKNOWN if speed is None else f"{speed:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if mfu else "")),
    ]


def _best(run: RunRecord) -> dict[str, str] | None:
    best = run.best
    if best is None:
        return None
    return {
        "loss": f"{best['loss']:.4f}",
        "perplexity": _number(_perplexity(best), ".2f"),
        "bits_per_byte": _number(best.get("bits_per_byte"), ".4f"),
        "step": f"{best['step']:,}",
    }


_KEY_SETTINGS = (
    "data.dir", "model.preset", "model.init_from", "train.max_steps", "train.batch_size", "train.seq_len",
    "train.grad_accum_steps", "train.optimizer", "train.lr", "train.schedule", "train.warmup_steps",
    "train.weight_decay", "train.dtype", "train.seed",
)  # fmt: skip


def _settings(run: RunRecord) -> list[tuple[str, str]]:
    pairs = [(key, *key.split(".")) for key in _KEY_SETTINGS]
    return [
        (key, str(run.config[section][name])) for key, section, name in pairs if name in run.config.get(section, {})
    ]


def _validations(run: RunRecord) -> list[dict[str, Any]]:
    train = {line["step"]: line["loss"] for line in run.train}
    return [
        {
            "is_best": line is run.best,
            "cells": (
                f"{line['step']:,}", _number(line.get("tokens"), ",d"), f"{line['loss']:.4f}",
                _number(_perplexity(line), ".2f"), _number(line.get("bits_per_byte"), ".4f"),
                _number(train.get(line["step"]), ".4f"),
            ),
        }
        for line in run.val
    ]  # fmt: skip


def _results(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each run; the lowest loss is marked."""
    rows = []
    for label, run in zip(comparison.labels, comparison.runs, strict=True):
        best = run.best or {}
        rows.append({
            "label": label, "is_best": run is comparison.winner,
            "cells": (
                run.status, _number(best.get("step"), ",d"), _number(best.get("loss"), ".4f"),
                _number(_perplexity(best), ".2f"), _number(best.get("bits_per_byte"), ".4f"),
                _short(run.parameters), _short(run.tokens),
                _number(_median(run.train, "tokens_per_second"), ",.0f"),
                duration(run.seconds) if run.seconds else _UNKNOWN,
            ),
        })  # fmt: skip
    return rows


def _perplexity(line: Line) -> float | None:
    loss = line.get("loss")
    return math.exp(loss) if is_number(loss) and loss < 700 else None


def _median(lines: Sequence[Line], name: str) -> float | None:
    values = sorted(line[name] for line in lines if is_number(line.get(name)) and line[name] > 0)
    return float(values[len(values) // 2]) if values else None


def _short(value: float | None) -> str:
    return _UNKNOWN if value is None else compact(value)


def _number(value: Any, form: str) -> str:
    value = finite(value)
    return _UNKNOWN if value is None else format(int(value) if form.endswith("d") else value, form)
