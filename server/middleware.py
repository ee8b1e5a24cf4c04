"""What every request passes before it reaches a route: its id, Host, key and body size. Plain ASGI.

Decisions rest on `scope["path"]` and headers, never on a URL that is put together from them.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import secrets
import socket
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import ApiKeys
from server.caller import POOL
from server.error_handlers import REQUEST_ID, send_error
from server.errors import (
    BodyTooLargeError,
    ClientGoneError,
    HostNotAllowedError,
    InternalError,
    UnauthorizedError,
)
from server.metrics import Metrics

OPEN_PATHS = frozenset({"/health", "/ready"})
# What probes, scrapers and the page ask for again and again.
QUIET_PATHS = OPEN_PATHS | {"/metrics", "/stats"}
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
MAX_CLIENT_ID_LENGTH = 64
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})

_HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")

logger = logging.getLogger("server.access")


def header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


class RequestContextMiddleware:
    """Draws the request's id, logs and counts its answer, and turns any fault of ours into a plain 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[REQUEST_ID] = f"req-{secrets.token_hex(12)}"
        client_id = _printable(header(scope, b"x-request-id"))
        extra = [
            (b"x-request-id", client_id or scope[REQUEST_ID].encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        start, status = time.monotonic(), 0

        async def send_start(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            await self._app(scope, receive, send_start)
        except ClientGoneError:
            status = status or 499
        except Exception:
            logger.exception("request failed", extra={"request_id": scope[REQUEST_ID]})
            if status:
                raise
            await send_error(InternalError(), scope, send_start)
        finally:
            self._record(scope, status, client_id, time.monotonic() - start)

    def _record(self, scope: Scope, status: int, client_id: bytes | None, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.count_http(route, status or 500)
        fields: dict[str, object] = {
            "request_id": scope[REQUEST_ID],
            "method": scope["method"] if scope["method"] in METHODS else "other",
            "route": route,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
        }
        if client_id is not None:
            fields["client_request_id"] = client_id.decode("ascii")
        level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
        logger.log(level, "request", extra=fields)


def _printable(value: bytes | None) -> bytes | None:
    """A client's own request id, if it is short and printable enough to hand back."""
    if value is None or not 0 < len(value) <= MAX_CLIENT_ID_LENGTH:
        return None
    return value if all(33 <= byte <= 126 for byte in value) else None


class HostMiddleware:
    """Refuses foreign Host headers, which is how DNS rebinding reaches a local server.

    Bound to a wildcard address, a server also answers for IP addresses, names without a dot (containers) and the
    machine's own name: none of these can be a public name that an attacker points here.
    """

    def __init__(self, app: ASGIApp, bind_host: str, allowed_hosts: list[str]) -> None:
        self._app = app
        own = f"[{bind_host}]" if ":" in bind_host and not bind_host.startswith("[") else bind_host
        names = [*LOCAL_HOSTS, own, *allowed_hosts]
        self._any = "*" in allowed_hosts
        self._exact = {name.lower() for name in names if not name.startswith("*")}
        self._suffixes = tuple(name[1:].lower() for name in allowed_hosts if name.startswith("*."))
        self._wildcard_bind = bind_host in ("0.0.0.0", "::", "[::]", "")
        if self._wildcard_bind:
            self._exact.add(socket.gethostname().lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._any or self._allows(_host_name(header(scope, b"host"))):
            await self._app(scope, receive, send)
        else:
            await send_error(HostNotAllowedError(), scope, send)

    def _allows(self, name: str) -> bool:
        if not name:
            return False
        if name in self._exact or (self._suffixes and name.endswith(self._suffixes)):
            return True
        return self._wildcard_bind and ("." not in name or _is_address(name))


def _host_name(value: bytes | None) -> str:
    """The host of a Host header without its port, in lower case; empty when it is not one."""
    match = _HOST.fullmatch((value or b"").decode("latin-1").lower())
    return match[1] if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class AuthMiddleware:
    """Every path, known or not, needs a key, but for the health probes and reading the page's own files: a browser
    cannot send a key before the page has asked for it."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, page_paths: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._keys = keys
        self._page_paths = page_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys.required or self._is_public(scope):
            await self._app(scope, receive, send)
            return
        number = self._keys.number_of(header(scope, b"authorization"))
        if number is None:
            await send_error(UnauthorizedError(), scope, send)
            return
        scope[POOL] = number
        await self._app(scope, receive, send)

    def _is_public(self, scope: Scope) -> bool:
        reads = scope["method"] in ("GET", "HEAD")
        return scope["path"] in OPEN_PATHS or (reads and scope["path"] in self._page_paths)


class BodyLimitMiddleware:
    """413 for a body that is declared or turns out to be over the limit; it is never buffered beyond it."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = header(scope, b"content-length")
        if declared is not None and (not declared.isdigit() or int(declared[:20]) > self._limit):
            await send_error(BodyTooLargeError(self._limit), scope, send)
            return
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._limit:
                    raise BodyTooLargeError(self._limit)
            return message

        await self._app(scope, limited_receive, send)
