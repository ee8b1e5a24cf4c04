"""An engine without a model: scripted tokens, delays, a full queue, death. Implements EngineClient."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from model.sampling_params import SamplingParams
from server.engine.interface import EngineRequestError, EngineState, EngineUnavailableError, QueueFullError
from server.engine.leases import WeightsLease
from server.engine.messages import (
    EngineInfo,
    EngineStats,
    Explain,
    ModelInfo,
    RequestTimings,
    SequenceOutput,
    TokenLogprobs,
)

EOS = 256
TRAINING = {"step": 5000, "run": "run-1", "data": "sha256:def", "validation_loss": 1.25}
PROVENANCE = {"weights": "sha256:abc", **TRAINING}
LETTERS = b"abcdefghijklmnopqrstuvwxyz "


@dataclass
class Plan:
    """What a request gets: tokens in chunks, then a finish reason. `fail_after` chunks the request fails instead.

    `never_scheduled` is one that ended while it waited.
    """

    chunks: list[list[int]]
    finish_reason: str = "length"
    stop_token_id: int | None = None
    delay: float = 0.0
    fail_after: int | None = None
    never_scheduled: bool = False


Script = Callable[[list[int], SamplingParams], Plan]


def seeded_letters(prompt: list[int], params: SamplingParams) -> Plan:
    """max_tokens letters that depend on the prompt, the seed and the position."""
    tokens = []
    for position in range(params.max_tokens):
        digest = hashlib.sha256(repr((prompt, params.seed, position)).encode()).digest()
        tokens.append([LETTERS[digest[0] % len(LETTERS)]])
    return Plan(tokens)


def says(text: str, *, chunk: int = 1, end: bool = False, delay: float = 0.0) -> Script:
    """The UTF-8 bytes of `text`, `chunk` tokens at a time, ended by EOS or by max_tokens."""

    def script(prompt: list[int], params: SamplingParams) -> Plan:
        tokens = [*text.encode(), EOS] if end else list(text.encode())
        tokens = tokens[: params.max_tokens]
        chunks = [tokens[start : start + chunk] for start in range(0, len(tokens), chunk)]
        stopped = bool(tokens) and tokens[-1] == EOS
        return Plan(chunks, "stop" if stopped else "length", delay=delay)

    return script


@dataclass
class FakeStream:
    """One request's outputs, merged while nobody reads."""

    engine: FakeEngine
    request_id: int
    prompt: list[int]
    params: SamplingParams
    deadline: float | None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 1
    pool: int = 0
    explain: Explain | None = None
    model: str | None = None
    weights: str | None = None
    aborted: bool = False
    finished: bool = False
    _waiting: list[SequenceOutput] = field(default_factory=list)
    _error: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, output: SequenceOutput) -> None:
        self._waiting.append(output)
        self._news.set()

    def fail(self) -> None:
        self._error = True
        self._news.set()

    def abort(self) -> None:
        if not self.finished:
            self.aborted = True
            self.engine.end(self)

    async def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._waiting:
                output = _merge(self._waiting)
                self._waiting = []
                yield output
                if output.finish_reason is not None:
                    return
            if self._error:
                raise EngineRequestError("the engine died")


def _merge(outputs: list[SequenceOutput]) -> SequenceOutput:
    last = outputs[-1]
    logprobs = [entry for output in outputs for entry in output.logprobs or []]
    return SequenceOutput(
        request_id=last.request_id,
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        cached_tokens=max(output.cached_tokens for output in outputs),
        logprobs=logprobs if last.logprobs is not None else None,
        timings=next((output.timings for output in reversed(outputs) if output.timings is not None), None),
        trace=last.trace,
        explained=[entry for output in outputs for entry in output.explained or []] or None,
        scores=last.scores,
        prompt_logprobs=[entry for output in outputs for entry in output.prompt_logprobs or []] or None,
    )


