"""One request for explanations in flight: its tokens, generated or given, a few at a time through the engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

from starlette.types import Receive

from model.sampling_params import SamplingParams
from server.admission import chosen_model, refusal, refuse_unless_admitting, start_generation
from server.caller import Caller
from server.engine.interface import EngineRequestError, EngineUnavailableError, QueueFullError, RequestStream
from server.engine.messages import Explain, TokenExplanation
from server.errors import ApiError, InvalidRequestError, engine_down_error, request_failed_error
from server.interruption import Interruption
from server.prompts import Prompt, encode_prompts, make_prompt
from server.provenance import engine_name
from server.schemas.explain import DEFAULT_ALTERNATIVES, ExplainRequest
from server.services import Services

_SCORE_ONLY = SamplingParams(max_tokens=0)
# Tokens taken apart in one step of the engine, for everybody's next token waits for it: with GPT-2's vocabulary one
# takes about ten milliseconds of a CPU.
_TOKENS_PER_STEP = 4
# Seconds until a queue that was full is looked at again, at most.
_PATIENCE = 1.0


@dataclass(frozen=True, slots=True)
class Explained:
    """`tokens` explains `token_ids` from the request's start on. `finish_reason` is None for tokens that were given and
    where more would have come after the last one that was asked for."""

    prompt: Prompt
    token_ids: list[int]
    finish_reason: str | None
    tokens: list[TokenExplanation]


async def explain(body: ExplainRequest, services: Services, caller: Caller, receive: Receive) -> Explained:
    """Generate what is not given, and take it apart.

    Raises ApiError for what is refused or fails, ClientGoneError when the client leaves.
    """
    prompt = await _prompt(body, services)
    if body.tokens is not None:
        token_ids, reason = body.tokens, None
    else:
        token_ids, reason = await _generate(prompt, body, services, caller, receive)
    wanted = token_ids[: body.start + body.count]
    work = _Explaining(prompt, wanted, body, services, caller.pool)
    return Explained(prompt, token_ids, reason, await work.run(receive))


async def _prompt(body: ExplainRequest, services: Services) -> Prompt:
    """Raises InvalidRequestError for what the model cannot do."""
    arrival = time.monotonic()
    model = chosen_model(body.model, body.seed, services)
    [token_ids] = await encode_prompts([body.prompt], model.tokenizer)
    tokens, max_tokens = body.tokens, body.max_tokens
    if tokens is not None:
        if max(tokens) >= model.output_width:
            message = f"tokens holds a token id that is not below {model.output_width}"
            raise InvalidRequestError(message, param="tokens")
        if body.start >= len(tokens):
            raise InvalidRequestError("start must be less than the number of tokens", param="start")
        max_tokens = len(tokens)
        body = body.model_copy(update={"min_tokens": min(body.min_tokens, max_tokens)})
    return make_prompt(
        token_ids, body, max_tokens, model,
        arrival=arrival, max_tokens_field="max_tokens" if tokens is None else "tokens",
    )  # fmt: skip


async def _generate(
    prompt: Prompt, body: ExplainRequest, services: Services, caller: Caller, receive: Receive
) -> tuple[list[int], str | None]:
    """The tokens that the request draws, as far as they are asked about; no token depends on how many follow it."""
    params, limit = prompt.params, body.start + body.count
    is_cut = params.max_tokens > limit
    if is_cut:
        params = replace(params, max_tokens=limit, min_tokens=min(params.min_tokens, limit))
    generation = start_generation([replace(prompt, params=params)], services, caller)
    try:
        [whole] = await generation.collect(receive)
    finally:
        generation.close()
    return whole.token_ids, None if is_cut and whole.finish_reason == "length" else whole.finish_reason


class _Explaining:
    """Windows of the tokens, one after the other; whoever creates it calls `run`."""

    def __init__(
        self, prompt: Prompt, token_ids: list[int], body: ExplainRequest, services: Services, pool: int
    ) -> None:
        """Submits the first window. Raises ApiError."""
        self._engine, self._lifecycle, self._metrics = services.engine, services.lifecycle, services.metrics
        self._prompt, self._token_ids, self._pool = prompt, token_ids, pool
        self._model = engine_name(services.ready_info, prompt.model)
        num_top = DEFAULT_ALTERNATIVES if body.logprobs is None else body.logprobs
        self._wanted = Explain(prompt.params, prompt.token_ids[0], len(prompt.token_ids), num_top)
        self._starts = list(range(body.start, len(token_ids), _TOKENS_PER_STEP))
        self._interruption = Interruption()
        self._stream: RequestStream | None = None
        if body.tokens is not None:
            self._submit_first(services)
        self._lifecycle.add(self)

    def _submit_first(self, services: Services) -> None:
        refuse_unless_admitting(services)
        try:
            self._stream = self._submit(self._starts[0])
        except (QueueFullError, EngineUnavailableError) as error:
            refused = refusal(error, services)
            self._metrics.count_rejection(refused.code)
            raise refused from None

    async def run(self, receive: Receive) -> list[TokenExplanation]:
        """Raises ClientGoneError when the client left, ApiError when the request was interrupted or the engine gave up
        on it. In every case nothing of it is in the engine afterwards."""
        try:
            return await self._interruption.run(self._explain_all(), receive)
        except (EngineRequestError, EngineUnavailableError):
            raise (request_failed_error() if self._engine.state == "ready" else engine_down_error()) from None
        finally:
            if self._stream is not None:
                self._stream.abort()
            self._lifecycle.remove(self)

    def interrupt(self, error: ApiError | None) -> None:
        """End with `error`, or silently when the client has left; harmless after the end."""
        self._interruption.interrupt(error)

    async def _explain_all(self) -> list[TokenExplanation]:
        found: list[TokenExplanation] = []
        for start in self._starts:
            self._stream = self._stream or await self._submit_in_turn(start)
            async for output in self._stream:
                found += output.explained or ()
            self._stream = None
            if len(found) < min(start + _TOKENS_PER_STEP, len(self._token_ids)) - self._starts[0]:
                raise EngineRequestError("the engine gave up on the request")
        return found

    def _submit(self, start: int) -> RequestStream:
        text = self._prompt.token_ids + self._token_ids[: start + _TOKENS_PER_STEP]
        return self._engine.submit(
            text,
            _SCORE_ONLY,
            prompt_logprobs=0,
            prompt_logprobs_start=len(self._prompt.token_ids) + start,
            pool=self._pool,
            explain=self._wanted,
            model=self._model,
        )

    async def _submit_in_turn(self, start: int) -> RequestStream:
        """What was let in waits for room in the queue, where a new request would be refused."""
        while True:
            try:
                return self._submit(start)
            except QueueFullError as error:
                await asyncio.sleep(min(error.retry_after, _PATIENCE))
