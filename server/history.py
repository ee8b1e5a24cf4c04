"""RequestHistory: the last requests for text, for `GET /requests/{id}`. In memory alone, and only when asked for."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from model.grammar import Grammar
from model.sampling_params import SamplingParams
from server.caller import Caller
from server.engine.messages import RequestTimings, RequestTrace
from server.generation import Generation
from server.output import Usage
from server.prompts import Prompt
from server.schemas.native import GenerateRequest

# Every answer's id, and the header X-Request-Id, end with the number that was drawn for the request.
_ID = re.compile(r"(?:[a-z]{1,16}-)?([0-9a-f]{24})")
# What a replay takes from a request in other ways, or leaves out because no token depends on it.
NOT_REPLAYED = frozenset({"prompt", "model", "n", "stop", "stream", "echo", "deadline_ms"})


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A request that was admitted. `generation` goes on to change until it has ended."""

    caller: Caller
    model: str
    block_size: int
    generation: Generation
    created: float = field(default_factory=time.time)


class RequestHistory:
    """The last `capacity` requests, the oldest of which gives way to a new one."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[str, HistoryEntry] = OrderedDict()

    def add(self, entry: HistoryEntry) -> None:
        match = _ID.fullmatch(entry.caller.request_id)
        if match is None:
            return
        self._entries[match[1]] = entry
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)

    def find(self, request_id: str, pool: int) -> HistoryEntry | None:
        """By any of its ids; only whoever has the key that made a request is told of it."""
        match = _ID.fullmatch(request_id)
        entry = None if match is None else self._entries.get(match[1])
        return entry if entry is not None and entry.caller.pool == pool else None


class BatchSizes(msgspec.Struct, frozen=True):
    """How many sequences the engine computed at once in the steps that a choice was in."""

    min: int
    mean: float
    max: int


class ChoiceTimings(msgspec.Struct, frozen=True):
    """Seconds from the request's arrival at the engine; null for what has not come."""

    started: float | None
    first_token: float | None
    finished: float | None


class ChoiceRecord(msgspec.Struct, frozen=True):
    """`prompt` is the index of the prompt that the choice answers. `finish_reason` is null while it runs."""

    index: int
    prompt: int
    seed: int
    finish_reason: str | None
    completion_tokens: int
    timings: ChoiceTimings | None
    steps: int
    batch_size: BatchSizes | None
    blocks_reused: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int


class RequestRecord(msgspec.Struct, frozen=True):
    """`parameters` and `replay` have an entry for each prompt; a replay is a body for POST /generate, or null for a
    request that generated nothing."""

    id: str
    model: str
    created: int
    status: str
    parameters: list[dict[str, Any]]
    choices: list[ChoiceRecord]
    usage: Usage
    provenance: dict[str, object]
    replay: dict[str, Any] | list[dict[str, Any] | None] | None


def describe(entry: HistoryEntry) -> RequestRecord:
    """What is known by now. A request with one prompt has its replay by itself, one with several a list of them."""
    generation = entry.generation
    replays = [replay_body(prompt, entry.model) for prompt in generation.prompts]
    return RequestRecord(
        id=entry.caller.request_id,
        model=entry.model,
        created=int(entry.created),
        status="finished" if generation.has_ended else "running",
        parameters=[_parameters(prompt, generation.arrival) for prompt in generation.prompts],
        choices=[_choice(index, entry) for index in range(len(generation.choices))],
        usage=generation.usage,
        provenance=generation.provenance,
        replay=replays[0] if len(replays) == 1 else replays,
    )


def replay_body(prompt: Prompt, model: str) -> dict[str, Any] | None:
    """The body with which POST /generate draws the same tokens from the same weights; None where none were drawn."""
    if not prompt.params.max_tokens:
        return None
    chosen = {name: value for name, value in _plain(prompt.params).items() if name not in NOT_REPLAYED}
    chosen["grammar"] = None if prompt.params.grammar is None else _grammar_fields(prompt.params.grammar)
    body = {"prompt": prompt.token_ids, "model": model, **chosen, "n": prompt.n, "stop": prompt.stops}
    return {name: value for name, value in body.items() if name in GenerateRequest.model_fields}


def _grammar_fields(grammar: Grammar) -> dict[str, Any]:
    """As POST /generate takes it."""
    is_json = grammar.type in ("json_schema", "choice")
    return {"type": grammar.type, "value": json.loads(grammar.value) if is_json else grammar.value}


def _parameters(prompt: Prompt, arrival: float) -> dict[str, Any]:
    deadline = None if prompt.deadline is None else round((prompt.deadline - arrival) * 1000)
    return {**_plain(prompt.params), "n": prompt.n, "stop": prompt.stops, "deadline_ms": deadline}


def _plain(params: SamplingParams) -> dict[str, Any]:
    values = {each.name: getattr(params, each.name) for each in dataclasses.fields(params)}
    plain: dict[str, Any] = msgspec.to_builtins(values, str_keys=True)
    return plain


def _choice(index: int, entry: HistoryEntry) -> ChoiceRecord:
    generation = entry.generation
    choice = generation.choices[index]
    trace, timings = generation.traces[index] or RequestTrace(), generation.timings[index]
    reason = choice.finish_reason
    return ChoiceRecord(
        index=index,
        prompt=index // generation.prompts[0].n,
        seed=generation.seeds[index],
        finish_reason=generation.end_reason if reason is None and generation.has_ended else reason,
        completion_tokens=choice.num_tokens,
        timings=None if timings is None else _timings(timings, generation.ended_at[index]),
        steps=trace.num_steps,
        batch_size=_batch_sizes(trace),
        blocks_reused=choice.cached_tokens // entry.block_size,
        preemptions=0 if timings is None else timings.num_preemptions,
        drafted_tokens=trace.num_draft_tokens,
        accepted_tokens=trace.num_accepted_tokens,
    )


def _batch_sizes(trace: RequestTrace) -> BatchSizes | None:
    if not trace.num_steps:
        return None
    return BatchSizes(trace.min_batch_size, trace.sum_batch_sizes / trace.num_steps, trace.max_batch_size)


def _timings(timings: RequestTimings, ended_at: float | None) -> ChoiceTimings:
    """The engine tells no end of a choice that a stop string ended: it was told of it."""

    def since(moment: float | None) -> float | None:
        return round(moment - timings.arrival, 6) if moment else None

    return ChoiceTimings(
        since(timings.first_scheduled), since(timings.first_token), since(timings.finished or ended_at)
    )
