"""Scheduler: which sequences compute which tokens in the next step. Continuous batching, first come first served
among the requests of one pool of clients; the pools take turns.

Free of torch. One step mixes a token of every decoding sequence with chunks of prompts under a token budget.
One order always holds: running sequences are sorted by their first admission, and whoever was preempted is admitted
again before anybody else. So the newest running sequence is the one to preempt, and it returns to the front.
"""

from __future__ import annotations

import collections
import heapq
import time
from collections.abc import Callable

from model.errors import QuillError
from server.engine.block_manager import BlockManager
from server.engine.counters import Counters, GenerationLimits
from server.engine.fair_queue import FairQueue
from server.engine.scheduled_batch import ScheduledBatch as ScheduledBatch
from server.engine.scheduled_batch import is_decode, make_batch, schedule_prefill
from server.engine.sequence import FinishReason, InvalidSequenceError, Sequence, SequenceStatus

SequenceUpdate = tuple[Sequence, list[int], bool]
"""A sequence, its new token ids (none, one, or more where a draft was right), and whether it is finished."""


class SchedulerConfigError(QuillError):
    """Limits with which some sequence could never be served."""


class Scheduler:
    """Queues and limits. `max_num_seqs` bounds the running sequences, `max_num_batched_tokens` a step's tokens.

    Sequences of several models, or of a model's old and new weights, share queue, seats, budget and blocks: each set of
    weights is a generation (see Sequence), and `max_model_len` and `max_draft_rows` are those of generation 0. A step
    decodes for all of them.

    Counted from the start: `num_steps`, of which each runs one generation's part of a batch, and `counters` by
    generation. Their `prompt_tokens` are those of prompts that gave a first token or were scored.
    Sequences draft tokens as long as a generation's part of a step stays within its `max_draft_rows` rows.

    Raises SchedulerConfigError if the pool cannot hold one sequence of `max_model_len`, or if the budget is below
    `max_num_seqs`: decodes could then fill it step after step, and a prompt would never get its turn.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
        max_draft_rows: int = 0,
    ) -> None:
        if max_num_seqs < 1:
            raise SchedulerConfigError("max_num_seqs must be at least 1")
        if max_num_batched_tokens < max_num_seqs:
            raise SchedulerConfigError(
                f"max_num_batched_tokens must be at least max_num_seqs, which is {max_num_seqs}: raise it"
            )
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_steps = 0
        self.counters: dict[int, Counters] = {}
        self._limits: dict[int, GenerationLimits] = {}
        self._clock = clock
        self._waiting = FairQueue()
        self._running: dict[int, Sequence] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap; entries of finished sequences linger for a while
        self.add_generation(0, max_model_len, max_draft_rows)

    def add_generation(self, generation: int, max_model_len: int, max_draft_rows: int = 0) -> None:
        """Take sequences for another set of weights, whose block size the block manager knows.

        Raises SchedulerConfigError if the pool cannot hold one sequence of `max_model_len`.
        """
        capacity = self.block_manager.num_blocks * self.block_manager.block_size_of(generation)
        if capacity < max_model_len:
            raise SchedulerConfigError(
                f"kv_cache_memory holds {capacity} tokens, less than the context of {max_model_len}: raise it"
            )
        self._limits[generation] = GenerationLimits(max_model_len, max_draft_rows)
        self.counters[generation] = Counters()

    def count_unfinished(self, generation: int) -> tuple[int, int]:
        """(running, waiting) sequences of one set of weights"""
        running = sum([seq.generation == generation for seq in self._running.values()])
        return running, sum([seq.generation == generation for seq in self._waiting])

    def total(self) -> Counters:
        """The counters of all generations."""
        total = Counters()
        for counters in self.counters.values():
            total.add(counters)
        return total

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def waiting(self) -> list[Sequence]:
        """Of each pool the oldest first, after all that were preempted."""
        return list(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        """In the order of their first admission."""
        return list(self._running.values())

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Raises InvalidSequenceError for an id that is in use or a limit beyond the context."""
        if self._find(seq.request_id) is not None:
            raise InvalidSequenceError(f"request_id {seq.request_id} is in use: choose another")
        limit = self._limits[seq.generation].max_model_len
        if seq.max_num_tokens > limit:
            raise InvalidSequenceError(f"prompt and max_tokens exceed the context of {limit}: lower one")
        self._waiting.add(seq)
        if seq.deadline is not None:
            heapq.heappush(self._deadlines, (seq.deadline, seq.request_id))

    def abort(self, request_id: int, finish_reason: FinishReason = "abort") -> Sequence | None:
        """End a sequence in any state and free its blocks at once. None if it is unknown or already finished.

        Between `schedule` and `advance` it is safe only once the step's computation is over; after that, steps that
        still run write to freed blocks before any later step does.
        """
        seq = self._find(request_id)
        if seq is not None:
            self._finish(seq, finish_reason, self._clock())
        return seq

    def schedule(self) -> ScheduledBatch:
        """Choose the next step's work.

        Calling it again without `advance`, after a step that failed, chooses the same tokens again.
        """
        now = self._clock()
        expired = self._expire(now)
        for seq in self._running.values():
            if seq.draft:
                seq.draft = []
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        budget = self._schedule_running(decodes, prefills)
        if self._waiting:
            self._admit_waiting(decodes, prefills, budget, now)
        return make_batch(decodes, prefills, expired)

    def update(self, batch: ScheduledBatch, sampled: list[int | None]) -> list[SequenceUpdate]:
        """Take in a step that is over: `advance` and `settle` at once."""
        self.advance(batch)
        return self.settle(batch, sampled)

    def advance(self, batch: ScheduledBatch) -> None:
        """Count a step that was handed to the device as computed, so that the next one can be scheduled behind it. What
        it draws is pending until `settle`.

        A step with sequences that wait for their tokens (see Sequence) must be settled before the next `schedule`.
        """
        row = 0
        for seq, count, needs_sample in zip(
            batch.sequences, batch.num_scheduled_tokens, batch.needs_sample, strict=True
        ):
            if seq.status is SequenceStatus.RUNNING and not seq.draft:
                seq.num_computed_tokens += count
                seq.num_scheduled_tokens = 0
                if needs_sample:
                    seq.num_pending += 1
                    seq.pending_row = row
            if needs_sample:
                row += 1 + len(seq.draft)

    def settle(self, batch: ScheduledBatch, sampled: list[int | None]) -> list[SequenceUpdate]:
        """Take in the oldest step that was advanced: `sampled` holds, in order, one token id for each row with
        `needs_sample` and each token of a draft, or None where drawing it failed, which ends that sequence with its
        `failure` as finish_reason.

        Returns the sequences that got a token, that were scored in part or that ended. Rows that ended since they were
        scheduled are passed over.
        """
        assert len(sampled) == batch.num_samples, "one entry of sampled per token to be drawn"
        now = self._clock()
        self.num_steps += 1
        results: list[SequenceUpdate] = []
        tokens = iter(sampled)
        finished = SequenceStatus.FINISHED
        rows = zip(batch.sequences, batch.num_scheduled_tokens, batch.needs_sample, strict=True)
        for seq, count, needs_sample in rows:
            drawn = [next(tokens) for _ in range(1 + len(seq.draft))] if needs_sample else []
            if seq.status is finished:
                continue
            if seq.draft:
                results.append(self._take_draft(seq, drawn, now))
                continue
            scored = seq.prompt_score is not None and seq.prompt_score.take(seq.num_computed_tokens - count, count)
            if seq.num_computed_tokens >= seq.next_cache_boundary:
                self.block_manager.mark_computed(seq)
            if needs_sample:
                seq.num_pending -= 1
                results.append(self._take_token(seq, drawn[0], now))
            elif seq.score_only and seq.num_computed_tokens == len(seq.token_ids):
                self.counters[seq.generation].prompt_tokens += seq.num_prompt_tokens
                self._finish(seq, "length", now)
                results.append((seq, [], True))
            elif scored:
                results.append((seq, [], False))
        return results

    def _schedule_running(self, decodes: list[Sequence], prefills: list[Sequence]) -> int:
        """Fill the lists with running sequences, oldest first. Returns the budget left.

        Every decode has its token set aside before prompts share the rest.
        """
        running = [seq for seq in self._running.values() if not seq.is_drawn_out]
        block_size_of = self.block_manager.block_size_of
        drafts = self._draft_lengths(running)
        budget = self.max_num_batched_tokens - sum([is_decode(seq) for seq in running])
        for seq in running:
            if seq.request_id not in self._running:
                break  # preempted for an older one, as are all after it
            if is_decode(seq):
                capacity = len(seq.block_table) * block_size_of(seq.generation)
                if seq.num_computed_tokens >= capacity and not self._make_room(seq):
                    break
                seq.num_scheduled_tokens = 1
                if drafts:
                    self._draft(seq, min(drafts[seq.generation], budget))
                    budget -= len(seq.draft)
                    seq.num_scheduled_tokens += len(seq.draft)
                (prefills if seq.draft else decodes).append(seq)
            else:
                budget -= schedule_prefill(seq, budget)
                if seq.num_scheduled_tokens:
                    prefills.append(seq)
        return budget

    def _draft_lengths(self, running: list[Sequence]) -> dict[int, int]:
        """How many tokens each sequence may guess, by generation; empty where none may: rows that fill a step up to
        `max_draft_rows` cost next to nothing, but blocks that others wait for must not go into guesses."""
        if not running or self._waiting or self.block_manager.num_free_blocks < 2 * len(running):
            return {}
        if len(self._limits) == 1:
            counts = {0: len(running)}
        else:
            counts = collections.Counter([seq.generation for seq in running])
        lengths = {key: max(0, self._limits[key].max_draft_rows // count - 1) for key, count in counts.items()}
        return lengths if any(lengths.values()) else {}

    def _make_room(self, seq: Sequence) -> bool:
        """Give `seq` a slot for one token, preempting the newest sequences as needed; False if that reached `seq`."""
        while not self.block_manager.allocate_slots(seq, 1):
            victim = self._running.popitem()[1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Give up a sequence's blocks: its tokens, prompt and output, will be computed again."""
        self.block_manager.free(seq)
        seq.num_computed_tokens = 0
        seq.num_scheduled_tokens = 0
        seq.num_preemptions += 1
        seq.status = SequenceStatus.WAITING
        self.counters[seq.generation].num_preemptions += 1
        self._waiting.give_back(seq)

    def _admit_waiting(self, decodes: list[Sequence], prefills: list[Sequence], budget: int, now: float) -> None:
        """Admit from the front of the queue until the budget, the seats or the blocks run out.

        A block for each running sequence is kept back: admitting into the last blocks would soon preempt again.
        """
        blocks = self.block_manager
        in_progress = {key for seq in prefills for key in blocks.blocks_in_progress(seq)}
        while self._waiting and budget and len(self._running) < self.max_num_seqs:
            seq = self._waiting.peek()
            if seq.num_pending:
                return  # preempted with a token still on the device, which must be computed again too
            if in_progress and self._better_later(seq, in_progress):
                return
            if not blocks.admit(seq, reserve=len(self._running)):
                return
            self._waiting.take(seq)
            self._running[seq.request_id] = seq
            seq.status = SequenceStatus.RUNNING
            if not seq.first_scheduled:
                seq.first_scheduled = now
            rows = decodes if is_decode(seq) else prefills
            budget -= schedule_prefill(seq, budget)
            rows.append(seq)
            in_progress.update(blocks.blocks_in_progress(seq))

    def _better_later(self, seq: Sequence, in_progress: set[bytes]) -> bool:
        """Whether an older sequence is just computing at least half of what `seq` needs (several choices for one
        prompt, a shared system prompt). The rest of the queue waits with it, to keep the order; that lasts no
        longer than the older one's prefill."""
        cached, shared = self.block_manager.look_ahead(seq, in_progress)
        return 2 * shared >= seq.num_tokens - cached

    def _take_token(self, seq: Sequence, token_id: int | None, now: float) -> SequenceUpdate:
        if token_id is None:
            self._finish(seq, seq.failure, now)
            return seq, [], True
        if not seq.first_token:
            seq.first_token = now
            self.counters[seq.generation].prompt_tokens += seq.num_prompt_tokens
        seq.token_ids.append(token_id)
        self.counters[seq.generation].generation_tokens += 1
        finish_reason = seq.check_stop()
        if finish_reason is None:
            return seq, [token_id], False
        self._finish(seq, finish_reason, now)
        return seq, [token_id], True

    def _take_draft(self, seq: Sequence, drawn: list[int | None], now: float) -> SequenceUpdate:
        """Take the drawn tokens as long as each is what the draft had computed on."""
        draft, seq.draft = seq.draft, []
        seq.num_scheduled_tokens = 0
        taken: list[int] = []
        finished = False
        for place, token_id in enumerate(drawn):
            seq.num_computed_tokens += 1
            if seq.num_computed_tokens >= seq.next_cache_boundary:
                self.block_manager.mark_computed(seq)
            _, tokens, finished = self._take_token(seq, token_id, now)
            taken += tokens
            if finished or place == len(draft) or token_id != draft[place]:
                break
        num_right = max(0, len(taken) - 1)
        assert seq.lookup is not None, "drafts come from it"
        seq.lookup.settle(num_right)
        counters = self.counters[seq.generation]
        counters.num_drafts += 1
        counters.num_draft_tokens += len(draft)
        counters.num_accepted_tokens += num_right
        return seq, taken, finished

    def _draft(self, seq: Sequence, most: int) -> None:
        """Guess up to `most` tokens where the sequence may still have one more than that, and there are slots."""
        most = min(most, seq.max_num_tokens - len(seq.token_ids) - 1)
        if seq.lookup is None or most < 1:
            return
        draft = seq.lookup.propose(seq.token_ids, most)
        if draft and self.block_manager.allocate_slots(seq, 1 + len(draft)):
            seq.draft = draft

    def _find(self, request_id: int) -> Sequence | None:
        return self._running.get(request_id) or self._waiting.get(request_id)

    def _finish(self, seq: Sequence, finish_reason: FinishReason, now: float) -> None:
        self._running.pop(seq.request_id, None)
        self._waiting.remove(seq.request_id)
        self.block_manager.free(seq)
        seq.end(finish_reason, now)

    def _expire(self, now: float) -> list[Sequence]:
        """Finish the sequences whose deadline has passed."""
        expired: list[Sequence] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            seq = self._find(request_id)
            if seq is not None and seq.deadline == deadline:
                self._finish(seq, "deadline", now)
                expired.append(seq)
        if len(self._deadlines) > 2 * (self.num_running + self.num_waiting) + 64:
            self._deadlines = [entry for entry in self._deadlines if self._find(entry[1]) is not None]
            heapq.heapify(self._deadlines)
        return expired
