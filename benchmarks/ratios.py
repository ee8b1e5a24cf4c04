"""What a comparison comes down to: the project's goals, and Quill's figures over those of others in the same run.

A figure is named `what/streams`: rates in tokens per second, times in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Figures = dict[str, float]

ENGINE, ENGINE_INT8, HTTP = "Quill engine bf16", "Quill engine int8", "Quill over HTTP"
LLAMA_BF16, LLAMA_Q8, LLAMA_SERVER = "llama.cpp bf16", "llama.cpp Q8_0", "llama-server bf16"
CT2_INT8, CT2_FLOAT32, TRANSFORMERS = "CTranslate2 int8", "CTranslate2 float32", "transformers bf16"
WIDE = (LLAMA_BF16, CT2_FLOAT32, TRANSFORMERS)
EIGHT_BITS = (LLAMA_Q8, CT2_INT8)
ANY = (*WIDE, *EIGHT_BITS)
CLIENTS = (1, 8, 32)


@dataclass(frozen=True)
class Goal:
    """`figure` of system `ours` is to be `least` times that of the best of `theirs`.

    `theirs` holds groups of systems in order of preference: the first group with a measured one counts.
    For a time (`is_time`) the ratio is theirs ÷ ours, so that more is better there too. None asks nothing.
    """

    name: str
    ours: str
    figure: str
    theirs: tuple[tuple[str, ...], ...]
    least: float | None
    their_figure: str | None = None
    is_time: bool = False


@dataclass(frozen=True)
class Ratio:
    """A goal and what was measured; without `value`, `missing` says which system had no figure."""

    goal: Goal
    ours: float | None
    theirs: float | None
    against: str
    missing: str = ""

    @property
    def value(self) -> float | None:
        if self.ours is None or self.theirs is None:
            return None
        return self.theirs / self.ours if self.goal.is_time else self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        return None if self.value is None or self.goal.least is None else self.value >= self.goal.least

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"value": self.value, "met": self.met}


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def cpu_goals() -> list[Goal]:
    """The CPU table of the project's goals, and behind it what is merely told."""
    in_server = ((LLAMA_SERVER,), (LLAMA_BF16,))
    http_least = {1: 1.0, 8: 1.5, 32: 2.0}
    goals = [
        Goal("decode, 1 stream, bf16", ENGINE, "decode/1", (WIDE,), 1.0),
        Goal("decode, 1 stream, int8", ENGINE_INT8, "decode/1", (EIGHT_BITS,), 1.0),
        Goal("decode, 8 streams, bf16", ENGINE, "decode/8", (ANY,), 1.5),
        Goal("decode, 32 streams, bf16", ENGINE, "decode/32", (ANY,), 1.75),
        Goal("decode, 32 streams, int8", ENGINE_INT8, "decode/32", (ANY,), 2.2),
        Goal("prefill, bf16", ENGINE, "prefill/32", (ANY,), 1.0),
        Goal("prefill, int8", ENGINE_INT8, "prefill/32", (ANY,), 1.4),
        Goal("decode, 8 streams at context 900, bf16", ENGINE, "long_decode/8", ((LLAMA_BF16,),), 1.5),
        Goal("decode, 8 streams at context 900, int8", ENGINE_INT8, "long_decode/8", ((LLAMA_BF16, LLAMA_Q8),), None),
        *(
            Goal(f"HTTP ÷ engine alone, {counted(n, 'client')}", HTTP, f"end_to_end/{n}", ((ENGINE,),), 0.95)
            for n in CLIENTS
        ),
        *(Goal(f"HTTP, {counted(n, 'client')}", HTTP, f"end_to_end/{n}", in_server, http_least[n]) for n in CLIENTS),
        *(
            Goal(
                f"HTTP, first token p50, {counted(n, 'client')}",
                HTTP, f"ttft_ms_p50/{n}", in_server, least, None, True,
            )
            for n, least in ((1, None), (8, 2.0), (32, 2.0))
        ),
        Goal(
            "first token p50 with a shared prefix of 512 tokens, cache off ÷ on",
            ENGINE, "prefix_on_ms/32", ((ENGINE,),), 5.0, "prefix_off_ms/32", True,
        ),
    ]  # fmt: skip
    told = [
        Goal(f"{ours}: {what.replace('_', ' ')}, {counted(n, 'stream')}", ours, f"{what}/{n}", (ANY,), None)
        for ours in (ENGINE, ENGINE_INT8)
        for what in ("end_to_end", "decode")
        for n in CLIENTS
    ]
    return goals + told


def compare(goals: Sequence[Goal], measured: Mapping[str, Figures]) -> list[Ratio]:
    """Every goal with what was measured for it."""
    return [_compare(goal, measured) for goal in goals]


def _compare(goal: Goal, measured: Mapping[str, Figures]) -> Ratio:
    ours = measured.get(goal.ours, {}).get(goal.figure)
    their_figure = goal.their_figure or goal.figure
    for group in goal.theirs:
        found = {name: measured[name][their_figure] for name in group if their_figure in measured.get(name, {})}
        if found:
            best = (min if goal.is_time else max)(found, key=lambda name: found[name])
            return Ratio(goal, ours, found[best], best, "" if ours is not None else goal.ours)
    names = [name for group in goal.theirs for name in group]
    return Ratio(goal, ours, None, "", goal.ours if ours is None else names[0] if len(names) == 1 else "any of theirs")
