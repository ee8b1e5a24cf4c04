"""OpenTelemetry, where it is asked for: a span for each request, sent to a collector as OTLP over HTTP.

FastAPI has the instrumentation; here it gets a provider of its own or is switched off whole, so that no variable of the
environment makes it record bodies' faults or exceptions. The packages are the extra `otel` and are imported on demand.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from server.settings import UsageError

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.sdk.trace import TracerProvider

SERVICE_NAME = "quill"
_EXPORT_SECONDS = 3.0
_MISSING = "--otlp-endpoint needs the extra otel: pip install 'quill[otel]'"


def make_tracer_provider(endpoint: str | None) -> TracerProvider | None:
    """Spans go to the collector at `endpoint`, in batches, from a thread of its own. None without an endpoint.

    Raises UsageError where the packages are missing.
    """
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        raise UsageError(_MISSING) from None
    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE_NAME}))
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


async def flush_spans(provider: TracerProvider | None) -> None:
    """Send what is left and end; a collector that does not answer is given up soon."""
    if provider is not None:
        await asyncio.to_thread(provider.shutdown)


def telemetry_config(provider: TracerProvider | None, quiet_paths: frozenset[str]) -> TelemetryConfig:
    """For `FastAPI(telemetry=…)`: spans of requests to other than the quiet paths, and nothing else; nothing at all
    without a provider."""

    def is_quiet(scope: MutableMapping[str, Any]) -> bool:
        return scope.get("path") in quiet_paths

    config: TelemetryConfig = {
        "tracing": provider is not None,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": is_quiet,
    }
    if provider is not None:
        config["tracer_provider"] = provider
    return config
