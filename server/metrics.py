"""Prometheus metrics under vLLM's names where the meaning is the same, so that its dashboards and routers work.

The engine's numbers are read from its last message at scrape time; the rest is counted here. Every label has a
closed set of values: nothing a client sends becomes a label.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.engine.interface import EngineClient
from server.engine.messages import RequestTimings

FINISH_REASONS = ("stop", "length", "deadline", "abort", "error")
REJECTIONS = ("queue_full", "deadline_unreachable", "loading", "draining", "engine_down")
STATUS_CLASSES = ("2xx", "3xx", "4xx", "5xx")

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80, 160)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
_WAIT_MEMORY_SECONDS = 10.0


class Histogram:
    """Counts in buckets. Cheaper than the client library's, which locks: the event loop is the only writer."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, name: str, text: str, model: str) -> HistogramMetricFamily:
        total, buckets = 0, []
        for bound, count in zip((*map(str, map(float, self._bounds)), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        family.add_metric([model], buckets, self._sum)
        return family


class Metrics:
    """What one server counts; `render` gives the exposition text."""

    def __init__(self, engine: EngineClient, model_name: str, *, prefix_caching: bool, routes: list[str]) -> None:
        self.model_name = model_name
        self.engine = engine
        self.prefix_caching = prefix_caching
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.rejected = dict.fromkeys(REJECTIONS, 0)
        self.http = {(route, status): 0 for route in [*routes, "other"] for status in STATUS_CLASSES}
        self.time_to_first_token = Histogram(_SECONDS)
        self.inter_token_latency = Histogram(_SECONDS)
        self.e2e_latency = Histogram(_SECONDS)
        self.queue_time = Histogram(_SECONDS)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        self.iteration_tokens = Histogram(_TOKENS)
        engine.on_step = self.iteration_tokens.add
        self._first_token_wait = 0.0
        self._first_token_at = -_WAIT_MEMORY_SECONDS
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_ServerCollector(self))

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

    def count_finish(self, reason: str, count: int = 1) -> None:
        self.finished[reason if reason in self.finished else "error"] += count

    def observe_tokens(self, seconds: float, count: int, *, first: bool) -> None:
        """`count` tokens arrived together, `seconds` after the previous ones or, the first, after the request.

        None at all arrive where a deadline passes; a request that gets none has waited for a token all the same.
        """
        if first:
            self._remember_wait(seconds)
            if count:
                self.time_to_first_token.add(seconds)
        elif count:
            self.inter_token_latency.add(seconds / count, count)

    def observe_finish(
        self, reason: str, prompt: int, generated: int, seconds: float, timings: RequestTimings | None
    ) -> None:
        self.count_finish(reason)
        self.e2e_latency.add(seconds)
        self.prompt_tokens.add(prompt)
        self.generation_tokens.add(generated)
        if timings is not None and timings.first_scheduled:
            self.queue_time.add(max(0.0, timings.first_scheduled - timings.arrival))

    def _remember_wait(self, seconds: float) -> None:
        now = time.monotonic()
        weight = 0.2 if now - self._first_token_at < _WAIT_MEMORY_SECONDS else 1.0
        self._first_token_wait += weight * (seconds - self._first_token_wait)
        self._first_token_at = now

    def expected_wait(self) -> float:
        """Seconds a new request will wait for its first token, by what recent ones met; 0 when nothing waits."""
        recent = time.monotonic() - self._first_token_at < _WAIT_MEMORY_SECONDS
        return self._first_token_wait if recent and self.engine.stats.num_waiting else 0.0


class _ServerCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._m = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        stats, info = self._m.engine.stats, self._m.engine.info
        used = stats.num_blocks - stats.num_free_blocks
        usage = used / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("vllm:num_requests_running", "Sequences that run in the engine", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait for their first step", stats.num_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", usage)
        yield self._gauge("quill:engine_up", "1 when the engine takes requests", self._m.engine.state == "ready")
        if info is not None:
            labels = {
                "model_name": self._m.model_name,
                "block_size": str(info.block_size),
                "num_gpu_blocks": str(info.num_blocks),
                "enable_prefix_caching": str(self._m.prefix_caching),
            }
            family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's shape", labels=list(labels))
            family.add_metric(list(labels.values()), 1)
            yield family

    def _counters(self) -> Iterator[Metric]:
        stats = self._m.engine.stats
        yield self._counter("vllm:prompt_tokens", "Prompt tokens processed", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated", stats.generation_tokens)
        yield self._counter("vllm:num_preemptions", "Sequences preempted for want of blocks", stats.num_preemptions)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up", stats.prefix_cache_queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache", stats.prefix_cache_hits)
        for name, help_text, value in (
            ("num_drafts", "Guesses at the next tokens", stats.spec_decode_num_drafts),
            ("num_draft_tokens", "Tokens guessed", stats.spec_decode_num_draft_tokens),
            ("num_accepted_tokens", "Tokens guessed right", stats.spec_decode_num_accepted_tokens),
        ):
            yield self._counter(f"vllm:spec_decode_{name}", help_text, value)
        finished = CounterMetricFamily(
            "vllm:request_success", "Sequences ended, by reason", labels=["model_name", "finished_reason"]
        )
        for reason, count in self._m.finished.items():
            finished.add_metric([self._m.model_name, reason], count)
        yield finished
        rejected = CounterMetricFamily(
            "vllm:admission_rejections", "Requests refused, by reason", labels=["model_name", "reason"]
        )
        for reason, count in self._m.rejected.items():
            rejected.add_metric([self._m.model_name, reason], count)
        yield rejected
        http = CounterMetricFamily("quill:http_requests", "Answers, by route and class", labels=["route", "status"])
        for (route, status), count in self._m.http.items():
            http.add_metric([route, status], count)
        yield http

    def _histograms(self) -> Iterator[Metric]:
        m = self._m
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token", m.time_to_first_token),
            ("inter_token_latency_seconds", "Between tokens", m.inter_token_latency),
            ("e2e_request_latency_seconds", "From arrival to the last token", m.e2e_latency),
            ("request_queue_time_seconds", "From arrival to the first step", m.queue_time),
            ("request_prompt_tokens", "Prompt tokens of a request", m.prompt_tokens),
            ("request_generation_tokens", "Generated tokens of a request", m.generation_tokens),
            ("iteration_tokens_total", "Tokens computed in a step of the engine", m.iteration_tokens),
        ):
            yield histogram.family(f"vllm:{name}", text, m.model_name)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._m.model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self._m.model_name], value)
        return family
