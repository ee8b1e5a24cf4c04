"""Statistics of a list of samples, in plain Python so that a load generator starts fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 … 100), interpolated linearly between neighbours as numpy's default does."""
    if not values:
        raise ValueError("a percentile needs at least one value")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def median(values: Sequence[float]) -> float:
    return percentile(values, 50)


@dataclass(frozen=True)
class Summary:
    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        """None without samples, as for the inter-token latency of one-token answers."""
        if not values:
            return None
        return cls(sum(values) / len(values), percentile(values, 50), percentile(values, 99))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def median_of_dicts(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Key by key the median over runs; every run must have the same keys."""
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError("runs to be compared must report the same figures")
    return {key: median([run[key] for run in runs]) for key in runs[0]}
