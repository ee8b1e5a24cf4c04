"""Who asks: a request's id, and the pool of clients whose turn in the queue it uses."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import Scope

from server.error_handlers import request_id

POOL = "quill.pool"
"""Where the key check leaves the number of the pool in a scope."""
OPEN_POOL = 0
"""The pool of all who need no key."""


@dataclass(frozen=True, slots=True)
class Caller:
    """`pool` is the number of the API key, never the key itself; all clients of an open server are one pool."""

    request_id: str = ""
    pool: int = OPEN_POOL


ANYONE = Caller()


def caller_of(scope: Scope) -> Caller:
    return Caller(request_id(scope), scope.get(POOL, OPEN_POOL))
