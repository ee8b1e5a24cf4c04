"""What one server counts and measures, for Prometheus; `server.metrics_export` gives it its names.

The engine's numbers are read from its last message at scrape time; the rest is counted here. Every label has a
closed set of values: nothing a client sends becomes a label.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from server.engine.interface import EngineClient
from server.engine.messages import RequestTimings
from server.metrics_export import HISTOGRAMS, ITERATION_TOKENS, ServerCollector

FINISH_REASONS = ("stop", "length", "deadline", "abort", "error")
REJECTIONS = ("queue_full", "deadline_unreachable", "loading", "draining", "engine_down")
STATUS_CLASSES = ("2xx", "3xx", "4xx", "5xx")

_WAIT_MEMORY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class FinishedSequence:
    """A sequence that has come to its end. `seconds` passed since its request came; the engine's `timings` may be
    missing. `max_tokens` is None for what generates nothing."""

    reason: str
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    timings: RequestTimings | None
    cached_tokens: int = 0
    max_tokens: int | None = None


class _Wait:
    """How long the recent requests of one pool waited for their first token: a running mean, soon forgotten."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._at = -_WAIT_MEMORY_SECONDS

    @property
    def is_recent(self) -> bool:
        return time.monotonic() - self._at < _WAIT_MEMORY_SECONDS

    def remember(self, seconds: float) -> None:
        self.seconds += (0.2 if self.is_recent else 1.0) * (seconds - self.seconds)
        self._at = time.monotonic()


class Histogram:
    """Counts in buckets. Cheaper than the client library's, which locks: the event loop is the only writer."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        """Enter it into a family of metrics, under these values of its labels."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, map(float, self._bounds)), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(labels, buckets, self._sum)


class ModelMetrics:
    """What is counted of one model's requests. `histograms` are by their names in HISTOGRAMS."""

    def __init__(self) -> None:
        self.cached_tokens = 0
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.histograms = {
            name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items() if name != ITERATION_TOKENS
        }

    def add(self, name: str, value: float, count: int = 1) -> None:
        self.histograms[name].add(value, count)


class Metrics:
    """What one server counts; `render` gives the exposition text. Requests that name no model count as the first's."""

    def __init__(
        self,
        engine: EngineClient,
        model_name: str,
        *,
        prefix_caching: bool,
        routes: list[str],
        further_models: Sequence[str] = (),
    ) -> None:
        self.model_name = model_name
        self.models = {name: ModelMetrics() for name in (model_name, *further_models)}
        self.engine = engine
        self.prefix_caching = prefix_caching
        self.rejected = dict.fromkeys(REJECTIONS, 0)
        self.http = {(route, status): 0 for route in [*routes, "other"] for status in STATUS_CLASSES}
        self.iteration_tokens = Histogram(HISTOGRAMS[ITERATION_TOKENS][1])
        engine.on_step = self.iteration_tokens.add
        self._waits: dict[int, _Wait] = {}
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(ServerCollector(self))

    def register(self, collector: Collector) -> None:
        """Let `render` show what is counted elsewhere."""
        self._registry.register(collector)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def count_http(self, route: str, status: int) -> None:
        key = (route, f"{status // 100}xx")
        if key not in self.http:
            key = ("other", key[1])
        self.http[key] += 1

    def count_rejection(self, code: str) -> None:
        if code in self.rejected:
            self.rejected[code] += 1

    def of(self, model: str) -> ModelMetrics:
        return self.models.get(model) or self.models[self.model_name]

    def count_finish(self, reason: str, count: int = 1, model: str = "") -> None:
        finished = self.of(model).finished
        finished[reason if reason in finished else "error"] += count

    def observe_tokens(self, seconds: float, count: int, *, first: bool, pool: int = 0, model: str = "") -> None:
        """`count` tokens arrived together, `seconds` after the previous ones or, the first, after the request.

        None at all arrive where a deadline passes; a request that gets none has waited for a token all the same.
        """
        if first:
            self._waits.setdefault(pool, _Wait()).remember(seconds)
            if count:
                self.of(model).add("time_to_first_token_seconds", seconds)
        elif count:
            self.of(model).add("inter_token_latency_seconds", seconds / count, count)

    def observe_finish(self, ended: FinishedSequence, model: str = "") -> None:
        self.count_finish(ended.reason, model=model)
        self.of(model).cached_tokens += ended.cached_tokens
        add = self.of(model).add
        add("e2e_request_latency_seconds", ended.seconds)
        add("request_prompt_tokens", ended.prompt_tokens)
        add("request_generation_tokens", ended.generated_tokens)
        add("request_prefill_kv_computed_tokens", ended.prompt_tokens - ended.cached_tokens)
        if ended.max_tokens is not None:
            add("request_params_max_tokens", ended.max_tokens)
        if ended.timings is not None:
            self._observe_timings(ended.timings, ended.generated_tokens, self.of(model))

    @staticmethod
    def _observe_timings(timings: RequestTimings, generated: int, metrics: ModelMetrics) -> None:
        add = metrics.add
        add("request_num_preemptions", timings.num_preemptions)
        if not timings.first_scheduled:
            return
        add("request_queue_time_seconds", max(0.0, timings.first_scheduled - timings.arrival))
        if not timings.finished:
            return
        add("request_inference_time_seconds", timings.finished - timings.first_scheduled)
        if timings.first_token:
            decode = timings.finished - timings.first_token
            add("request_prefill_time_seconds", timings.first_token - timings.first_scheduled)
            add("request_decode_time_seconds", decode)
            if generated > 1:
                add("request_time_per_output_token_seconds", decode / (generated - 1))

    def observe_request(self, n: int, most_tokens: int, model: str = "") -> None:
        """All `n` answers to a prompt have ended, the longest of them with `most_tokens`."""
        self.of(model).add("request_params_n", n)
        self.of(model).add("request_max_num_generation_tokens", most_tokens)

    def expected_wait(self, pool: int = 0) -> float:
        """Seconds a new request will wait for its first token, by what recent ones of its pool of clients met; 0 when
        nothing waits."""
        wait = self._waits.get(pool)
        return wait.seconds if wait is not None and wait.is_recent and self.engine.stats.num_waiting else 0.0
