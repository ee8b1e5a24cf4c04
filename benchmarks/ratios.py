"""What a comparison comes down to: Quill's figures over those of the best other system in the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.systems import CLIENTS, Figures


@dataclass(frozen=True)
class Ratio:
    """`value` = ours ÷ theirs. `goal` is what the project asks of it, if it asks."""

    name: str
    streams: int
    ours: float
    theirs: float
    against: str
    goal: float | None = None

    @property
    def value(self) -> float:
        return self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.value >= self.goal

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"value": self.value, "met": self.met}


def ratios(engine: Figures | None, http: Figures | None, peers: Mapping[str, Figures]) -> list[Ratio]:
    """All ratios that the measured systems allow; goals apply at 8 and 32 streams."""
    found: list[Ratio] = []
    for streams in CLIENTS:
        asked = streams > 1
        whole = f"end_to_end/{streams}"
        if http is not None:
            ours = http[whole]
            found += _against_best("HTTP ÷ best peer, prefill included", ours, peers, whole, 1.0 if asked else None)
            found += _against_best("HTTP ÷ best peer's decoding alone", ours, peers, f"decode/{streams}", None)
            if (them := peers.get("transformers bf16")) is not None:
                goal = 2.0 if asked else None
                found.append(Ratio("HTTP ÷ transformers", streams, ours, them[whole], "transformers bf16", goal))
            if engine is not None:
                goal = 0.9 if asked else None
                found.append(Ratio("HTTP ÷ engine alone", streams, ours, engine[whole], "Quill engine", goal))
        if engine is not None:
            for what in ("end_to_end", "decode", "prefill"):
                key = f"{what}/{streams}"
                found += _against_best(f"engine ÷ best peer, {what.replace('_', ' ')}", engine[key], peers, key, None)
    return found


def _against_best(name: str, ours: float, peers: Mapping[str, Figures], key: str, goal: float | None) -> list[Ratio]:
    if not peers:
        return []
    best = max(peers, key=lambda peer: peers[peer][key])
    return [Ratio(name, int(key.rpartition("/")[2]), ours, peers[best][key], best, goal)]
