"""One request for text in flight: its sequences, their deltas, and every way it can end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from starlette.types import Receive

from model.tokenizer import Tokenizer
from server.caller import OPEN_POOL
from server.engine.interface import EngineClient, EngineRequestError, GrammarFailedError, RequestStream
from server.engine.messages import RequestTimings, RequestTrace
from server.errors import ApiError, ClientGoneError, engine_down_error, grammar_failed_error, request_failed_error
from server.lifecycle import Lifecycle
from server.metrics import FinishedSequence, Metrics
from server.output import ChoiceDelta, ChoiceOutput, Usage, join_deltas
from server.prompts import Prompt
from server.provenance import engine_name, model_named, provenance
from server.seeds import choice_seed

Emit = Callable[[ChoiceDelta], Awaitable[None]]


class Generation:
    """n sequences of each prompt, submitted all or none; whoever creates it calls `run` or `close`.

    Choice i of prompt p has the index p * n + i.
    """

    def __init__(
        self, prompts: list[Prompt], tokenizer: Tokenizer, engine: EngineClient, lifecycle: Lifecycle, metrics: Metrics,
        pool: int = OPEN_POOL,
    ) -> None:  # fmt: skip
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._engine = engine
        self._pool = pool
        self.arrival = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._error: ApiError | None = None
        self._interrupted = False
        self.prompts = prompts
        self.model = prompts[0].model
        """The name of the model that answers."""
        self._prompt_of = [prompt for prompt in prompts for _ in range(prompt.n)]
        self.seeds = [choice_seed(prompt.params.seed, i) for prompt in prompts for i in range(prompt.n)]
        self.choices = [
            ChoiceOutput(index, tokenizer, prompt.stops, prompt.params.min_tokens)
            for index, prompt in enumerate(self._prompt_of)
        ]
        self.timings: list[RequestTimings | None] = [None] * len(self.choices)
        """Of each choice from its first token on; the engine tells no end of one that a stop string ended."""
        self.traces: list[RequestTrace | None] = [None] * len(self.choices)
        self.ended_at: list[float | None] = [None] * len(self.choices)
        self.has_ended = False
        self.end_reason = "abort"
        """Of the choices that had not come to an end when all ended."""
        self.on_answer: Callable[[str, list[int], list[int]], None] | None = None
        """Told of the model, the prompt and the tokens of each choice that has come to an end."""
        self._token_ids: list[list[int]] = [[] for _ in self.choices]
        self._streams: list[RequestStream] = []
        self.provenance: dict[str, object] = {}
        """Of the weights that answer: those that were served when the request was handed over."""
        self._submit()

    def _submit(self) -> None:
        """Raises EngineUnavailableError or QueueFullError with nothing left behind."""
        num_tokens = sum(prompt.n * (len(prompt.token_ids) + prompt.params.max_tokens) for prompt in self.prompts)
        self._engine.check_admission(len(self.choices), num_tokens, self._pool)
        info = self._engine.info
        assert info is not None, "an engine that admits has said what it serves"
        self.provenance = provenance(model_named(info, self.model))
        model = engine_name(info, self.model)
        try:
            for prompt, seed in zip(self._prompt_of, self.seeds, strict=True):
                params = replace(prompt.params, seed=seed)
                self._streams.append(
                    self._engine.submit(
                        prompt.token_ids,
                        params,
                        prompt.deadline,
                        prompt_logprobs=prompt.prompt_logprobs,
                        pool=self._pool,
                        model=model,
                    )
                )
        except BaseException:
            self.close()
            raise
        self._lifecycle.add(self)

    @property
    def usage(self) -> Usage:
        """Each prompt counts once, whatever n is."""
        prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        completion = sum(choice.num_tokens for choice in self.choices)
        cached = sum(choice.cached_tokens for choice in self.choices[:: self.prompts[0].n])
        return Usage(prompt, completion, cached)

    @property
    def _num_unfinished(self) -> int:
        return sum(choice.finish_reason is None for choice in self.choices)

    async def run(self, receive: Receive, emit: Emit) -> None:
        """Hand every delta to `emit`, a choice's in their order, until all choices have ended.

        Raises ClientGoneError when the client left, ApiError when the request was interrupted or the engine gave up
        on it. In every case all sequences are out of the engine afterwards.
        """
        self._task = asyncio.current_task()
        watcher = asyncio.create_task(self._watch(receive))
        try:
            if self._interrupted:
                raise self._error or ClientGoneError()
            await self._pump_all(emit)
            self._observe_requests()
        except asyncio.CancelledError:
            if not self._interrupted or self._task is None:
                raise
            if self._task.uncancel():
                raise
            raise (self._error or ClientGoneError()) from None
        except EngineRequestError as error:
            if self._interrupted:
                raise (self._error or ClientGoneError()) from None
            self.end_reason = "error"
            self._metrics.count_finish("error", self._num_unfinished, self.model)
            if isinstance(error, GrammarFailedError):
                raise grammar_failed_error() from None
            raise (request_failed_error() if self._engine.state == "ready" else engine_down_error()) from None
        finally:
            self._task = None
            watcher.cancel()
            self.close()

    async def collect(self, receive: Receive) -> list[ChoiceDelta]:
        """Run to the end; each choice as one whole. Raises what `run` raises."""
        deltas: list[list[ChoiceDelta]] = [[] for _ in self.choices]

        async def keep(delta: ChoiceDelta) -> None:
            deltas[delta.index].append(delta)

        await self.run(receive, keep)
        return [join_deltas(parts) for parts in deltas]

    def close(self) -> None:
        """Abort what still runs; harmless when called twice."""
        for stream in self._streams:
            stream.abort()
        self.has_ended = True
        self._lifecycle.remove(self)

    def interrupt(self, error: ApiError | None) -> None:
        """End with `error`, or silently when the client has left."""
        if self._interrupted:
            return
        self._interrupted = True
        self._error = error
        self._metrics.count_finish("abort", self._num_unfinished, self.model)
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

    def _observe_requests(self) -> None:
        first = 0
        for prompt in self.prompts:
            choices = self.choices[first : first + prompt.n]
            self._metrics.observe_request(prompt.n, max(choice.num_tokens for choice in choices), self.model)
            first += prompt.n

    async def _pump(self, index: int, emit: Emit) -> None:
        choice, last = self.choices[index], self.arrival
        if self._prompt_of[index].echo:
            await emit(ChoiceDelta(index, self._prompt_of[index].echo, []))
        async for output in self._streams[index]:
            if output.finish_reason == "error":
                raise EngineRequestError
            if output.token_ids or output.finish_reason is not None:
                now = time.monotonic()
                is_first = last == self.arrival
                self._metrics.observe_tokens(
                    now - last, len(output.token_ids), first=is_first, pool=self._pool, model=self.model
                )
                last = now
            self.timings[index] = output.timings or self.timings[index]
            self.traces[index] = output.trace
            delta = choice.push(output)
            if self.on_answer is not None:
                self._token_ids[index] += output.token_ids
            if delta.finish_reason is not None:
                # Before a slow client is waited for: after a stop string the engine still runs the sequence.
                self._streams[index].abort()
                self._finish(choice)
            await emit(delta)
            if delta.finish_reason is not None:
                return
        raise EngineRequestError("the stream ended without a finish reason")

    def _finish(self, choice: ChoiceOutput) -> None:
        now = self.ended_at[choice.index] = time.monotonic()
        prompt = self._prompt_of[choice.index]
        self._metrics.observe_finish(
            FinishedSequence(
                reason=choice.finish_reason or "error",
                prompt_tokens=len(prompt.token_ids),
                generated_tokens=choice.num_tokens,
                seconds=now - self.arrival,
                timings=self.timings[choice.index],
                cached_tokens=choice.cached_tokens,
                max_tokens=prompt.params.max_tokens,
            ),
            self.model,
        )
        if self.on_answer is not None:
            self.on_answer(self.model, prompt.token_ids, self._token_ids[choice.index])
