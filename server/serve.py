"""Run the server: engine first, then HTTP; signals, drain and exit codes are ours, not uvicorn's.

Exit codes: 0 after a drain, 1 when the engine could not start or died.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from model.chat_template import ChatTemplate, load_chat_template
from model.errors import QuillError, TokenizerError
from model.tokenizer import Tokenizer
from server.app import create_app
from server.auth import ApiKeys
from server.engine.interface import EngineClient, EngineUnavailableError
from server.engine.messages import CLASSIFICATION, GENERATION
from server.held_out import WatchError
from server.lifecycle import Signals
from server.protocol import ConnectionLimits, guarded_protocol
from server.services import Services, TextTools
from server.settings import Settings
from server.shadow import same_tokens
from server.summary import loading_shown, show_summary
from server.telemetry import flush_spans
from server.watching import make_watcher

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger("server")

EXIT_OK = 0
EXIT_ENGINE = 1
POLL_SECONDS = 0.1
LAST_ANSWERS_SECONDS = 1.0
SHUTDOWN_SECONDS = 2
_FIRST_REQUESTS = {
    GENERATION: ("/generate", '{"prompt": "To be, or not to be", "max_tokens": 100, "stream": true}'),
    CLASSIFICATION: ("/classify", '{"text": "To be, or not to be"}'),
}
LoadTokenizer = Callable[[Settings], Tokenizer]


def tokenizer_of(settings: Settings) -> Tokenizer:
    return Tokenizer.load(settings.model_path)


class StartupError(Exception):
    """The engine or the tokenizer could not be loaded; one sentence for the operator."""


class HttpServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals stay ours: uvicorn's handlers would close the listener before the drain."""
        yield


async def serve(
    settings: Settings,
    keys: ApiKeys,
    listener: socket.socket,
    engine: EngineClient,
    signals: Signals,
    load_tokenizer: LoadTokenizer = tokenizer_of,
    tracer_provider: TracerProvider | None = None,
) -> int:
    """Serve on `listener` until a signal or the engine's end; the engine has been started. Returns the exit code."""
    app = create_app(settings, engine, keys, tracer_provider=tracer_provider)
    services: Services = app.state.services
    server = HttpServer(uvicorn_config(app, settings))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(_start(services, load_tokenizer, listener))
    watching = asyncio.create_task(_follow_checkpoints(services, starting))
    try:
        return await _watch(services, starting, serving, signals)
    finally:
        starting.cancel()
        if services.shadows is not None:
            services.shadows.close()
        watching.cancel()
        server.should_exit = True
        await asyncio.gather(engine.close(), serving)
        await asyncio.wait([watching])
        await flush_spans(tracer_provider)


async def _start(services: Services, load_tokenizer: LoadTokenizer, listener: socket.socket) -> None:
    """Wait until requests can be answered, then say what is served and how to ask. Raises StartupError."""
    with loading_shown(services.models):
        await load(services, load_tokenizer)
    show_summary(services.ready_info, services.settings, server_url(listener))
    print(greeting(services, listener), flush=True)


async def _follow_checkpoints(services: Services, starting: asyncio.Task[None]) -> None:
    """With --watch, serve newer checkpoints from the moment on at which requests are taken."""
    await asyncio.wait([starting])
    if services.settings.watch is None or services.tokenizer is None:
        return
    try:
        watcher = make_watcher(services, services.tokenizer)
    except WatchError as error:
        logger.error("no checkpoint will be reloaded: %s", error)
        return
    if watcher is not None:
        await watcher.run()


async def load(services: Services, load_tokenizer: LoadTokenizer) -> None:
    """Wait for the engine, the tokenizer and the chat template. Raises StartupError."""
    settings = services.settings
    try:
        _, tokenizer, chat_template, further = await asyncio.gather(
            services.engine.wait_ready(),
            asyncio.to_thread(load_tokenizer, settings),
            asyncio.to_thread(_load_chat_template, settings.model_path),
            asyncio.to_thread(_load_further, settings),
        )
    except EngineUnavailableError as error:
        raise StartupError(services.engine.fault or str(error)) from None
    except QuillError as error:
        raise StartupError(str(error)) from None
    tools = {settings.model_name: TextTools(tokenizer), **further}
    for live, shadow in settings.shadows.items():
        if not same_tokens(tools[live].tokenizer, tools[shadow.candidate].tokenizer):
            raise StartupError(
                f"--shadow: {shadow.candidate} has another tokenizer than {live}, so that their"
                " log-probabilities cannot be compared"
            )
    services.set_tokenizer(tokenizer, chat_template, further)


