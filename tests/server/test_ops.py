"""Health, readiness, metrics and what the server says of itself."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import msgspec
import pytest

import server
from model.sampling_params import SamplingParams
from server.app import create_app
from server.engine.messages import FAILED, PASSED, SelfCheckResult
from tests.server.conftest import client_for, make_app, make_settings
from tests.server.fake_engine import TRAINING, FakeEngine, Plan, says
from tests.server.real import sum_metric

pytestmark = pytest.mark.anyio


async def test_health_and_ready_follow_the_engine(engine: FakeEngine) -> None:
    app = make_app(engine, health_timeout=5)
    lifecycle = app.state.services.lifecycle
    async with client_for(app) as client:

        async def both() -> tuple[int, int]:
            return (await client.get("/health")).status_code, (await client.get("/ready")).status_code

        assert await both() == (200, 200)
        lifecycle.draining = True
        assert await both() == (200, 503)
        lifecycle.draining = False
        engine.silent_since = time.monotonic() - 6
        assert await both() == (503, 503)
        engine.silent_since = None
        engine.kill()
        assert await both() == (503, 503)
        assert (await client.head("/health")).status_code == 503
    async with client_for(create_app(make_settings(), FakeEngine(state="loading"))) as client:
        response = await client.get("/ready")
        assert response.json()["error"]["code"] == "loading"


def value(text: str, name: str, **labels: str) -> float:
    """One sample of an exposition text; vLLM's metrics all have the engine's number."""
    if name.startswith("vllm:"):
        labels["engine"] = "0"
    inner = ",".join(f'{key}="{label}"' for key, label in sorted(labels.items()))
    line = next(line for line in text.splitlines() if line.startswith(f"{name}{{{inner}}} "))
    return float(line.split()[-1])


async def test_metrics_count_what_happened(engine: FakeEngine) -> None:
    def script(prompt: list[int], params: object) -> Plan:
        return Plan([[97], [98, 99], [100]], fail_after=1 if prompt == [98] else None)

    engine.script = script
    async with client_for(make_app(engine)) as client:
        await client.post("/generate", json={"prompt": "aaa"})
        await client.post("/generate", json={"prompt": "aaa", "stream": True, "n": 2, "stop": "b"})
        await client.post("/generate", json={"prompt": "b"})
        await client.get("/no-such")
        engine.queue_limit = 0
        await client.post("/generate", json={"prompt": "aaa"})
        engine.set_stats(
            num_running=3, num_waiting=2, num_blocks=100, num_free_blocks=75, num_steps=9, prompt_tokens=40,
            generation_tokens=50, num_preemptions=4, prefix_cache_queries=30, prefix_cache_hits=20,
        )  # fmt: skip
        assert engine.on_step is not None
        for tokens in (1, 1, 512):
            engine.on_step(tokens)
        text = (await client.get("/metrics")).text
    model = {"model_name": "tiny"}
    assert value(text, "vllm:num_requests_running", **model) == 3
    assert value(text, "vllm:num_requests_waiting", **model) == 2
    assert value(text, "vllm:kv_cache_usage_perc", **model) == 0.25
    assert value(text, "vllm:prompt_tokens_total", **model) == 40
    assert value(text, "vllm:generation_tokens_total", **model) == 50
    assert value(text, "vllm:num_preemptions_total", **model) == 4
    assert value(text, "vllm:prefix_cache_queries_total", **model) == 30
    assert value(text, "vllm:prefix_cache_hits_total", **model) == 20
    assert value(text, "vllm:iteration_tokens_total_count", **model) == 3
    assert value(text, "vllm:iteration_tokens_total_sum", **model) == 514
    assert value(text, "vllm:request_success_total", **model, finished_reason="length") == 1
    assert value(text, "vllm:request_success_total", **model, finished_reason="stop") == 2
    assert value(text, "vllm:request_success_total", **model, finished_reason="error") == 1
    assert value(text, "vllm:admission_rejections_total", **model, reason="queue_full") == 1
    assert value(text, "vllm:time_to_first_token_seconds_count", **model) == 4
    assert value(text, "vllm:inter_token_latency_seconds_count", **model) >= 3
    assert value(text, "vllm:e2e_request_latency_seconds_count", **model) == 3
    assert value(text, "vllm:request_queue_time_seconds_count", **model) >= 1
    assert value(text, "vllm:request_generation_tokens_sum", **model) == 4 + 2 + 2
    assert value(text, "vllm:request_prompt_tokens_sum", **model) == 9
    assert value(text, "quill:http_requests_total", route="/generate", status="2xx") == 2
    assert value(text, "quill:http_requests_total", route="/generate", status="4xx") == 1
    assert value(text, "quill:http_requests_total", route="other", status="4xx") == 1
    cache = {"block_size": "16", "cache_dtype": "float32", "num_gpu_blocks": "100", "enable_prefix_caching": "True"}
    assert value(text, "vllm:cache_config_info", **model, **cache) == 1
    assert "process_resident_memory_bytes" in text


async def test_each_choice_ends_once(engine: FakeEngine) -> None:
    def script(prompt: list[int], params: SamplingParams) -> Plan:
        if params.seed == 5:
            return Plan([[97]], "deadline")
        return Plan([[97], [98]], delay=0.01, fail_after=1)

    engine.script = script
    app = make_app(engine)
    async with client_for(app) as client:
        assert (await client.post("/generate", json={"prompt": "a", "n": 3, "seed": 5})).status_code == 503
    finished = app.state.services.metrics.of("tiny").finished
    assert {reason: count for reason, count in finished.items() if count} == {"deadline": 1, "error": 2}


async def test_a_request_that_never_started_has_no_first_token(engine: FakeEngine) -> None:
    engine.script = lambda prompt, params: Plan([[]], "deadline", never_scheduled=True)
    async with client_for(make_app(engine)) as client:
        answer = await client.post("/generate", json={"prompt": "a", "deadline_ms": 1_000})
        text = (await client.get("/metrics")).text
    assert answer.json()["choices"][0]["finish_reason"] == "deadline"
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds"):
        assert value(text, f"vllm:{name}_count", model_name="tiny") == 0
    assert value(text, "vllm:e2e_request_latency_seconds_count", model_name="tiny") == 1


async def test_nothing_a_client_sends_becomes_a_label(engine: FakeEngine) -> None:
    async with client_for(make_app(engine)) as client:
        before = (await client.get("/metrics")).text
        for number in range(30):
            await client.request(f"METHOD{number}", f"/path{number}", headers={"x-request-id": f"id{number}"})
            await client.post("/generate", json={"prompt": "a", "model": f"model{number}"})
        after = (await client.get("/metrics")).text
    assert [line.split()[0] for line in after.splitlines()] == [line.split()[0] for line in before.splitlines()]


async def test_histogram_buckets_are_cumulative(engine: FakeEngine) -> None:
    engine.script = says("abc")
    async with client_for(make_app(engine)) as client:
        await client.post("/generate", json={"prompt": "a" * 30})
        text = (await client.get("/metrics")).text
    name = "vllm:request_prompt_tokens_bucket"
    assert value(text, name, le="20.0", model_name="tiny") == 0
    assert value(text, name, le="50.0", model_name="tiny") == 1
    assert value(text, name, le="+Inf", model_name="tiny") == 1


async def test_info_version_models(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()
    assert info["models"][0]["name"] == "tiny"
    assert info["models"][0]["config"]["vocab_size"] == 257
    assert info["models"][0]["weights"] == "sha256:abc"
    assert info["models"][0]["provenance"] == TRAINING
    assert info["limits"]["max_model_len"] == 256
    assert (info["device"], info["dtype"], info["versions"]["torch"]) == ("cpu", "float32", "2.13.0")
    models = (await client.get("/v1/models")).json()
    assert models["object"] == "list"
    assert [(model["id"], model["object"], model["max_model_len"]) for model in models["data"]] == [
        ("tiny", "model", 256)
    ]
    assert set((await client.get("/version")).json()) == {"version"}


async def test_openapi_describes_the_body_and_names_no_paths_or_urls(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    assert body["required"] == ["prompt"]
    assert not [name for name in body["properties"] if any(word in name for word in ("path", "url", "file", "dir"))]
    root = str(Path(server.__file__).parents[1])
    assert root not in str(document)


async def test_a_failed_self_check_degrades_the_health_and_is_told_everywhere(engine: FakeEngine) -> None:
    info = engine.info
    assert info is not None
    async with client_for(make_app(engine)) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert "quill:self_check_passed" not in (await client.get("/metrics")).text
        for status, value in ((PASSED, 1.0), (FAILED, 0.0)):
            result = SelfCheckResult(status, 0.7, 0.1, "its logits are off")
            engine._info = msgspec.structs.replace(
                info, models=[msgspec.structs.replace(info.models[0], self_check=result)]
            )
            told = (await client.get("/info")).json()["models"][0]["self_check"]
            assert told == {"status": status, "error": 0.7, "tolerance": 0.1, "reason": "its logits are off"}
            assert sum_metric((await client.get("/metrics")).text, "quill:self_check_passed") == value
        health = await client.get("/health")
        assert health.status_code == 200  # it answers; whether to trust the answers is the operator's to decide
        assert health.json() == {"status": "degraded", "reason": "tiny failed its self-check: its logits are off"}
