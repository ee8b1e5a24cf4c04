"""Bars for the comparison of tokenizers, drawn by matplotlib without its global state. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from model.file_errors import naming_file
from training.errors import RecipeError
from training.tokenizers.analyze import Analysis

FORMATS = (".png", ".svg", ".pdf")
_COLOUR, _INK = "#4269a5", "#333333"
_PANELS: tuple[tuple[str, Callable[[Analysis], float], str], ...] = (
    ("vocabulary", lambda row: row.vocab_size, "{:,.0f}"),
    ("tokens per word", lambda row: row.tokens_per_word, "{:.2f}"),
    ("characters per token", lambda row: row.characters_per_token, "{:.2f}"),
    ("bytes per token", lambda row: row.bytes_per_token, "{:.2f}"),
    ("words kept whole (%)", lambda row: 100 * row.whole_rate, "{:.1f}"),
    ("unknown words (%)", lambda row: 100 * row.unknown_rate, "{:.2f}"),
)
_COLUMNS = 3


def check_plot_path(path: Path) -> None:
    """Raises RecipeError for a name that says no format, or a folder that does not exist."""
    if path.suffix.lower() not in FORMATS:
        raise RecipeError(f"--plot {path} must end in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise RecipeError(f"--plot {path}: the folder {path.parent} does not exist; make it first")


def plot_analyses(rows: Sequence[Analysis], path: Path) -> None:
    """A panel for each measure, a bar for each tokenizer. Raises RecipeError when the disk refuses."""
    from matplotlib.figure import Figure

    num_lines = -(-len(_PANELS) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, num_lines * (1.0 + 0.36 * len(rows))), layout="constrained")
    labels = [_label(row.name) for row in rows]
    positions = range(len(rows))
    axes = figure.subplots(num_lines, _COLUMNS, sharey=True, squeeze=False)
    for axis, (title, measure, form) in zip(axes.flat, _PANELS, strict=True):
        values = [measure(row) for row in rows]
        bars = axis.barh(positions, values, color=_COLOUR, height=0.65)
        axis.bar_label(bars, labels=[form.format(value) for value in values], padding=3, color=_INK, fontsize=9)
        axis.set_title(title, fontsize=11, color=_INK, loc="left")
        axis.set_yticks(positions, labels)
        axis.set_xlim(0, 1.25 * (max(values) or 1.0))
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="y", length=0, colors=_INK)
    axes.flat[0].invert_yaxis()
    with naming_file(path, "written", RecipeError):
        figure.savefig(path, dpi=150)


def _label(name: str) -> str:
    """The end of a path, where names differ. A dollar sign would begin a formula."""
    parts = [part for part in Path(name).parts if part not in ("tokenizer.json", "/")]
    label = parts[-1] if parts else name
    return (label if len(label) <= 24 else "…" + label[-23:]).replace("$", r"\$")
