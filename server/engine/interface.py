"""The seam between HTTP and the engine: what routes call, and what a fake in a test provides."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Literal, Protocol

from model.sampling_params import SamplingParams
from server.engine.leases import WeightsLease
from server.engine.messages import EngineInfo, EngineStats, Explain, SequenceOutput

EngineState = Literal["loading", "ready", "dead"]


class EngineUnavailableError(Exception):
    """The engine is loading or dead: no request can be taken. `retry_after` is in seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class QueueFullError(Exception):
    """More requests wait than allowed. `retry_after` (seconds) comes from measured rates."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the request queue is full")
        self.retry_after = retry_after


class EngineRequestError(Exception):
    """The engine gave up on a request that it had accepted (it died, or the request failed inside a step)."""


class GrammarFailedError(EngineRequestError):
    """A request's grammar could not be followed to its end."""


class RequestStream(Protocol):
    """The outputs of one submitted request. Ends after the output that carries a finish_reason.

    Iterating raises EngineRequestError if the engine dies or the request fails. Outputs that arrived while the
    consumer was busy are merged into one.
    """

    request_id: int

    def __aiter__(self) -> AsyncIterator[SequenceOutput]: ...

    def abort(self) -> None:
        """Stop the request and free its blocks; harmless after the end."""
        ...


class EngineClient(Protocol):
    """The asyncio side of the engine."""

    on_step: Callable[[int], None] | None
    """Called after each of the engine's steps with the number of tokens that it computed."""

    @property
    def state(self) -> EngineState: ...

    @property
    def fault(self) -> str | None:
        """Why the engine is dead, in words fit for an operator's log, or None."""
        ...

    @property
    def info(self) -> EngineInfo | None:
        """Known once the state has been `ready`."""
        ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def last_heard(self) -> float:
        """Monotonic time of the engine's last message (it sends one at least every second)."""
        ...

    async def start(self) -> None:
        """Start the engine's process; returns at once. `wait_ready` waits for it."""
        ...

    async def wait_ready(self) -> None:
        """Returns when requests are taken; raises EngineUnavailableError if the engine died first."""
        ...

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
    ) -> RequestStream:
        """Hand a request to the engine; never waits. The prompt must fit the context together with max_tokens.

        `deadline` is monotonic seconds. `prompt_logprobs` asks for the log-probabilities of the prompt's tokens from
        `prompt_logprobs_start` on (the first token has none), each with that many alternatives. They come in the
        outputs' `prompt_logprobs`. With `max_tokens` 0 nothing is generated: the prompt may then have one token more
        than the context, and the last output has no token and finish_reason "length".

        `pool` is a number for whose request it is: pools take turns at what waits (server/engine/fair_queue.py).
        `explain`, with these log-probabilities and `max_tokens` 0, takes the tokens' distributions apart.
        `model` names one of the engine's models, None the first; `weights` older ones of it that a lease holds.

        Raises EngineUnavailableError or QueueFullError.
        """
        ...

    def hold_weights(self, model: str | None = None) -> WeightsLease:
        """Requests may name the weights that are served now until the lease is released, whatever is served then."""
        ...

    def check_admission(self, num_sequences: int, num_tokens: int = 0, pool: int = 0) -> None:
        """Raise what `submit` would raise for that many sequences at once; changes nothing. `num_tokens` is the most
        that they may come to together, prompts and answers."""
        ...

    async def close(self) -> None:
        """Abort what runs, end the process, release the socket. Harmless when called twice."""
        ...
