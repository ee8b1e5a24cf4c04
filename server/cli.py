"""The command line: settings, listener and engine first; the web framework is imported while the engine loads."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING

from server.auth import ApiKeys, load_api_keys
from server.help import help_text, wants_help
from server.logs import setup_logging
from server.settings import Settings, UsageError, check_aliases, follow_watched, load_settings, resolve_model_names
from server.telemetry import make_tracer_provider

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

EXIT_USAGE = 2
BACKLOG = 2048


def main(argv: list[str] | None = None) -> int:
    """Run `python -m server` and return its exit code: 0 drained, 1 engine failure, 2 wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["batch"]:
        from server import batch_cli

        return batch_cli.main(argv[1:])
    if wants_help(argv):
        print(help_text(Settings))
        return 0
    try:
        settings = load_settings(argv)
        keys = load_api_keys(settings.api_key_file)
        settings = resolve_model_names(follow_watched(settings))
        check_aliases(settings)
        tracer_provider = make_tracer_provider(settings.otlp_endpoint)
        listener = listen(settings.host, settings.port)
    except UsageError as error:
        print(f"quill: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    setup_logging(settings.log_level, settings.log_format)
    import uvloop

    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, keys, listener, tracer_provider))


async def _serve(
    settings: Settings, keys: ApiKeys, listener: socket.socket, tracer_provider: TracerProvider | None
) -> int:
    from server.engine.client import AsyncEngine
    from server.lifecycle import Signals

    signals = Signals()
    engine = AsyncEngine(
        settings.engine_config(),
        settings.max_queued_requests,
        settings.max_queued_tokens,
        log_level=settings.log_level,
        log_format=settings.log_format,
    )
    await engine.start()
    from server.serve import allow_many_connections, serve

    allow_many_connections()
    return await serve(settings, keys, listener, engine, signals, tracer_provider=tracer_provider)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; connections queue on it until the server is up. Raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except UnicodeError:
        raise UsageError(f"--host: {host} is no host name; give a name or an address") from None
    except OSError as error:
        raise UsageError(f"--host: cannot listen on {host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(f"--port: cannot listen on {host} port {port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener
