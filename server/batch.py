"""Answer a file's requests through the app and its engine, as many at a time as keep the engine busy.

Every line gets one answer: what a client of the server would have been told, refusals included. Only an engine that
dies or a disk that refuses ends a batch early, and then the lines without an answer are the next run's.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec
from starlette.types import ASGIApp

from server.batch_files import ID_PREFIX, AnswerFile, BatchAnswer, BatchError, BatchRequest, BatchResponse
from server.engine.interface import EngineClient
from server.in_process import WholeAnswer, post_json
from server.seeds import derived_seed

# The engine gave up on a request, for want of memory perhaps: with other neighbours it may pass.
_MAX_ATTEMPTS = 3
_RETRY_SECONDS = 0.5
_SEEDED = ("/v1/completions", "/v1/chat/completions", "/generate")


class BatchStoppedError(Exception):
    """The batch cannot go on; one sentence for the operator."""


class Progress(Protocol):
    def advance(self, *, refused: bool) -> None:
        """One more line has its answer."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """`app` runs over `engine`. `seed` is BatchSettings'."""

    app: ASGIApp
    engine: EngineClient
    answers: AnswerFile
    progress: Progress
    seed: int | None = None

    async def run(self, requests: Iterator[BatchRequest], at_once: int) -> None:
        """Answer those without an answer. Raises BatchStoppedError; cancelled, it leaves what is unanswered so."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(self._work(requests))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _work(self, requests: Iterator[BatchRequest]) -> None:
        for request in requests:
            if not self.answers.answers(request):
                answer = await self._answer(request)
                try:
                    self.answers.append(request, answer)
                except OSError as error:
                    raise BatchStoppedError(f"--output cannot be written ({error.strerror})") from None
                self.progress.advance(refused=answer.error is not None)

    async def _answer(self, request: BatchRequest) -> BatchAnswer:
        if request.problem is not None:
            return _answer_line(request, _refusal(request.problem))
        body = msgspec.json.encode(self._with_seed(request))
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            answer = await post_json(self.app, request.url, body)
            if self.engine.state == "dead":
                raise BatchStoppedError(self.engine.fault or "the engine is down")
            if answer.status != 503 or attempt == _MAX_ATTEMPTS:
                break
            await asyncio.sleep(_RETRY_SECONDS)
        return _answer_line(request, answer)

    def _with_seed(self, request: BatchRequest) -> dict[str, object]:
        if self.seed is None or request.url not in _SEEDED or request.body.get("seed") is not None:
            return request.body
        return {**request.body, "seed": derived_seed(self.seed, str(request.custom_id))}


def _refusal(problem: str) -> WholeAnswer:
    """For a line that no route could answer."""
    body = {"error": {"code": "invalid_line", "message": problem, "param": None}}
    return WholeAnswer(400, {}, msgspec.json.encode(body))


def _answer_line(request: BatchRequest, answer: WholeAnswer) -> BatchAnswer:
    request_id = answer.headers.get("x-request-id", "")
    response = BatchResponse(answer.status, request_id, msgspec.Raw(_one_line(answer.body)))
    error = None if answer.status < 400 else _error(request.line, answer)
    return BatchAnswer(ID_PREFIX + secrets.token_hex(12), request.custom_id, response, error)


def _one_line(body: bytes) -> bytes:
    return body if b"\n" not in body else msgspec.json.encode(msgspec.json.decode(body))


def _error(line: int, answer: WholeAnswer) -> BatchError:
    values = msgspec.json.decode(answer.body)
    error = values.get("error") if isinstance(values, dict) else None
    told = error if isinstance(error, dict) else {}
    return BatchError(str(told.get("code") or answer.status), str(told.get("message") or "the request failed"), line)
