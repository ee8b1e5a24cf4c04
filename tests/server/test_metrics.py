"""vLLM's metrics beyond the counters of test_ops.py: each measures what its name says."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from server.engine.messages import RequestTimings
from server.metrics import FinishedSequence, Histogram, Metrics
from server.metrics_export import HISTOGRAMS
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine, Plan, says

pytestmark = pytest.mark.anyio


def samples(text: str) -> dict[str, float]:
    """Each sample without labels of its own by its name; buckets are left out."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if set(sample.labels) <= {"model_name", "engine"}:
                assert sample.name not in found, sample.name
                found[sample.name] = sample.value
    return found


def metrics_of(engine: FakeEngine) -> Metrics:
    return Metrics(engine, "tiny", prefix_caching=True, routes=[])


async def test_a_request_is_taken_apart_into_its_times(engine: FakeEngine) -> None:
    metrics = metrics_of(engine)
    timings = RequestTimings(arrival=10.0, first_scheduled=10.5, first_token=12.0, finished=16.0, num_preemptions=2)
    metrics.observe_finish(FinishedSequence("length", 30, 9, 6.5, timings, cached_tokens=16, max_tokens=9))
    found = samples(metrics.render().decode())
    expected = {
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 1.5,
        "request_decode_time_seconds": 4.0,
        "request_inference_time_seconds": 5.5,
        "request_time_per_output_token_seconds": 0.5,
        "e2e_request_latency_seconds": 6.5,
        "request_prompt_tokens": 30,
        "request_prefill_kv_computed_tokens": 14,
        "request_generation_tokens": 9,
        "request_params_max_tokens": 9,
        "request_num_preemptions": 2,
    }
    assert {name: found[f"vllm:{name}_sum"] for name in expected} == expected
    assert {found[f"vllm:{name}_count"] for name in expected} == {1}
    assert found["vllm:prompt_tokens_cached_total"] == 16


@pytest.mark.parametrize(
    ("timings", "generated", "without"),
    [
        (None, 4, {"queue_time", "prefill_time", "decode_time", "inference_time", "time_per_output_token"}),
        (
            RequestTimings(1.0, 0.0, 0.0, 2.0, 0),  # its deadline passed while it waited
            0,
            {"queue_time", "prefill_time", "decode_time", "inference_time", "time_per_output_token"},
        ),
        (RequestTimings(1.0, 1.5, 0.0, 2.0, 0), 0, {"prefill_time", "decode_time", "time_per_output_token"}),
        (RequestTimings(1.0, 1.5, 1.75, 1.75, 0), 1, {"time_per_output_token"}),
    ],
    ids=["unknown", "never-started", "scored", "one-token"],
)
async def test_times_that_there_were_not_are_not_counted(
    engine: FakeEngine, timings: RequestTimings | None, generated: int, without: set[str]
) -> None:
    metrics = metrics_of(engine)
    metrics.observe_finish(FinishedSequence("length", 3, generated, 1.0, timings))
    found = samples(metrics.render().decode())
    names = {"queue_time", "prefill_time", "decode_time", "inference_time", "time_per_output_token"}
    assert {name for name in names if found[f"vllm:request_{name}_seconds_count"] == 0} == without


async def test_n_and_the_longest_answer_are_counted_once_a_prompt(engine: FakeEngine) -> None:
    lengths = iter([2, 5, 3, 1])
    engine.script = lambda prompt, params: Plan([[97]] * next(lengths))
    async with client_for(make_app(engine)) as client:
        await client.post("/v1/completions", json={"prompt": ["aa", "bb"], "n": 2, "max_tokens": 9})
        found = samples((await client.get("/metrics")).text)
    assert (found["vllm:request_params_n_sum"], found["vllm:request_params_n_count"]) == (4, 2)
    assert found["vllm:request_max_num_generation_tokens_sum"] == 5 + 3
    assert found["vllm:request_params_max_tokens_sum"] == 4 * 9
    assert found["vllm:request_generation_tokens_sum"] == 11


async def test_cached_tokens_are_told_from_computed_ones(engine: FakeEngine) -> None:
    engine.script, engine.cached_tokens = says("abc"), 16
    async with client_for(make_app(engine)) as client:
        await client.post("/generate", json={"prompt": "a" * 20})
        found = samples((await client.get("/metrics")).text)
    assert found["vllm:prompt_tokens_cached_total"] == 16
    assert found["vllm:request_prefill_kv_computed_tokens_sum"] == 4


async def test_earlier_names_tell_the_same(engine: FakeEngine) -> None:
    engine.script = says("abcdef", delay=0.001)
    async with client_for(make_app(engine)) as client:
        await client.post("/generate", json={"prompt": "a", "max_tokens": 6})
        engine.set_stats(num_blocks=100, num_free_blocks=60)
        found = samples((await client.get("/metrics")).text)
    assert found["vllm:gpu_cache_usage_perc"] == found["vllm:kv_cache_usage_perc"] == 0.4
    name = "vllm:time_per_output_token_seconds"
    assert found[f"{name}_count"] == found["vllm:inter_token_latency_seconds_count"] > 0
    assert found[f"{name}_sum"] == found["vllm:inter_token_latency_seconds_sum"]


async def test_the_text_is_well_formed_and_documented(client: httpx.AsyncClient) -> None:
    text = (await client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(family.documentation for family in families.values())
    vllm = {name: family for name, family in families.items() if name.startswith("vllm:")}
    assert {f"vllm:{name}" for name in HISTOGRAMS} <= set(vllm)
    for family in vllm.values():
        for sample in family.samples:
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0"), sample.name
    pages = "".join(page.read_text(encoding="utf-8") for page in (Path(__file__).parents[2] / "docs").glob("*.md"))
    missing = {name for name in families if name.startswith(("vllm:", "quill:")) and f"`{name}`" not in pages}
    assert missing == set(), "docs/metrics.md, or a page of the metric's own subject, explains every metric"


async def test_a_histogram_counts_a_value_on_a_bound_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, count in ((1.0, 1), (1.5, 2), (2.0, 1), (9.0, 1)):
        histogram.add(value, count)
    family = HistogramMetricFamily("x", "what", labels=["model_name"])
    histogram.add_to(family, ["m"])
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == "x_bucket"}
    assert buckets == {"1.0": 1, "2.0": 4, "+Inf": 5}
    assert {sample.name: sample.value for sample in family.samples if "le" not in sample.labels} == {
        "x_count": 5,
        "x_sum": 15.0,
    }
