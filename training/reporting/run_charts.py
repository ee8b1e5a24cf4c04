"""Which charts a run's page shows: those for which metrics.jsonl has numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.reporting.figures import NOISY, Chart, Curve, smooth
from training.reporting.run_record import Line, RunRecord, is_number


@dataclass(frozen=True, slots=True)
class _Panel:
    """A chart of one number of the training lines, multiplied by `factor`."""

    name: str
    title: str
    label: str
    scale: str = "zero"
    factor: float = 1.0
    percent: bool = False


_PANELS = (
    _Panel("lr", "Learning rate", "learning rate"),
    _Panel("tokens_per_second", "Throughput", "tokens per second"),
    _Panel("mfu", "Model FLOPs utilisation", "share of the device's peak", factor=100.0, percent=True),
    _Panel("grad_norm", "Gradient norm, before clipping", "norm", scale="log"),
    _Panel("memory", "Peak memory", "GiB", factor=2.0**-30),
)


def run_charts(run: RunRecord) -> list[Chart]:
    charts = [_loss_chart(run)] if run.train or run.val else []
    for panel in _PANELS:
        points = _points(run.train, panel.name)
        if points:
            x, y = [step for step, _ in points], [value * panel.factor for _, value in points]
            charts.append(
                Chart(panel.name, panel.title, "step", panel.label, [Curve(x, y)], panel.scale, panel.percent)
            )
    return charts


def _loss_chart(run: RunRecord) -> Chart:
    curves, legend = [], []
    steps, losses = [line["step"] for line in run.train], [line["loss"] for line in run.train]
    if len(losses) > NOISY:
        curves += [Curve(steps, losses, faint=True), Curve(steps, list(smooth(losses)), strong=True)]
        legend.append((0, False, "training (faint: as logged, strong: mean of neighbours)"))
    elif losses:
        curves.append(Curve(steps, losses))
        legend.append((0, False, "training"))
    if run.val:
        curves.append(Curve([line["step"] for line in run.val], [line["loss"] for line in run.val], colour=1))
    best, mark = run.best, None
    if best is not None:
        legend.append((1, False, f"validation (ring: best, {best['loss']:.4f} at step {best['step']:,})"))
        mark = best["step"], best["loss"]
    return Chart("loss", "Loss", "step", "nats per token", curves, "log", mark=mark, legend=legend)


def _points(lines: Sequence[Line], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if is_number(line.get(name))]
