"""What the scheduler counts for each set of weights, and what that set allows. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What the sequences of one set of weights have done since the start."""

    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def add(self, other: Counters) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """What one set of weights allows: see Scheduler."""

    max_model_len: int
    max_draft_rows: int
