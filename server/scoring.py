"""One request for scores in flight: the windows of its texts in the engine, and every way it can end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import islice

from starlette.types import Receive

from model.evaluation import Window
from model.sampling_params import SamplingParams
from server.admission import refusal, refuse_unless_admitting, served_model
from server.caller import OPEN_POOL
from server.engine.interface import EngineRequestError, EngineUnavailableError, QueueFullError, RequestStream
from server.engine.messages import EngineInfo
from server.errors import ApiError, ClientGoneError, engine_down_error, request_failed_error
from server.interruption import Interruption
from server.metrics import FinishedSequence
from server.provenance import engine_name
from server.schemas.score import ScoreRequest
from server.score_texts import ScoredText, read_texts, window_stride
from server.services import Services

_SCORE_ONLY = SamplingParams(max_tokens=0)
# What a request keeps in the engine at a time: at most this share of its seats, and about as many steps' worth of
# tokens. So a newcomer finds a seat, and its prompt's turn comes after a few steps, however long the texts are.
_SHARE_OF_SEATS = 4
_STEPS_AHEAD = 2
# Seconds until a queue that was full is looked at again, at most.
_PATIENCE = 1.0
_Job = tuple[ScoredText, Window]


async def admit_scoring(body: ScoreRequest, services: Services, pool: int = OPEN_POOL) -> Scoring:
    """Check the request against the model at hand and hand its first windows to the engine. Raises ApiError."""
    model = served_model(body.model, services)
    texts = await read_texts(body, model)
    refuse_unless_admitting(services)
    try:
        return Scoring(texts, model.max_model_len, window_stride(body, model), services, pool, model.name)
    except (QueueFullError, EngineUnavailableError) as error:
        refused = refusal(error, services)
        services.metrics.count_rejection(refused.code)
        raise refused from None


class Scoring:
    """Texts that are read in windows, a few at a time; whoever creates it calls `run`."""

    def __init__(
        self,
        texts: list[ScoredText],
        context: int,
        stride: int,
        services: Services,
        pool: int = OPEN_POOL,
        model: str | None = None,
    ) -> None:
        """Submits the first windows, all or none. Raises EngineUnavailableError or QueueFullError."""
        self._engine, self._lifecycle, self._metrics = services.engine, services.lifecycle, services.metrics
        self._pool = pool
        self._model = engine_name(services.ready_info, model)
        # All windows are of one set of weights, whatever is reloaded between them.
        self._lease = self._engine.hold_weights(self._model)
        self._arrival = time.monotonic()
        self.texts = texts
        self._jobs: Iterator[_Job] = ((text, window) for text in texts for window in text.windows(context, stride))
        self._streams: dict[int, RequestStream] = {}
        self._interruption = Interruption()
        first = list(islice(self._jobs, _num_at_once(texts, context, services.ready_info)))
        self._engine.check_admission(len(first), sum(window.length + 1 for _, window in first), pool)
        try:
            self._first = [(job, self._submit(job)) for job in first]
        except BaseException:
            self._close()
            raise
        self._lifecycle.add(self)

    @property
    def num_tokens(self) -> int:
        return sum(len(text.token_ids) for text in self.texts)

    async def run(self, receive: Receive) -> list[ScoredText]:
        """The texts, with all their log-probabilities.

        Raises ClientGoneError when the client left, ApiError when the request was interrupted or the engine gave up
        on it. In every case nothing of it is in the engine afterwards.
        """
        try:
            return await self._interruption.run(self._score_all(), receive)
        except (ApiError, ClientGoneError):
            self._metrics.count_finish("abort", len(self._streams), self._model or "")
            raise
        except (EngineRequestError, EngineUnavailableError):
            self._metrics.count_finish("error", len(self._streams), self._model or "")
            raise (request_failed_error() if self._engine.state == "ready" else engine_down_error()) from None
        finally:
            self._close()

    def interrupt(self, error: ApiError | None) -> None:
        """End with `error`, or silently when the client has left; harmless after the end."""
        self._interruption.interrupt(error)

    def _close(self) -> None:
        for stream in self._streams.values():
            stream.abort()
        self._lease.release()
        self._lifecycle.remove(self)

    async def _score_all(self) -> list[ScoredText]:
        try:
            async with asyncio.TaskGroup() as group:
                for job, stream in self._first:
                    group.create_task(self._work(job, stream))
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        return self.texts

    async def _work(self, job: _Job, stream: RequestStream) -> None:
        """Read a window to its end, then the next that nobody has begun, until there is none."""
        while True:
            await self._read(job, stream)
            next_job = next(self._jobs, None)
            if next_job is None:
                return
            job, stream = next_job, await self._submit_in_turn(next_job)

    def _submit(self, job: _Job) -> RequestStream:
        text, window = job
        stream = self._engine.submit(
            text.token_ids[window.start : window.start + window.length + 1],
            _SCORE_ONLY,
            prompt_logprobs=0,
            prompt_logprobs_start=window.skip + 1,
            pool=self._pool,
            model=self._model,
            weights=self._lease.weights,
        )
        self._streams[stream.request_id] = stream
        return stream

    async def _submit_in_turn(self, job: _Job) -> RequestStream:
        """A window of a request that was let in waits for room in the queue, where a new request would be refused."""
        while True:
            try:
                return self._submit(job)
            except QueueFullError as error:
                await asyncio.sleep(min(error.retry_after, _PATIENCE))

    async def _read(self, job: _Job, stream: RequestStream) -> None:
        text, window = job
        position, end = window.start + window.skip + 1, window.start + window.length + 1
        async for output in stream:
            for entry in output.prompt_logprobs or ():
                text.logprobs[position] = entry.logprob
                position += 1
            if output.finish_reason == "length" and position == end:
                del self._streams[stream.request_id]
                seconds = time.monotonic() - self._arrival
                ended = FinishedSequence("length", window.length, 0, seconds, output.timings, output.cached_tokens)
                self._metrics.observe_finish(ended, self._model or "")
                return
            if output.finish_reason is not None:
                break
        raise EngineRequestError("the engine gave up on the request")


def _num_at_once(texts: list[ScoredText], context: int, info: EngineInfo) -> int:
    """How many windows to keep in the engine."""
    longest = max(min(context, text.num_predictions) for text in texts)
    by_tokens = _STEPS_AHEAD * info.max_num_batched_tokens // max(1, longest)
    return max(1, min(info.max_num_seqs // _SHARE_OF_SEATS, by_tokens))
