"""One request for text in flight: its sequences, their deltas, and every way it can end."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from starlette.types import Receive

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.engine.interface import EngineClient, EngineRequestError, RequestStream
from server.engine.messages import SequenceOutput
from server.errors import ApiError, ClientGoneError, engine_down_error, request_failed_error
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.output import ChoiceDelta, ChoiceOutput, Usage

SEED_BITS = 53  # JSON numbers above 2^53 are not exact in every client

Emit = Callable[[ChoiceDelta], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A checked request, ready for the engine. `echo` is text to put before the answer."""

    token_ids: list[int]
    params: SamplingParams
    n: int = 1
    stops: list[str] = field(default_factory=list)
    deadline: float | None = None
    echo: str = ""


def choice_seed(seed: int, index: int) -> int:
    """Choice 0 draws with the request's own seed, the others with seeds hashed from it and their index."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - SEED_BITS)


class Generation:
    """n sequences of one prompt, submitted all or none; whoever creates it calls `run` or `close`."""

    def __init__(
        self, prompt: Prompt, tokenizer: Tokenizer, engine: EngineClient, lifecycle: Lifecycle, metrics: Metrics
    ) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._engine = engine
        self._arrival = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._error: ApiError | None = None
        self._interrupted = False
        self._num_prompt_tokens = len(prompt.token_ids)
        self._echo = prompt.echo
        self.seeds = [choice_seed(prompt.params.seed, index) for index in range(prompt.n)]
        self.choices = [
            ChoiceOutput(index, tokenizer, prompt.stops, prompt.params.min_tokens) for index in range(prompt.n)
        ]
        self._streams: list[RequestStream] = []
        self._submit(prompt)

    def _submit(self, prompt: Prompt) -> None:
        """Raises EngineUnavailableError or QueueFullError with nothing left behind."""
        self._engine.check_admission(prompt.n)
        try:
            for seed in self.seeds:
                params = replace(prompt.params, seed=seed)
                self._streams.append(self._engine.submit(prompt.token_ids, params, prompt.deadline))
        except BaseException:
            self.close()
            raise
        self._lifecycle.add(self)

    @property
    def usage(self) -> Usage:
        """The prompt counts once, whatever n is."""
        completion = sum(choice.num_tokens for choice in self.choices)
        return Usage(self._num_prompt_tokens, completion, self.choices[0].cached_tokens)

    @property
    def _num_unfinished(self) -> int:
        return sum(choice.finish_reason is None for choice in self.choices)

    async def run(self, receive: Receive, emit: Emit) -> None:
        """Hand every delta to `emit` until all choices have ended.

        Raises ClientGoneError when the client left, ApiError when the request was interrupted or the engine gave up
        on it. In every case all sequences are out of the engine afterwards.
        """
        self._task = asyncio.current_task()
        watcher = asyncio.create_task(self._watch(receive))
        try:
            if self._interrupted:
                raise self._error or ClientGoneError()
            await self._pump_all(emit)
        except asyncio.CancelledError:
            if not self._interrupted or self._task is None:
                raise
            if self._task.uncancel():
                raise
            raise (self._error or ClientGoneError()) from None
        except EngineRequestError:
            if self._interrupted:
                raise (self._error or ClientGoneError()) from None
            self._metrics.count_finish("error", self._num_unfinished)
            raise (request_failed_error() if self._engine.state == "ready" else engine_down_error()) from None
        finally:
            self._task = None
            watcher.cancel()
            self.close()

    def close(self) -> None:
        """Abort what still runs; harmless when called twice."""
        for stream in self._streams:
            stream.abort()
        self._lifecycle.remove(self)

    def interrupt(self, error: ApiError | None) -> None:
        """End with `error`, or silently when the client has left."""
        if self._interrupted:
            return
        self._interrupted = True
        self._error = error
        self._metrics.count_finish("abort", self._num_unfinished)
        if self._task is None:
            self.close()
        else:
            self._task.cancel()  # and `run` closes on its way out

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.interrupt(None)

    async def _pump_all(self, emit: Emit) -> None:
        if len(self.choices) == 1:
            await self._pump(0, emit)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(self.choices)):
                    group.create_task(self._pump(index, emit))
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None

    async def _pump(self, index: int, emit: Emit) -> None:
        choice, last = self.choices[index], self._arrival
        if self._echo:
            await emit(ChoiceDelta(index, self._echo, []))
        async for output in self._streams[index]:
            if output.finish_reason == "error":
                raise EngineRequestError
            now = time.monotonic()
            self._metrics.observe_tokens(now - last, len(output.token_ids), first=last == self._arrival)
            last = now
            delta = choice.push(output)
            if delta.finish_reason is not None:
                # Before a slow client is waited for: after a stop string the engine still runs the sequence.
                self._streams[index].abort()
                self._finish(choice, output)
            await emit(delta)
            if delta.finish_reason is not None:
                return
        raise EngineRequestError("the stream ended without a finish reason")

    def _finish(self, choice: ChoiceOutput, output: SequenceOutput) -> None:
        self._metrics.observe_finish(
            choice.finish_reason or "error",
            self._num_prompt_tokens,
            choice.num_tokens,
            time.monotonic() - self._arrival,
            output.timings,
        )
