"""What has been tried of a watched folder and how it went: for /info and /metrics. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.reload_gate import VERDICTS, Measured


@dataclass(frozen=True, slots=True)
class Attempt:
    """One checkpoint that was tried. Losses are in nats per token of the same text; None where it came to none."""

    checkpoint: str
    weights: str | None
    step: int | None
    verdict: str
    reason: str | None
    loss: float | None
    live_loss: float | None
    seconds: float

    def values(self) -> dict[str, object]:
        return {
            "checkpoint": self.checkpoint,
            "weights": self.weights,
            "step": self.step,
            "verdict": self.verdict,
            "reason": self.reason,
            "scores": {"candidate": _finite(self.loss), "live": _finite(self.live_loss)},
            "seconds": round(self.seconds, 3),
        }


@dataclass
class Reloads:
    """`watching` is the watched folder's name, `model` that of the model it is for; `live` what the weights that are
    served were measured to do, None until it is known."""

    model: str
    watching: str
    live_weights: str | None = None
    live: Measured | None = None
    last_attempt: Attempt | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VERDICTS, 0))
    error: str | None = None
    """Why nothing can be judged, and so nothing is reloaded."""

    def record(self, attempt: Attempt) -> None:
        self.last_attempt = attempt
        self.counts[attempt.verdict] += 1

    def values(self) -> dict[str, object]:
        """For /info."""
        loss = None if self.live is None else _finite(self.live.loss)
        return {
            "model": self.model,
            "watching": self.watching,
            "live": {"weights": self.live_weights, "loss": loss},
            "last_attempt": None if self.last_attempt is None else self.last_attempt.values(),
            "error": self.error,
        }


class ReloadCollector(Collector):
    """`quill:reloads_total` by verdict, the losses of the live weights and of the last candidate, and its seconds."""

    def __init__(self, reloads: Reloads) -> None:
        self._reloads = reloads

    def collect(self) -> Iterator[Metric]:
        reloads = self._reloads
        family = CounterMetricFamily(
            "quill:reloads", "Checkpoints that were tried, by verdict", labels=["model_name", "verdict"]
        )
        for verdict, count in reloads.counts.items():
            family.add_metric([reloads.model, verdict], count)
        yield family
        last = reloads.last_attempt
        for name, text, value in (
            (
                "live_nll",
                "Nats per token of held-out text: the live weights",
                None if reloads.live is None else reloads.live.loss,
            ),
            (
                "candidate_nll",
                "Nats per token of held-out text: the last checkpoint tried",
                None if last is None else last.loss,
            ),
            ("reload_seconds", "How long the last checkpoint's trial took", None if last is None else last.seconds),
        ):
            if value is not None:
                gauge = GaugeMetricFamily(f"quill:{name}", text, labels=["model_name"])
                gauge.add_metric([reloads.model], value)
                yield gauge


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
