"""A generation as a stream of events, in whatever shape a route gives them."""

from __future__ import annotations

from typing import Protocol

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.error_handlers import log_fault, request_id
from server.errors import ApiError, ClientGoneError
from server.generation import Generation
from server.output import ChoiceDelta
from server.sse import EventSender, Heartbeat


class EventFormat(Protocol):
    """Bytes of whole events; one call may give several, or none."""

    def event(self, delta: ChoiceDelta) -> bytes: ...

    def end(self, generation: Generation) -> bytes:
        """What follows the last delta."""
        ...

    def error(self, error: ApiError, request_id: str) -> bytes:
        """What a fault after the first byte ends the stream with."""
        ...


class StreamedGeneration(Response):
    """The answer as events. The request was admitted before this exists, so its status is always 200."""

    def __init__(self, generation: Generation, events: EventFormat, heartbeat: Heartbeat) -> None:
        self.background: BackgroundTask | None = None
        self.status_code = 200
        self._generation = generation
        self._events = events
        self._heartbeat = heartbeat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = EventSender(scope, send)
        self._heartbeat.add(sender)
        try:
            await sender.start()
            await self._stream(receive, sender)
        except ClientGoneError:
            return
        except ApiError as error:
            await sender.end(self._events.error(error, request_id(scope)))
        except Exception as error:
            await sender.end(self._events.error(log_fault(error, scope), request_id(scope)))
        finally:
            self._generation.close()
            self._heartbeat.remove(sender)

    async def _stream(self, receive: Receive, sender: EventSender) -> None:
        async def emit(delta: ChoiceDelta) -> None:
            event = self._events.event(delta)
            if event:
                await sender.send(event)

        await self._generation.run(receive, emit)
        await sender.end(self._events.end(self._generation))
