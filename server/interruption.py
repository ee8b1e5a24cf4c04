"""A request's work that its client or the server may end early."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from server.errors import ApiError, ClientGoneError

Result = TypeVar("Result")


class Interruption:
    """Made by a request inside the event loop; `interrupt` may come before, during or after `run`."""

    def __init__(self) -> None:
        self._reason: asyncio.Future[ApiError | None] = asyncio.get_running_loop().create_future()

    def interrupt(self, error: ApiError | None) -> None:
        """End with `error`, or silently when the client has left; harmless after the end."""
        if not self._reason.done():
            self._reason.set_result(error)

    async def run(self, work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
        """What `work` gives or raises.

        When it is interrupted first it is cancelled; then this raises ClientGoneError when the client left, else the
        error that interrupted it.
        """
        task = asyncio.create_task(work)
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await asyncio.wait((task, self._reason), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._reason.result() or ClientGoneError()
        finally:
            task.cancel()
            watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.interrupt(None)
