"""AsyncEngine: the asyncio side of the process boundary. Imports no torch."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TypeVar, cast

import msgspec

from model.sampling_params import SamplingParams
from server.engine.channel import FrameSplitter, frame
from server.engine.config import EngineConfig
from server.engine.environment import engine_environment
from server.engine.interface import (
    EngineRequestError,
    EngineState,
    EngineUnavailableError,
    GrammarFailedError,
    QueueFullError,
)
from server.engine.leases import WeightsLease, WeightsLeases
from server.engine.messages import (
    AbortRequests,
    AddRequest,
    EngineFault,
    EngineInfo,
    EngineOutput,
    EngineStats,
    Explain,
    LoadWeights,
    ReleaseWeights,
    SelfCheckResult,
    SequenceOutput,
    Shutdown,
    StepOutput,
    WeightsLoaded,
)
from server.engine.waiting_room import WaitingRoom

Entry = TypeVar("Entry")

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(EngineOutput)
_SHUTDOWN_SECONDS = 5.0
_STATUS_SECONDS = 0.1
_LOADING_RETRY_SECONDS = 5
_MAX_RETRY_SECONDS = 60
# Finished requests whose rate, while all seats are taken, predicts how long a queue takes.
_RATE_WINDOW = 64


class EngineStream:
    """One request's outputs; see RequestStream. Iterated by one consumer."""

    def __init__(self, engine: AsyncEngine, request_id: int, pool: int, num_tokens: int) -> None:
        self.request_id = request_id
        self.pool = pool
        self.num_tokens = num_tokens
        self._engine = engine
        self._pending: SequenceOutput | None = None
        self._error: EngineRequestError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self.has_run = False

    def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        return self

    async def __anext__(self) -> SequenceOutput:
        while self._pending is None:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        output, self._pending = self._pending, None
        if output.finish_reason == "error":
            raise EngineRequestError("the engine gave up on the request")
        if output.finish_reason == "grammar":
            raise GrammarFailedError("the grammar could not be followed")
        return output

    def abort(self) -> None:
        if not self._ended:
            self._engine.abort(self.request_id)
            self._end()

    def push(self, output: SequenceOutput) -> None:
        self.has_run = True
        self._pending = output if self._pending is None else _merge(self._pending, output)
        self._ended = output.finish_reason is not None
        self._wake()

    def fail(self, error: EngineRequestError) -> None:
        self._error = error
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _merge(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    return msgspec.structs.replace(
        second,
        timings=second.timings or first.timings,
        explained=_join(first.explained, second.explained),
        token_ids=[*first.token_ids, *second.token_ids],
        logprobs=_join(first.logprobs, second.logprobs),
        prompt_logprobs=_join(first.prompt_logprobs, second.prompt_logprobs),
    )


def _join(first: list[Entry] | None, second: list[Entry] | None) -> list[Entry] | None:
    return second if first is None else [*first, *(second or ())]


class AsyncEngine(asyncio.Protocol):
    """Starts the engine's process and speaks with it; implements EngineClient.

    At most `max_queued_requests` sequences wait beyond the `max_num_seqs` that run, and at most `max_queued_tokens`
    tokens (None: any number) for their first output, as WaitingRoom says.
    """

    def __init__(
        self,
        config: EngineConfig,
        max_queued_requests: int,
        max_queued_tokens: int | None = None,
        *,
        log_level: str = "warning",
        log_format: str = "text",
        niceness: int = 0,
    ) -> None:
        """`niceness` above 0 lowers the process's priority."""
        self._niceness = niceness
        self._leases = WeightsLeases(lambda model, weights: self._send(_encoder.encode(ReleaseWeights(model, weights))))
        self._loading: asyncio.Future[WeightsLoaded] | None = None
        self._log_options = (log_level, log_format)
        self.on_step: Callable[[int], None] | None = None
        self._config = config
        self._room = WaitingRoom(max_queued_requests, max_queued_tokens)
        self._state: EngineState = "loading"
        self._fault: str | None = None
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._last_heard = time.monotonic()
        self._streams: dict[int, EngineStream] = {}
        self._next_id = 0
        self._finish_times: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._splitter = FrameSplitter()
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._ready = asyncio.Event()

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def fault(self) -> str | None:
        return self._fault

    @property
    def info(self) -> EngineInfo | None:
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def last_heard(self) -> float:
        return self._last_heard

    async def start(self) -> None:
        ours = self._launch()
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
        self._send(_encoder.encode(self._config))

    def _launch(self) -> socket.socket:
        """Start the process on one end of a socket pair; returns the other end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server.engine.process", str(theirs.fileno()), *self._log_options],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=engine_environment(os.environ),
                # Its own session, so that Ctrl+C reaches only us and we decide when it ends.
                start_new_session=True,
            )
        if self._niceness:
            os.setpriority(os.PRIO_PROCESS, self._process.pid, self._niceness)
        ours.setblocking(False)
        return ours

    async def wait_ready(self) -> None:
        await self._ready.wait()
        if self._state == "dead":
            raise EngineUnavailableError(self._fault or "the engine is down", _LOADING_RETRY_SECONDS)

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        deadline: float | None = None,
        *,
        prompt_logprobs: int | None = None,
        prompt_logprobs_start: int = 1,
        pool: int = 0,
        explain: Explain | None = None,
        model: str | None = None,
        weights: str | None = None,
    ) -> EngineStream:
        num_tokens = len(prompt_token_ids) + params.max_tokens
        self.check_admission(1, num_tokens, pool)
        if not self._num_queued(1):
            self._finish_times.clear()  # with seats to spare, requests end as rarely as they come
        now = time.monotonic()
        if deadline is not None and now + self._queue_seconds(pool) > deadline:
            raise QueueFullError(self._retry_after(pool))
        stream = EngineStream(self, self._next_id, pool, num_tokens)
        self._next_id += 1
        self._streams[stream.request_id] = stream
        self._room.enter(pool, num_tokens)
        request = AddRequest(
            stream.request_id, prompt_token_ids, params, now, deadline,
            prompt_logprobs=prompt_logprobs, prompt_logprobs_start=prompt_logprobs_start, pool=pool, explain=explain,
            model=model, weights=weights or self._leases.current(model),
        )  # fmt: skip
        self._send(_encoder.encode(request))
        return stream

    def hold_weights(self, model: str | None = None) -> WeightsLease:
        return self._leases.hold(model)

    async def load_weights(self, model: str, folder: str, weights: str, self_check: SelfCheckResult) -> WeightsLoaded:
        """Serve the checkpoint of that digest instead of the model's present weights; one at a time. Requests that
        are in the engine end on those they began with. Raises EngineUnavailableError when the engine is or dies."""
        if self._state != "ready":
            raise EngineUnavailableError(self._fault or "the engine is loading", _LOADING_RETRY_SECONDS)
        assert self._loading is None, "one checkpoint is loaded at a time"
        self._loading = asyncio.get_running_loop().create_future()
        self._send(_encoder.encode(LoadWeights(model, folder, weights, self_check)))
        try:
            return await self._loading
        finally:
            self._loading = None

    def check_admission(self, num_sequences: int, num_tokens: int = 0, pool: int = 0) -> None:
        if self._state != "ready":
            raise EngineUnavailableError(self._fault or "the engine is loading", _LOADING_RETRY_SECONDS)
        if not self._room.admits(pool, num_sequences, num_tokens, self._num_queued(num_sequences)):
            raise QueueFullError(self._retry_after(pool))

    def abort(self, request_id: int) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is None or self._state != "ready":
            return
        if stream.has_run:  # a stop string or a client that left: a seat is free as after any other end
            self._finish_times.append(time.monotonic())
        else:
            self._room.leave(stream.pool, stream.num_tokens)
        self._send(_encoder.encode(AbortRequests([request_id])))

    async def close(self) -> None:
        process = self._process
        # An engine that still loads hears nothing, and there is nothing to end well.
        patience = _SHUTDOWN_SECONDS if self._state == "ready" else 0.0
        if self._transport is not None:
            self._send(_encoder.encode(Shutdown()))
            self._transport.close()
        self._die("the engine was closed")
        if process is not None:
            try:
                await asyncio.to_thread(process.wait, patience)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's classes.
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._last_heard = time.monotonic()
        for message in self._splitter.feed(data):
            output = _decoder.decode(message)
            if isinstance(output, StepOutput):
                self._take_step(output)
            elif isinstance(output, EngineInfo):
                self._info = output
                self._leases.update(output)
                self._state = "ready"
                self._ready.set()
            elif isinstance(output, WeightsLoaded):
                if self._loading is not None and not self._loading.done():
                    self._loading.set_result(output)
            elif isinstance(output, EngineFault):
                self._die(output.message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._state != "dead":
            self._die(f"the engine's process ended {self._manner_of_death()}".rstrip())

    def _manner_of_death(self) -> str:
        """How the process ended, as far as is known: its socket closes a moment before its status can be read."""
        if self._process is None:
            return ""
        try:
            code = self._process.wait(_STATUS_SECONDS)
        except subprocess.TimeoutExpired:
            return ""
        if code >= 0:
            return f"with exit code {code}"
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
        return f"by {name}, perhaps for want of memory" if name == "SIGKILL" else f"by {name}"

    def _take_step(self, step: StepOutput) -> None:
        self._stats = step.stats
        if self.on_step is not None and step.step_tokens:
            self.on_step(step.step_tokens)
        for output in step.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if not stream.has_run:
                self._room.leave(stream.pool, stream.num_tokens)
            if output.finish_reason is not None:
                del self._streams[output.request_id]
                self._finish_times.append(self._last_heard)
            stream.push(output)

    def _die(self, reason: str) -> None:
        if self._state == "dead":
            return
        self._state = "dead"
        self._fault = reason
        streams, self._streams = self._streams, {}
        self._room.clear()
        for stream in streams.values():
            stream.fail(EngineRequestError("the engine is down"))
        if self._loading is not None and not self._loading.done():
            self._loading.set_exception(EngineUnavailableError(reason, _LOADING_RETRY_SECONDS))
        self._ready.set()

    def _send(self, payload: bytes) -> None:
        if self._transport is not None:
            self._transport.write(frame(payload))

    def _num_queued(self, more: int = 0) -> int:
        """Sequences beyond those that can run at once."""
        seats = 0 if self._info is None else self._info.max_num_seqs
        return max(0, len(self._streams) + more - seats)

    def _queue_seconds(self, pool: int) -> float:
        """How long a new request would wait for its turn, by the rate at which others end while there is a queue."""
        times = self._finish_times
        queued = self._room.num_ahead(pool, self._num_queued(1))
        if queued == 0 or len(times) < 2 or times[-1] <= times[0]:
            return 0.0
        return queued * (times[-1] - times[0]) / (len(times) - 1)

    def _retry_after(self, pool: int) -> int:
        return min(_MAX_RETRY_SECONDS, max(1, math.ceil(self._queue_seconds(pool))))
