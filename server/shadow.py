"""Shadows: how well another checkpoint predicts what clients and the live model wrote.

A share of a model's answers is scored, prompt and answer, by the model itself and by its candidate, through the same
engine as POST /score. That happens while the server has nothing else to do: one text at a time, begun only when no
request is in flight and dropped, to be begun again, as soon as one comes. A request can then find at most the engine's
present step in its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.engine.interface import EngineClient, EngineRequestError, EngineUnavailableError, QueueFullError
from server.lifecycle import Lifecycle
from server.provenance import context_of, engine_name
from server.splits import Shadow

logger = logging.getLogger("server")

_SCORE_ONLY = SamplingParams(max_tokens=0)
_MOST_WAITING = 256
# Seconds between two looks at whether the server has other work.
_GLANCE = 0.01
_LABELS = ["model_name", "candidate", "part"]


@dataclass(slots=True)
class Answer:
    """Token ids of a prompt and of what was answered."""

    model: str
    prompt: list[int]
    tokens: list[int]


@dataclass(slots=True)
class Scores:
    """Sums in nats over `num_tokens` tokens, by the live model and by its candidate."""

    num_tokens: int = 0
    live: float = 0.0
    candidate: float = 0.0

    @property
    def difference(self) -> float:
        """Nats per token by which the candidate is worse; NaN before the first token."""
        return (self.candidate - self.live) / self.num_tokens if self.num_tokens else math.nan

    def add(self, live: list[float], candidate: list[float]) -> None:
        self.num_tokens += len(live)
        self.live -= math.fsum(live)
        self.candidate -= math.fsum(candidate)


@dataclass(slots=True)
class Pair:
    """A live model and its shadow. `share` grows by the fraction with each answer; at 1 an answer is scored."""

    shadow: Shadow
    share: float = 0.0
    num_scored: int = 0
    num_dropped: int = 0
    parts: dict[str, Scores] = field(default_factory=lambda: {"prompt": Scores(), "answer": Scores()})


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether each id stands for the same bytes in both: only then can log-probabilities be compared."""
    if a.vocab_size != b.vocab_size or a.special_tokens != b.special_tokens:
        return False
    return all(a.token_bytes(token_id) == b.token_bytes(token_id) for token_id in range(a.vocab_size))


class Shadows(Collector):
    """All shadows of a server, and their metrics."""

    def __init__(self, shadows: dict[str, Shadow], engine: EngineClient, lifecycle: Lifecycle) -> None:
        self.pairs = {live: Pair(shadow) for live, shadow in shadows.items()}
        self._engine, self._lifecycle = engine, lifecycle
        self._waiting: deque[Answer] = deque()
        self._task: asyncio.Task[None] | None = None

    def offer(self, model: str, prompt: list[int], tokens: list[int]) -> None:
        """An answer has ended. It is scored later, if it is one of the share; where too many wait it is dropped."""
        pair = self.pairs[model]
        pair.share += pair.shadow.fraction
        if pair.share < 1.0 or not tokens:
            return
        pair.share -= 1.0
        if len(self._waiting) >= _MOST_WAITING:
            pair.num_dropped += 1
            return
        self._waiting.append(Answer(model, prompt, tokens))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _work(self) -> None:
        while self._waiting and self._engine.state == "ready":
            if self._lifecycle.num_active:
                await asyncio.sleep(_GLANCE)
                continue
            answer = self._waiting[0]
            scoring = asyncio.create_task(self._score(answer))
            try:
                while not scoring.done() and not self._lifecycle.num_active:
                    await asyncio.wait({scoring}, timeout=_GLANCE)
            finally:
                scoring.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await scoring
            if not scoring.cancelled():
                self._waiting.popleft()

    async def _score(self, answer: Answer) -> None:
        """By both models, as much of the text as both can read."""
        pair, info = self.pairs[answer.model], self._engine.info
        assert info is not None, "an engine that answered has said what it serves"
        models = answer.model, pair.shadow.candidate
        longest = min(context_of(info, model) for model in models) + 1
        text = (answer.prompt + answer.tokens)[:longest]
        try:
            live, candidate = [await self._logprobs(text, engine_name(info, model)) for model in models]
        except (EngineRequestError, EngineUnavailableError, QueueFullError) as error:
            logger.warning("an answer of %s was not scored by its shadow: %s", answer.model, error)
            pair.num_dropped += 1
            return
        pair.num_scored += 1
        first = len(answer.prompt) - 1  # the text's first token has no log-probability
        pair.parts["prompt"].add(live[:first], candidate[:first])
        pair.parts["answer"].add(live[first:], candidate[first:])

    async def _logprobs(self, text: list[int], model: str | None) -> list[float]:
        """Of each token but the first. Aborted with the task."""
        stream = self._engine.submit(text, _SCORE_ONLY, prompt_logprobs=0, model=model)
        try:
            found = [entry.logprob async for output in stream for entry in output.prompt_logprobs or ()]
        finally:
            stream.abort()
        if len(found) != len(text) - 1:
            raise EngineRequestError("the engine gave up on it")
        return found

    def collect(self) -> Iterator[Metric]:
        """Nothing where no model has a shadow."""
        if not self.pairs:
            return
        tokens = CounterMetricFamily("quill:shadow_tokens", "Tokens that shadows have scored", labels=_LABELS)
        live = CounterMetricFamily("quill:shadow_live_nll", "Nats that these cost the live model", labels=_LABELS)
        shadow = CounterMetricFamily("quill:shadow_nll", "Nats that they cost its candidate", labels=_LABELS)
        difference = GaugeMetricFamily(
            "quill:shadow_nll_difference", "Nats per token by which the candidate is worse", labels=_LABELS
        )
        answers = CounterMetricFamily(
            "quill:shadow_answers", "Answers chosen for a shadow", labels=["model_name", "candidate", "outcome"]
        )
        for name, pair in self.pairs.items():
            for part, scores in pair.parts.items():
                labels = [name, pair.shadow.candidate, part]
                tokens.add_metric(labels, scores.num_tokens)
                live.add_metric(labels, scores.live)
                shadow.add_metric(labels, scores.candidate)
                difference.add_metric(labels, scores.difference)
            answers.add_metric([name, pair.shadow.candidate, "scored"], pair.num_scored)
            answers.add_metric([name, pair.shadow.candidate, "dropped"], pair.num_dropped)
        yield from (tokens, live, shadow, difference, answers)
