"""The ASGI application, put together from its parts. Importing this starts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from model.tokenizer import Tokenizer
from server.auth import ApiKeys
from server.engine.interface import EngineClient
from server.error_handlers import handle_api_error, handle_http_exception
from server.errors import ApiError
from server.history import RequestHistory
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.middleware import (
    QUIET_PATHS,
    AuthMiddleware,
    BodyLimitMiddleware,
    HostMiddleware,
    RequestContextMiddleware,
)
from server.page_files import REFERENCE, page_files
from server.routes import classify, explain, native, openai, ops, page, reference, requests, score, tgi, tokenize
from server.services import Services
from server.settings import Settings
from server.shadow import Shadows
from server.sse import Heartbeat
from server.telemetry import telemetry_config

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ROUTERS = (
    ops.router,
    native.router,
    classify.router,
    explain.router,
    openai.router,
    page.router,
    reference.router,
    requests.router,
    score.router,
    tgi.router,
    tokenize.router,
)


def create_app(
    settings: Settings,
    engine: EngineClient,
    keys: ApiKeys | None = None,
    tokenizer: Tokenizer | None = None,
    tracer_provider: TracerProvider | None = None,
) -> FastAPI:
    """An app over `engine`. Without a tokenizer it answers `loading` until `services.set_tokenizer` is called.

    `tracer_provider` gets a span for each request.
    """
    services = _services(settings, engine)
    if tokenizer is not None:
        services.set_tokenizer(tokenizer)
    app = FastAPI(
        title="Quill",
        version=ops.version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=telemetry_config(tracer_provider, QUIET_PATHS),
        middleware=_middleware(settings, services.metrics, keys or ApiKeys([])),
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, handle_api_error)
    app.add_exception_handler(HTTPException, handle_http_exception)
    return app


def _services(settings: Settings, engine: EngineClient) -> Services:
    name = settings.model_name
    routes = [route.path for router in ROUTERS for route in router.routes if hasattr(route, "path")]
    lifecycle = Lifecycle(engine, settings.health_timeout)
    metrics = Metrics(
        engine,
        name,
        prefix_caching=settings.prefix_caching,
        routes=routes,
        further_models=settings.model_names[1:],
    )
    shadows = Shadows(settings.shadows, engine, lifecycle)
    metrics.register(shadows)
    return Services(
        settings=settings,
        engine=engine,
        lifecycle=lifecycle,
        metrics=metrics,
        shadows=shadows,
        heartbeat=Heartbeat(settings.ping_interval, settings.write_timeout),
        models=settings.model_names,
        splits=settings.splits,
        history=RequestHistory(settings.request_history) if settings.request_history else None,
    )


def _middleware(settings: Settings, metrics: Metrics, keys: ApiKeys) -> list[Middleware]:
    """Outermost first. CORS answers preflights, which carry no key, so it stands before the key check."""
    cors = [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    ]
    return [
        Middleware(RequestContextMiddleware, metrics=metrics),
        Middleware(HostMiddleware, bind_host=settings.host, allowed_hosts=settings.allowed_hosts),
        *(cors if settings.cors_origins else []),
        Middleware(AuthMiddleware, keys=keys, page_paths=frozenset({*page_files(), REFERENCE})),
        Middleware(BodyLimitMiddleware, limit=settings.max_body_size),
    ]
