"""Line charts as inline SVG, drawn by matplotlib without its global state and the same bytes for the same data.

Colours are the page's custom properties, so that a chart follows the reader's light or dark scheme; names of curves
stand in the page beside it, so no text of the user's gets into the drawing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from training.reporting.quantities import compact

Floats = npt.NDArray[np.float64]

MAX_POINTS = 2_000
# Up to so many values noise is no trouble, and a mean over neighbours would hide more than it shows.
NOISY = 100
NUM_COLOURS = 8
_MARKED_POINTS = 40
_MANY_POINTS = 200
_STEPS = (1, 2, 2.5, 5, 10)
# Colours that stand for custom properties until the drawing is done; matplotlib writes them as they are.
_INK, _GRID = "#0a0b01", "#0a0b02"
_COLOURS = tuple(f"#0a0c{index:02x}" for index in range(NUM_COLOURS))
_PROPERTIES = {_INK: "var(--ink-soft)", _GRID: "var(--grid)"} | {
    colour: f"var(--curve-{index})" for index, colour in enumerate(_COLOURS)
}
# A second sign beside colour, for eyes that tell few colours apart.
_DASHES: tuple[object, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1.5, 2)))
_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "quill", "font.size": 11, "path.simplify": False}


@dataclass(frozen=True, slots=True)
class Curve:
    """`y` over `x`, equally long. `colour` counts the curves; `faint` is for noise, `strong` for its trend."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False
    strong: bool = False
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """`scale`: "log" spreads what decays, "zero" begins at nothing. `mark` rings a point.

    `percent`: the numbers are percentages. `legend` (colour, dashed, name) is for the page to show.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    scale: str = "linear"
    percent: bool = False
    mark: tuple[float, float] | None = None
    legend: Sequence[tuple[int, bool, str]] = ()


def draw(chart: Chart) -> str:
    """An <svg> element for inline use. At most MAX_POINTS points a curve are drawn, its peaks and dips among them."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 3.5), facecolor="none")
        # Room for the longest labels: fixed, so that charts below each other line up, and quick.
        axes = figure.add_axes((0.15, 0.16, 0.82, 0.81), facecolor="none")
        for curve in chart.curves:
            _plot(axes, curve)
        _dress(axes, chart)
        buffer = io.StringIO()
        canvas: Any = FigureCanvasSVG(figure)  # print_svg has no types; print_figure has, but draws everything twice
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _for_the_page(buffer.getvalue(), chart)


def curve_style(index: int) -> tuple[int, bool]:
    """Colour and dashes of the index-th of many curves."""
    return index % NUM_COLOURS, index >= NUM_COLOURS


def thin(x: Floats, y: Floats, limit: int = MAX_POINTS) -> tuple[Floats, Floats]:
    """At most `limit` of the points: first, lowest, highest and last of each of limit/4 stretches (Jugel et al. 2014).

    What is drawn from them looks like the whole, and no spike is lost.
    """
    if len(x) <= limit:
        return x, y
    kept: set[int] = set()
    for part in np.array_split(np.arange(len(x)), limit // 4):
        kept |= {int(part[0]), int(part[np.argmin(y[part])]), int(part[np.argmax(y[part])]), int(part[-1])}
    order = np.array(sorted(kept))
    return x[order], y[order]


def smooth(y: Sequence[float]) -> Floats:
    """Means over a window of a fiftieth of the values, centred, shorter at both ends."""
    values = np.asarray(y, dtype=np.float64)
    half = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    means: Floats = (sums[high] - sums[low]) / (high - low)
    return means


def _plot(axes: Axes, curve: Curve) -> None:
    x, y = thin(np.asarray(curve.x, dtype=np.float64), np.asarray(curve.y, dtype=np.float64))
    if not len(x):
        return
    many = len(x) > _MANY_POINTS and not curve.strong
    axes.plot(
        x, y, color=_COLOURS[curve.colour], linestyle=_DASHES[1] if curve.dashed else "-",
        linewidth=0.8 if curve.faint else 1.2 if many else 1.8, alpha=0.4 if curve.faint else 1.0,
        marker="o" if len(x) <= _MARKED_POINTS and not curve.faint else None, markersize=3.5,
    )  # fmt: skip


def _dress(axes: Axes, chart: Chart) -> None:
    axes.set_xlabel(chart.x_label, color=_INK)
    axes.set_ylabel(chart.y_label, color=_INK)
    axes.tick_params(colors=_INK, length=3)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}%" if chart.percent else compact(value)))
    _scale(axes, chart)
    if chart.mark is not None:
        x, y = chart.mark
        axes.plot([x], [y], "o", markersize=9, markerfacecolor="none", markeredgecolor=_INK, markeredgewidth=1.4)


def _scale(axes: Axes, chart: Chart) -> None:
    values = [value for curve in chart.curves for value in curve.y]
    places = {place for curve in chart.curves for place in curve.x}
    if chart.scale == "log" and values and min(values) > 0 and max(values) / min(values) > 3:
        axes.set_yscale("log")
        decades = np.log10(max(values) / min(values))
        steps = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1.3 else (1, 2, 5) if decades < 3 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
    axes.margins(x=0.02, y=0.1)
    if len(places) == 1:
        (only,) = places
        axes.set_xlim(only - 1, only + 1)
    if chart.scale == "zero":
        axes.set_ylim(bottom=0)


def _for_the_page(svg: str, chart: Chart) -> str:
    """Without prologue and metadata; colours become custom properties, and ids the chart's own."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{chart.name}-", svg)
    for colour, name in _PROPERTIES.items():
        svg = svg.replace(colour, name)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{chart.title}" ', 1).strip()
