"""What a step tells of its sequences, as messages."""

from __future__ import annotations

import itertools

from server.engine.messages import RequestTimings, SequenceOutput, TokenExplanation, TokenLogprobs
from server.engine.scheduled_batch import ScheduledBatch
from server.engine.sequence import Sequence


def logprobs_by_request(
    batch: ScheduledBatch, drawn: list[list[TokenLogprobs] | None]
) -> dict[int, list[TokenLogprobs]]:
    """By request id, those of all its drawn tokens; `drawn` has an entry for each, None where none are wanted."""
    found: dict[int, list[TokenLogprobs]] = {}
    entries = iter(drawn)
    for seq, wanted in zip(batch.sequences, batch.needs_sample, strict=True):
        if wanted:
            for entry in itertools.islice(entries, 1 + len(seq.draft)):
                if entry is not None:
                    found.setdefault(seq.request_id, []).extend(entry)
    return found


def make_output(
    seq: Sequence,
    token_ids: list[int],
    finished: bool,
    logprobs: list[TokenLogprobs] | None = None,
    prompt_logprobs: list[TokenLogprobs] | None = None,
    explained: list[TokenExplanation] | None = None,
) -> SequenceOutput:
    return SequenceOutput(
        request_id=seq.request_id,
        token_ids=token_ids,
        finish_reason=seq.finish_reason if finished else None,
        stop_token_id=seq.stop_token_id,
        keeps_last=finished and seq.keeps_last,
        cached_tokens=seq.cached_tokens,
        logprobs=logprobs,
        timings=_timings(seq) if finished or seq.trace is not None or _is_first(seq, token_ids) else None,
        prompt_logprobs=prompt_logprobs,
        trace=seq.trace,
        explained=explained,
    )


def _is_first(seq: Sequence, token_ids: list[int]) -> bool:
    """Whether these are its first tokens."""
    return bool(token_ids) and seq.num_output_tokens == len(token_ids)


def trace_step(batch: ScheduledBatch) -> set[int]:
    """Enter the step into its sequences' traces; the ids of those that guess in it."""
    size = len(batch.sequences)
    guessing = set()
    for seq in batch.sequences:
        trace = seq.trace
        if trace is None:
            continue
        trace.min_batch_size = min(trace.min_batch_size, size) if trace.num_steps else size
        trace.max_batch_size = max(trace.max_batch_size, size)
        trace.sum_batch_sizes += size
        trace.num_steps += 1
        if seq.draft:
            trace.num_draft_tokens += len(seq.draft)
            guessing.add(seq.request_id)
    return guessing


def finished_output(seq: Sequence) -> SequenceOutput:
    return make_output(seq, [], True)


def _timings(seq: Sequence) -> RequestTimings:
    return RequestTimings(
        arrival=seq.arrival_time,
        first_scheduled=seq.first_scheduled,
        first_token=seq.first_token,
        finished=seq.finished,
        num_preemptions=seq.num_preemptions,
    )
