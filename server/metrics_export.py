"""The names of metrics: vLLM's where the meaning is the same, so that its dashboards and routers work, else quill:….

Names, labels and meanings were read beside vLLM's own (vllm/v1/metrics/loggers.py). Each of its metrics carries
`model_name` and `engine`; there is one engine, numbered 0. docs/metrics.md lists them for operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.engine.messages import PASSED, UNCHECKED

if TYPE_CHECKING:
    from server.metrics import Metrics

ENGINE = "0"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80, 160)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
_COUNTS = (0, 1, 2, 5, 10, 20)

ITERATION_TOKENS = "iteration_tokens_total"
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token", _SECONDS),
    "inter_token_latency_seconds": ("Between tokens", _SECONDS),
    "request_time_per_output_token_seconds": ("Mean time between a request's tokens", _SECONDS),
    "e2e_request_latency_seconds": ("From arrival to the last token", _SECONDS),
    "request_queue_time_seconds": ("From arrival to the first step", _SECONDS),
    "request_prefill_time_seconds": ("From the first step to the first token", _SECONDS),
    "request_decode_time_seconds": ("From the first token to the last", _SECONDS),
    "request_inference_time_seconds": ("From the first step to the last token", _SECONDS),
    "request_prompt_tokens": ("Prompt tokens of a request", _TOKENS),
    "request_generation_tokens": ("Generated tokens of a request", _TOKENS),
    "request_max_num_generation_tokens": ("Generated tokens of the longest of a request's n answers", _TOKENS),
    "request_prefill_kv_computed_tokens": ("Prompt tokens that the cache did not have", _TOKENS),
    "request_params_max_tokens": ("max_tokens of a request", _TOKENS),
    "request_params_n": ("n of a request", _COUNTS[1:]),
    "request_num_preemptions": ("How often a request was preempted", _COUNTS),
    ITERATION_TOKENS: ("Tokens computed in a step of the engine", _TOKENS),
}
"""Without vllm: in front; what they measure, and their buckets' upper bounds."""


class ServerCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._m = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    @property
    def _labels(self) -> dict[str, str]:
        return {"model_name": self._m.model_name, "engine": ENGINE}

    def _by_model(self, total: int, name: str) -> dict[str, float]:
        """A number of EngineStats as its models share it; only several are told apart."""
        models = self._m.engine.stats.models
        return {model.name: getattr(model, name) for model in models} or {self._m.model_name: total}

    def _gauges(self) -> Iterator[Metric]:
        stats = self._m.engine.stats
        used = stats.num_blocks - stats.num_free_blocks
        usage = used / stats.num_blocks if stats.num_blocks else 0.0
        num_waiting = self._by_model(stats.num_waiting, "num_waiting")
        yield self._gauge(
            "vllm:num_requests_running",
            "Sequences that run in the engine",
            self._by_model(stats.num_running, "num_running"),
        )
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait for their first step", num_waiting)
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Sequences that wait, all of them for room",
            labels=[*self._labels, "reason"],
        )
        for model, value in num_waiting.items():
            waiting.add_metric([model, ENGINE, "capacity"], value)
        yield waiting
        for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):  # the second one is what vLLM called it before
            yield self._gauge(f"vllm:{name}", "Share of KV blocks in use, 0 to 1", dict.fromkeys(self._m.models, usage))
        up = GaugeMetricFamily("quill:engine_up", "1 when the engine takes requests", labels=["model_name"])
        up.add_metric([self._m.model_name], self._m.engine.state == "ready")
        yield up
        yield from self._self_checks()
        yield from self._cache_config()

    def _self_checks(self) -> Iterator[Metric]:
        """Absent for models whose folders have nothing to compare with."""
        info = self._m.engine.info
        checked = [model for model in info.models if model.self_check.status != UNCHECKED] if info is not None else []
        family = GaugeMetricFamily(
            "quill:self_check_passed", "1 when the model computes what was stored with it", labels=["model_name"]
        )
        for model in checked:
            family.add_metric([model.name], model.self_check.status == PASSED)
        if checked:
            yield family

    def _cache_config(self) -> Iterator[Metric]:
        info = self._m.engine.info
        if info is None:
            return
        labels = self._labels | {
            "block_size": str(info.block_size),
            "cache_dtype": info.dtype,
            "enable_prefix_caching": str(self._m.prefix_caching),
            "num_gpu_blocks": str(info.num_blocks),
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's shape", labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        yield family

    def _counters(self) -> Iterator[Metric]:
        stats = self._m.engine.stats
        for name, text in (
            ("prompt_tokens", "Prompt tokens processed"),
            ("generation_tokens", "Tokens generated"),
            ("num_preemptions", "Sequences preempted for want of blocks"),
            ("prefix_cache_queries", "Prompt tokens looked up"),
            ("prefix_cache_hits", "Prompt tokens found in the cache"),
            ("spec_decode_num_drafts", "Guesses at the next tokens"),
            ("spec_decode_num_draft_tokens", "Tokens guessed"),
            ("spec_decode_num_accepted_tokens", "Tokens guessed right"),
        ):
            yield self._counter(name, text, self._by_model(getattr(stats, name), name))
        cached = {model: metrics.cached_tokens for model, metrics in self._m.models.items()}
        yield self._counter("prompt_tokens_cached", "Prompt tokens of ended requests that the cache had", cached)
        finished = {model: metrics.finished for model, metrics in self._m.models.items()}
        yield self._by_label("request_success", "Sequences ended, by reason", "finished_reason", finished)
        rejected = {self._m.model_name: self._m.rejected}
        yield self._by_label("admission_rejections", "Requests refused, by reason", "reason", rejected)
        http = CounterMetricFamily("quill:http_requests", "Answers, by route and class", labels=["route", "status"])
        for (route, status), count in self._m.http.items():
            http.add_metric([route, status], count)
        yield http

    def _histograms(self) -> Iterator[Metric]:
        for name, (text, _) in HISTOGRAMS.items():
            yield self._histogram(name, text, name)
        # What dashboards for earlier versions of vLLM ask for.
        yield self._histogram("time_per_output_token_seconds", "Between tokens", "inter_token_latency_seconds")

    def _histogram(self, name: str, text: str, source: str) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=[*self._labels])
        if source == ITERATION_TOKENS:
            self._m.iteration_tokens.add_to(family, [*self._labels.values()])
            return family
        for model, metrics in self._m.models.items():
            metrics.histograms[source].add_to(family, [model, ENGINE])
        return family

    def _gauge(self, name: str, text: str, values: dict[str, float]) -> Metric:
        """`values` by model."""
        family = GaugeMetricFamily(name, text, labels=[*self._labels])
        for model, value in values.items():
            family.add_metric([model, ENGINE], value)
        return family

    def _counter(self, name: str, text: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=[*self._labels])
        for model, value in values.items():
            family.add_metric([model, ENGINE], value)
        return family

    def _by_label(self, name: str, text: str, label: str, counts: dict[str, dict[str, int]]) -> Metric:
        """`counts` by model, and in it by the label's value."""
        family = CounterMetricFamily(f"vllm:{name}", text, labels=[*self._labels, label])
        for model, values in counts.items():
            for value, count in values.items():
                family.add_metric([model, ENGINE, value], count)
        return family
