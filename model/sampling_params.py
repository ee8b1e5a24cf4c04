"""What a request may ask of the sampler, free of torch so that the API process can build it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from model.errors import InvalidSamplingParamsError
from model.grammar import Grammar

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one sequence; the bounds are those of the HTTP contract.

    Filters apply in this order: logit_bias, penalties, temperature, top_k, top_p, min_p.
    `temperature == 0` means greedy; `top_k == 0`, `top_p == 1` and `min_p == 0` mean off.
    `max_tokens` counts generated tokens; 0 is for the engine, which may be asked to score a prompt and no more.
    `logprobs` asks for that many alternatives per generated token, taken from the raw model distribution (None: no
    log-probabilities at all).
    `grammar` bars, before the filters, every token that its language does not allow next. EOS is allowed only where a
    text of the language is whole, and the sequence ends where nothing could follow.

    Raises InvalidSamplingParamsError, naming the field, for a value out of its bounds.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 0, "max_tokens", "must not be negative")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "must lie between 0 and max_tokens")
        _require_range("temperature", self.temperature, 0.0, 2.0)
        _require(self.top_k >= 0, "top_k", "must be 0 (off) or positive")
        _require_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require_range("min_p", self.min_p, 0.0, 1.0)
        _require_range("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for value in self.logit_bias.values():
            _require_range("logit_bias", value, -100.0, 100.0)
        _require(0 <= self.seed <= MAX_SEED, "seed", f"must lie between 0 and {MAX_SEED}")
        if self.logprobs is not None:
            _require(0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"must lie between 0 and {MAX_LOGPROBS}")

        if self.grammar is not None:
            _require(self.min_tokens == 0, "min_tokens", "must be 0 with a grammar, which says where the text ends")

    def require_tokens(self) -> None:
        """Raises InvalidSamplingParamsError if no token is asked for."""
        _require(self.max_tokens >= 1, "max_tokens", "must be at least 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _require(condition: bool, name: str, rule: str) -> None:
    if not condition:
        raise InvalidSamplingParamsError(name, rule)


def _require_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    above = value > low if open_low else value >= low
    if not (math.isfinite(value) and above and value <= high):
        bracket = "(" if open_low else "["
        raise InvalidSamplingParamsError(name, f"must lie in {bracket}{low:g}, {high:g}]")