class FakeEngine:
    """`script` decides each request's tokens."""

    def __init__(
        self,
        script: Script = seeded_letters,
        *,
        max_model_len: int = 256,
        queue_limit: int = 64,
        state: EngineState = "ready",
        vocab_size: int = 257,
        load_error: str | None = None,
    ) -> None:
        self.on_step: Callable[[int], None] | None = None
        self.script = script
        self.queue_limit = queue_limit
        self.load_error = load_error
        self.loop: asyncio.AbstractEventLoop | None = None
        self.submitted: list[FakeStream] = []
        self.live: set[int] = set()
        self.cached_tokens = 0
        self.closed = False
        self.silent_since: float | None = None
        self._gate = asyncio.Event()
        self._gate.set()
        self._state: EngineState = state
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._stats: EngineStats | None = None
        self._info = fake_info(max_model_len, vocab_size)

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def fault(self) -> str | None:
        return (self.load_error or "killed by a test") if self._state == "dead" else None

    @property
    def info(self) -> EngineInfo | None:
        return None if self._state == "loading" else self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats or EngineStats(num_running=len(self.live), num_blocks=100, num_free_blocks=100)

    def set_stats(self, **values: Any) -> None:
        self._stats = EngineStats(**values)

    @property
    def last_heard(self) -> float:
        return time.monotonic() if self.silent_since is None else self.silent_since

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()

    async def wait_ready(self) -> None:
        await asyncio.sleep(0.05)
        if self.load_error is not None:
            self._state = "dead"
            raise EngineUnavailableError(self.load_error, 1)
        self._state = "ready"

    def check_admission(self, num_sequences: int, num_tokens: int = 0, pool: int = 0) -> None:
        if self._state != "ready":
            raise EngineUnavailableError("not ready", 3)
        if len(self.live) + num_sequences > self.queue_limit:
            raise QueueFullError(7)

    def hold_weights(self, model: str | None = None) -> WeightsLease:
        return WeightsLease(None, lambda: None)

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
    ) -> FakeStream:
        self.check_admission(1)
        self.loop = asyncio.get_running_loop()
        stream = FakeStream(
            self, len(self.submitted), prompt_token_ids, params, deadline, prompt_logprobs, prompt_logprobs_start,
            pool, explain, model, weights,
        )  # fmt: skip
        self.submitted.append(stream)
        self.live.add(stream.request_id)
        self._tasks[stream.request_id] = asyncio.create_task(self._feed(stream))
        return stream

    async def _feed(self, stream: FakeStream) -> None:
        plan = self.script(stream.prompt, stream.params)
        arrival = time.monotonic()
        early, late = _prompt_logprobs(stream)
        if early:  # the first half by itself, the rest with the first tokens
            await self._gate.wait()
            stream.put(SequenceOutput(stream.request_id, [], prompt_logprobs=early))
        chunks = plan.chunks or [[]]
        for number, tokens in enumerate(chunks):
            await asyncio.sleep(plan.delay)
            await self._gate.wait()
            if number == plan.fail_after:
                stream.fail()
                return
            last = number == len(chunks) - 1
            if last:
                stream.finished = True
                self.live.discard(stream.request_id)
            output = self._output(stream, tokens, plan, arrival, first=not number, last=last)
            stream.put(output if number else msgspec.structs.replace(output, prompt_logprobs=late or None))

    def _output(
        self, stream: FakeStream, tokens: list[int], plan: Plan, arrival: float, *, first: bool, last: bool
    ) -> SequenceOutput:
        now = time.monotonic()
        started = 0.0 if plan.never_scheduled else arrival + 0.01
        wanted = stream.params.logprobs
        return SequenceOutput(
            request_id=stream.request_id,
            token_ids=tokens,
            finish_reason=plan.finish_reason if last else None,
            stop_token_id=plan.stop_token_id if last else None,
            cached_tokens=self.cached_tokens,
            logprobs=None if wanted is None else [_logprobs(token, wanted) for token in tokens],
            timings=RequestTimings(arrival, started, now, now if last else 0.0, 0) if first or last else None,
        )

    def end(self, stream: FakeStream) -> None:
        self.live.discard(stream.request_id)
        task = self._tasks.pop(stream.request_id, None)
        if task is not None:
            task.cancel()

    def close_gate(self) -> None:
        """Hold every output back until `open_gate`."""
        self._gate.clear()

    def open_gate(self) -> None:
        self._gate.set()

    def kill(self) -> None:
        """Die: every request in flight fails."""
        self._state = "dead"
        for stream in self.submitted:
            if stream.request_id in self.live:
                stream.fail()

    async def close(self) -> None:
        self.closed = True
        for task in self._tasks.values():
            task.cancel()


def _logprobs(token: int, wanted: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, [(token + step, -0.5 - step) for step in range(wanted)])


def fake_prompt_logprob(prompt: list[int], position: int) -> float:
    """Of the prompt's token at that position: it tells how much context the token had, and which it is."""
    return -position - prompt[position] / 1024


def _prompt_logprobs(stream: FakeStream) -> tuple[list[TokenLogprobs], list[TokenLogprobs]]:
    """What the stream asks for, in two halves."""
    if stream.prompt_logprobs is None:
        return [], []
    entries = []
    for position in range(stream.prompt_logprobs_start, len(stream.prompt)):
        token, value = stream.prompt[position], fake_prompt_logprob(stream.prompt, position)
        entries.append(
            TokenLogprobs(token, value, [(token + step, value - step) for step in range(stream.prompt_logprobs)])
        )
    return entries[: len(entries) // 2], entries[len(entries) // 2 :]


def fake_info(max_model_len: int, vocab_size: int) -> EngineInfo:
    model = ModelInfo(
        name="tiny",
        config={"vocab_size": vocab_size, "num_layers": 2},
        num_parameters=1234,
        weights_digest="sha256:abc",
        provenance=dict(TRAINING),
    )
    return EngineInfo(
        models=[model],
        device="cpu",
        device_name="a test's CPU",
        dtype="float32",
        attention_backend="torch",
        block_size=16,
        num_blocks=100,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        max_model_len=max_model_len,
        torch_version="2.13.0",
        load_seconds=0.1,
    )
