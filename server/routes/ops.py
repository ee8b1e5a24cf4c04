"""Routes for operators: health, readiness, metrics, and what is being served."""

from __future__ import annotations

import importlib.metadata
import platform

import msgspec
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.services import Services
from server.tgi_info import tgi_info

router = APIRouter()


def version() -> str:
    """The installed package's version."""
    try:
        return importlib.metadata.version("quill")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def json_response(payload: object) -> Response:
    return Response(msgspec.json.encode(payload), media_type="application/json")


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="200 while the engine answers")
async def health(request: Request) -> Response:
    """The status is `degraded`, with a reason, where the model does not compute what was stored with its weights."""
    lifecycle = _services(request).lifecycle
    error = lifecycle.health_error()
    if error is not None:
        raise error
    reason = lifecycle.degraded_reason()
    return json_response({"status": "ok"} if reason is None else {"status": "degraded", "reason": reason})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="200 while requests are admitted")
async def ready(request: Request) -> Response:
    error = _services(request).lifecycle.admission_error()
    if error is not None:
        raise error
    return json_response({"status": "ready"})


@router.get("/metrics", summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    return Response(_services(request).metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/version", summary="The server's version")
async def get_version() -> Response:
    return json_response({"version": version()})


@router.get("/info", summary="Models, limits, device and versions")
async def info(request: Request) -> Response:
    services = _services(request)
    engine = services.ready_info
    settings = services.settings
    return json_response(
        {
            "models": [
                {
                    "name": model.name,
                    "task": model.task,
                    "labels": model.labels,
                    "config": model.config,
                    "num_parameters": model.num_parameters,
                    "weights": model.weights_digest,
                    "provenance": model.provenance,
                    "self_check": model.self_check,
                    "max_model_len": model.max_model_len or engine.max_model_len,
                }
                for model in engine.models
            ],
            "splits": {name: split.shares for name, split in services.splits.items()},
            "shadows": {
                live: {"model": shadow.candidate, "fraction": shadow.fraction}
                for live, shadow in services.settings.shadows.items()
            },
            "limits": {
                "max_model_len": engine.max_model_len,
                "max_num_seqs": engine.max_num_seqs,
                "max_num_batched_tokens": engine.max_num_batched_tokens,
                "max_queued_requests": settings.max_queued_requests,
                "max_queued_tokens": settings.max_queued_tokens,
                "max_body_size": settings.max_body_size,
                "kv_block_size": engine.block_size,
                "kv_blocks": engine.num_blocks,
            },
            "device": engine.device,
            "device_name": engine.device_name,
            "dtype": engine.dtype,
            "quantization": settings.quantization,
            "attention_backend": engine.attention_backend,
            "deterministic": engine.deterministic,
            "load_seconds": engine.load_seconds,
            "reload": None if services.reloads is None else services.reloads.values(),
            "versions": {"quill": version(), "torch": engine.torch_version, "python": platform.python_version()},
            **tgi_info(services, version()),
        }
    )
