"""One request for labels in flight: its texts in the engine, their scores, and every way it can end."""

from __future__ import annotations

import asyncio
import time

from starlette.types import Receive

from model.classifier_config import text_ids
from model.errors import TokenizerError
from model.sampling_params import SamplingParams
from server.admission import refusal, refuse_unless_admitting, require_task
from server.caller import OPEN_POOL
from server.engine.interface import EngineRequestError, EngineUnavailableError, QueueFullError, RequestStream
from server.engine.messages import CLASSIFICATION
from server.errors import (
    ApiError,
    ClientGoneError,
    InvalidRequestError,
    engine_down_error,
    request_failed_error,
)
from server.interruption import Interruption
from server.metrics import FinishedSequence
from server.prompts import LONG_TEXT
from server.schemas.classify import ClassifyRequest
from server.services import Services

# The engine takes every request with them; a classifier has no use for any.
_NO_SAMPLING = SamplingParams(max_tokens=1)


async def admit_texts(body: ClassifyRequest, services: Services, pool: int = OPEN_POOL) -> Classification:
    """Check the request against the model at hand and hand its texts to the engine. Raises ApiError."""
    services.model_name(body.model)
    refuse_unless_admitting(services)
    require_task(services, CLASSIFICATION)
    token_ids = await _token_ids(body, services)
    refuse_unless_admitting(services)
    try:
        return Classification(token_ids, services, pool)
    except (QueueFullError, EngineUnavailableError) as error:
        refused = refusal(error, services)
        services.metrics.count_rejection(refused.code)
        raise refused from None


async def _token_ids(body: ClassifyRequest, services: Services) -> list[list[int]]:
    if (body.text is None) == (body.texts is None):
        raise InvalidRequestError("give either text or texts", param="texts")
    param = "text" if body.texts is None else "texts"
    texts = [body.text] if body.text is not None else body.texts or []
    info = services.ready_info
    capacity = info.max_num_seqs + services.settings.max_queued_requests
    if len(texts) > capacity:
        raise InvalidRequestError(
            f"texts must not be more than {capacity}, all that this server takes at once", param=param
        )
    token_ids = await _encode(texts, services, param)
    return [_fit(ids, info.max_model_len, body.truncate, param) for ids in token_ids]


async def _encode(texts: list[str], services: Services, param: str) -> list[list[int]]:
    tokenizer, pad = services.tokenizer, services.ready_info.models[0].pad_token_id
    assert tokenizer is not None, "admission needs a loaded tokenizer"
    try:
        if sum(map(len, texts)) > LONG_TEXT:
            return await asyncio.to_thread(text_ids, tokenizer, texts, pad)
        return text_ids(tokenizer, texts, pad)
    except TokenizerError:
        message = f"{param} must not be empty or hold characters that this model's tokenizer does not know"
        raise InvalidRequestError(message, param=param) from None


def _fit(ids: list[int], context: int, truncate: bool, param: str) -> list[int]:
    if len(ids) > context and not truncate:
        raise InvalidRequestError(
            f"a text has {len(ids)} tokens, more than the {context} that the model reads; shorten it, or set truncate",
            code="context_length_exceeded", param=param,
        )  # fmt: skip
    return ids[:context]


class Classification:
    """Texts that are submitted all or none; whoever creates it calls `run`."""

    def __init__(self, token_ids: list[list[int]], services: Services, pool: int = OPEN_POOL) -> None:
        """Raises EngineUnavailableError or QueueFullError with nothing left behind."""
        self._engine, self._lifecycle, self._metrics = services.engine, services.lifecycle, services.metrics
        self._arrival = time.monotonic()
        self._token_ids = token_ids
        self._streams: list[RequestStream] = []
        self._num_finished = 0
        self._interruption = Interruption()
        self._engine.check_admission(len(token_ids), sum(len(ids) + 1 for ids in token_ids), pool)
        try:
            self._streams += [self._engine.submit(ids, _NO_SAMPLING, pool=pool) for ids in token_ids]
        except BaseException:
            self._close()
            raise
        self._lifecycle.add(self)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._token_ids))

    async def run(self, receive: Receive) -> list[list[float]]:
        """The probabilities of each text's labels.

        Raises ClientGoneError when the client left, ApiError when the request was interrupted or the engine gave up
        on it. In every case all texts are out of the engine afterwards.
        """
        try:
            return await self._interruption.run(self._collect(), receive)
        except (ApiError, ClientGoneError):
            self._metrics.count_finish("abort", len(self._streams) - self._num_finished)
            raise
        except EngineRequestError:
            self._metrics.count_finish("error", len(self._streams) - self._num_finished)
            raise (request_failed_error() if self._engine.state == "ready" else engine_down_error()) from None
        finally:
            self._close()

    def interrupt(self, error: ApiError | None) -> None:
        """End with `error`, or silently when the client has left; harmless after the end."""
        self._interruption.interrupt(error)

    def _close(self) -> None:
        for stream in self._streams:
            stream.abort()
        self._lifecycle.remove(self)

    async def _collect(self) -> list[list[float]]:
        return [await self._scores(number) for number in range(len(self._streams))]

    async def _scores(self, number: int) -> list[float]:
        async for output in self._streams[number]:
            if output.finish_reason == "error" or output.scores is None:
                break
            self._num_finished += 1
            seconds = time.monotonic() - self._arrival
            ended = FinishedSequence("stop", len(self._token_ids[number]), 0, seconds, output.timings)
            self._metrics.observe_finish(ended)
            return output.scores
        raise EngineRequestError("the engine gave up on the request")
