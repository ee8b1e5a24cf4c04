"""A load generator that costs next to nothing: it writes prepared bytes and keeps what comes back.

Client, server and engine share the processor's cores, so every microsecond spent here is missing there. One
`asyncio.Protocol` per connection stores each read with its time and looks only for the end of the response;
`benchmarks.recording` parses everything once the run is over.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import cast
from urllib.parse import urlsplit

from benchmarks.recording import HEADER_END, Recording, ResponseHead, parse_head

LAST_CHUNK = b"\r\n0\r\n\r\n"


class TargetError(Exception):
    """A URL that cannot be driven, or a server that hung up."""


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    path: str

    @classmethod
    def from_url(cls, url: str) -> Target:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise TargetError(
                f"the URL {url!r} must look like http://host:port/path (no TLS: it would be measured too)"
            )
        return cls(parts.hostname, parts.port or 80, parts.path or "/")

    def request(self, body: bytes, api_key: str | None = None) -> bytes:
        """The bytes of one POST, keep-alive, ready to be written."""
        auth = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{auth}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._recording: Recording | None = None
        self._done: asyncio.Future[None] | None = None
        self._head: ResponseHead | None = None
        self._tail = b""
        self._received = 0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not a subclass

    def send(self, request: bytes, recording: Recording) -> asyncio.Future[None]:
        """Write a request; the future ends with the response's last byte (or with the connection)."""
        assert self._transport is not None
        self._recording = recording
        self._head, self._tail, self._received = None, b"", 0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def data_received(self, data: bytes) -> None:
        recording = self._recording
        if recording is None:
            return
        recording.times.append(perf_counter())
        recording.reads.append(data)
        if self._head is None:
            self._read_head(recording)
            return
        self._received += len(data)
        if self._head.chunked:
            self._tail = data[-7:] if len(data) >= 7 else (self._tail + data)[-7:]
        self._end_if_complete()

    def _read_head(self, recording: Recording) -> None:
        raw = b"".join(recording.reads)
        if HEADER_END not in raw:
            return
        self._head = parse_head(raw)
        # The headers' own end stands for the line end before the first chunk, should that be the last one.
        body = raw[self._head.body_start - 2 :]
        self._tail, self._received = body[-7:], len(body) - 2
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        assert self._head is not None
        if self._head.chunked:
            complete = self._tail == LAST_CHUNK
        else:
            length = self._head.headers.get("content-length")
            complete = length is not None and self._received >= int(length)
        if complete:
            self._finish()

    def _finish(self) -> None:
        self._recording = None
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()  # What is missing shows when the recording is read.

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


@dataclass
class Run:
    """`seconds` is the time in which streams were under way; `cpu_seconds` what the client itself used of it."""

    recordings: list[Recording]
    seconds: float
    cpu_seconds: float


class LoadGenerator:
    """Sends prepared requests to one target over connections that are opened before the clock starts.

    `timeout` bounds one exchange, in seconds.
    """

    def __init__(self, target: Target, timeout: float = 300.0) -> None:
        self._target = target
        self._timeout = timeout
        self._idle: list[Connection] = []
        self._all: list[Connection] = []

    async def connect(self, count: int) -> None:
        self._idle.extend(await asyncio.gather(*(self._open() for _ in range(count))))

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, self._target.host, self._target.port)
        except OSError as error:
            place = f"{self._target.host}:{self._target.port}"
            raise TargetError(f"no server answers at {place} ({error.strerror or error})") from error
        self._all.append(connection)
        return connection

    async def exchange(self, request: bytes, recording: Recording) -> None:
        """One request and its whole response. `recording.sent_at` is set unless the caller set it."""
        connection = self._idle.pop() if self._idle else await self._open()
        if not connection.is_open:  # A server may close after any response.
            connection = await self._open()
        if not recording.sent_at:
            recording.sent_at = perf_counter()
        done = connection.send(request, recording)
        try:
            await asyncio.wait_for(done, self._timeout)
        except TimeoutError as error:
            raise TargetError(f"a response took longer than {self._timeout:g} s") from error
        self._idle.append(connection)

    async def closed_loop(self, requests: Sequence[bytes], clients: int) -> Run:
        """`clients` clients; each sends its next request as soon as its last response has ended."""
        pending = iter(requests)
        recordings: list[Recording] = []

        async def client() -> None:
            for request in pending:
                recording = Recording()
                recordings.append(recording)
                await self.exchange(request, recording)

        return await self._measure(lambda: asyncio.gather(*(client() for _ in range(clients))), recordings)

    async def waves(self, requests: Sequence[bytes], clients: int) -> Run:
        """`clients` requests at once, and the next `clients` when all of those have ended."""
        parts = [
            await self.closed_loop(requests[start : start + clients], clients)
            for start in range(0, len(requests), clients)
        ]
        recordings = [recording for part in parts for recording in part.recordings]
        return Run(recordings, sum(part.seconds for part in parts), sum(part.cpu_seconds for part in parts))

    async def poisson(self, requests: Sequence[bytes], rate: float, seed: int) -> Run:
        """`rate` requests a second on average at random moments, whether or not earlier ones have ended.

        Latencies count from the planned moment, so that a late client does not flatter the server.
        """
        rng = random.Random(seed)
        recordings: list[Recording] = []

        async def send_all() -> None:
            planned = perf_counter()
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    await asyncio.sleep(max(0.0, planned - perf_counter()))
                    recordings.append(Recording(sent_at=planned))
                    group.create_task(self.exchange(request, recordings[-1]))
                    planned += rng.expovariate(rate)

        return await self._measure(send_all, recordings)

    async def _measure(self, run: Callable[[], Awaitable[object]], recordings: list[Recording]) -> Run:
        cpu_start = process_time()
        start = perf_counter()
        await run()
        return Run(recordings, perf_counter() - start, process_time() - cpu_start)

    async def close(self) -> None:
        """Drop every connection, those of requests under way as well."""
        for connection in self._all:
            connection.abort()
        await asyncio.sleep(0)