def _load_further(settings: Settings) -> dict[str, TextTools]:
    """Those of all models but the first, by name."""
    pairs = zip(settings.model_names[1:], settings.model_paths[1:], strict=True)
    return {name: TextTools(Tokenizer.load(path), _load_chat_template(path)) for name, path in pairs}


def _load_chat_template(folder: Path) -> ChatTemplate | None:
    """One that cannot be used costs the chat route alone."""
    try:
        return load_chat_template(folder)
    except TokenizerError as error:
        logger.warning("chat is not served: %s", error)
        return None


async def _watch(
    services: Services, starting: asyncio.Task[None], serving: asyncio.Task[None], signals: Signals
) -> int:
    """Wait for a signal, a failed start or the engine's death, and see it through."""
    while True:
        if starting.done() and (error := starting.exception()) is not None:
            return _failed_start(error)
        if signals.first.is_set():
            await drain(services, signals)
            return EXIT_ENGINE if services.engine.state == "dead" else EXIT_OK
        if services.engine.state == "dead" and starting.done():
            logger.error("the engine died: %s", services.engine.fault)
            await _wait_any(LAST_ANSWERS_SECONDS, services.lifecycle.idle)
            await asyncio.sleep(LAST_ANSWERS_SECONDS)
            return EXIT_ENGINE
        if serving.done():
            logger.error("the HTTP server stopped on its own")
            return EXIT_ENGINE
        await asyncio.wait({starting} if not starting.done() else {serving}, timeout=POLL_SECONDS)


def _failed_start(error: BaseException) -> int:
    if not isinstance(error, StartupError):
        raise error
    print(f"quill: error: {error}", file=sys.stderr, flush=True)
    return EXIT_ENGINE


async def drain(services: Services, signals: Signals) -> None:
    """Refuse new requests at once, let the running ones finish in time, then end the rest with an error.

    The listener stays open throughout, so that balancers and late clients get a 503 and not a refused connection.
    """
    settings, lifecycle = services.settings, services.lifecycle
    lifecycle.draining = True
    logger.info("draining: %d requests in flight", lifecycle.num_active)
    await _wait_any(settings.drain_delay, signals.again)
    await _wait_any(settings.drain_timeout, lifecycle.idle, signals.again)
    if lifecycle.num_active:
        logger.warning("ending %d requests that did not finish in time", lifecycle.num_active)
        lifecycle.interrupt_all()
        await _wait_any(LAST_ANSWERS_SECONDS, lifecycle.idle)


async def _wait_any(seconds: float, *events: asyncio.Event) -> None:
    """Wait for the first of the events, but no longer than `seconds`."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def uvicorn_config(app: object, settings: Settings) -> uvicorn.Config:
    limits = ConnectionLimits(settings.request_timeout, settings.write_timeout, settings.max_connections)
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=guarded_protocol(limits),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


def greeting(services: Services, listener: socket.socket) -> str:
    """Where the server listens, and one line to paste that uses it."""
    url = server_url(listener)
    key = " -H 'Authorization: Bearer KEY'" if services.settings.api_key_file else ""
    route, body = _FIRST_REQUESTS[services.ready_info.models[0].task]
    return (
        f"Quill serves {services.models[0]} on {url}. Try it:\n"
        f"curl -N {url}{route} -H 'Content-Type: application/json'{key} -d '{body}'"
    )


def server_url(listener: socket.socket) -> str:
    """The server's address for a client on this machine."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def allow_many_connections() -> None:
    """Raise the soft limit on open files to the hard one: each connection takes a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
