"""Scheduler: policy, limits, stops, and whole runs of a fake model over a simulated KV store.

The fake model writes a value per slot that depends on all values before it, and draws its token from the values it
reads back through the block table. Slots are poisoned as soon as nobody may read them, so that a block that is
reused, shared or overwritten wrongly changes the tokens.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.sampling_params import SamplingParams
from server.engine import block_manager as block_manager_module
from server.engine.block_manager import BlockManager
from server.engine.scheduler import ScheduledBatch, Scheduler, SchedulerConfigError, SequenceUpdate
from server.engine.sequence import InvalidSequenceError, Sequence, SequenceStatus

VOCAB = 11
EOS = 10
POISON = -1


class Clock:
    def __init__(self) -> None:
        self.now = 1.0

    def __call__(self) -> float:
        return self.now


def draw(values: list[int], num_output_tokens: int, seed: int) -> int:
    """The fake model's next token: a function of the KV of all tokens, the output position and the seed."""
    return random.Random(hash((tuple(values), num_output_tokens, seed))).randrange(VOCAB)


def run_alone(prompt: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    """The oracle: the same model without blocks or neighbours. Returns the generated tokens."""
    tokens, previous = list(prompt), 0
    values: list[int] = []
    while True:
        for token in tokens[len(values) :]:
            previous = hash((previous, token))
            values.append(previous)
        token = draw(values, len(tokens) - len(prompt), params.seed)
        tokens.append(token)
        output = tokens[len(prompt) :]
        full = len(output) == params.max_tokens or len(tokens) == max_model_len
        if full or token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
            return output


class FakeRunner:
    """The simulated KV store, one value per slot."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.size = manager.block_size
        self.slots = [POISON] * (manager.num_blocks * self.size)

    def poison_unreadable(self) -> None:
        for block in range(self.manager.num_blocks):
            if not self.manager.ref_count(block) and not self.manager.is_cached(block):
                self.slots[block * self.size : (block + 1) * self.size] = [POISON] * self.size

    def slot(self, seq: Sequence, position: int) -> int:
        return seq.block_table[position // self.size] * self.size + position % self.size

    def write(self, seq: Sequence, position: int) -> None:
        block = seq.block_table[position // self.size]
        assert self.manager.ref_count(block) == 1, "a shared block is written"
        assert not self.manager.is_cached(block), "a cached block is written"
        previous = self.slots[self.slot(seq, position - 1)] if position else 0
        assert previous != POISON
        self.slots[self.slot(seq, position)] = hash((previous, seq.token_ids[position]))

    def run(self, batch: ScheduledBatch) -> list[int | None]:
        rows = list(zip(batch.sequences, batch.num_scheduled_tokens, batch.needs_sample, strict=True))
        for seq, count, _ in rows:
            for position in range(seq.num_computed_tokens, seq.num_computed_tokens + count):
                self.write(seq, position)
        return [self.sample(seq) for seq, _, needs_sample in rows if needs_sample]

    def sample(self, seq: Sequence) -> int:
        values = [self.slots[self.slot(seq, position)] for position in range(seq.num_tokens)]
        assert POISON not in values
        return draw(values, seq.num_output_tokens, seq.params.seed)


class Engine:
    """A scheduler with a fake model, checked after every step."""

    def __init__(
        self, num_blocks: int, block_size: int, max_num_seqs: int = 8, budget: int = 64, max_model_len: int = 0,
        prefix_caching: bool = True,
    ) -> None:  # fmt: skip
        self.clock = Clock()
        self.manager = BlockManager(num_blocks, block_size, prefix_caching)
        self.max_model_len = max_model_len or num_blocks * block_size
        self.scheduler = Scheduler(self.manager, max_num_seqs, budget, self.max_model_len, self.clock)
        self.runner = FakeRunner(self.manager)
        self.added: list[Sequence] = []
        self.admitted: list[int] = []
        self.before_reset: set[int] = set()

    def add(self, prompt: list[int], params: SamplingParams | None = None, deadline: float | None = None) -> Sequence:
        seq = Sequence(
            len(self.added), prompt, params or SamplingParams(), (EOS,), self.max_model_len, self.clock.now, deadline
        )
        self.scheduler.add(seq)
        self.added.append(seq)
        return seq

    def schedule(self) -> ScheduledBatch:
        before = self.scheduler.running
        batch = self.scheduler.schedule()
        self.check_batch(batch, before)
        self.runner.poison_unreadable()
        return batch

    def step(self) -> tuple[ScheduledBatch, list[SequenceUpdate]]:
        self.clock.now += 1.0
        batch = self.schedule()
        updates = self.scheduler.update(batch, self.runner.run(batch))
        self.runner.poison_unreadable()
        self.check_state()
        return batch, updates

    def reset_prefix_cache(self) -> None:
        self.before_reset |= {seq.request_id for seq in self.scheduler.running}
        self.manager.reset_prefix_cache()
        self.runner.poison_unreadable()

    def run(self, max_steps: int = 10_000) -> None:
        while self.scheduler.has_unfinished:
            max_steps -= 1
            assert max_steps, "the sequences do not finish"
            self.step()

    def check_batch(self, batch: ScheduledBatch, running_before: list[Sequence]) -> None:
        scheduler, rows = self.scheduler, batch.sequences
        counts = batch.num_scheduled_tokens
        assert batch.num_tokens == sum(counts) <= scheduler.max_num_batched_tokens
        assert len(rows) == len({seq.request_id for seq in rows}) <= scheduler.num_running <= scheduler.max_num_seqs
        for index, (seq, count) in enumerate(zip(rows, counts, strict=True)):
            assert count == seq.num_scheduled_tokens >= 1
            end = seq.num_computed_tokens + count
            assert end <= min(seq.num_tokens, len(seq.block_table) * self.manager.block_size)
            assert batch.needs_sample[index] == (end == seq.num_tokens)
            decoding = seq.num_tokens - seq.num_computed_tokens == 1 and seq.num_output_tokens > 0
            assert decoding == (index < batch.num_decodes)
        running = scheduler.running
        if scheduler.has_unfinished:
            assert rows, "some work is always possible"
            assert running[0] in rows, "the oldest always progresses"
        in_batch = {seq.request_id for seq in rows}
        for seq in running_before:
            if seq.status is SequenceStatus.RUNNING and seq.num_output_tokens and not is_prefilling(seq):
                assert seq.request_id in in_batch, "every decode that keeps its blocks progresses"
            if seq.status is SequenceStatus.WAITING:
                assert all(other.request_id < seq.request_id for other in running), "preempted for a newer one"
        known = set(self.admitted)
        self.admitted += [seq.request_id for seq in running if seq.request_id not in known]
        assert self.admitted == sorted(self.admitted), "first scheduled in the order of arrival"

    def check_state(self) -> None:
        scheduler, manager = self.scheduler, self.manager
        waiting, running = scheduler.waiting, scheduler.running
        order = [seq.request_id for seq in running + waiting]
        assert order == sorted(order)
        assert (len(waiting), len(running)) == (scheduler.num_waiting, scheduler.num_running)
        assert all(not seq.block_table and not seq.num_computed_tokens for seq in waiting)
        holders: dict[int, list[tuple[Sequence, int]]] = {}
        for seq in running:
            for index, block in enumerate(seq.block_table):
                holders.setdefault(block, []).append((seq, (index + 1) * manager.block_size))
        for block in range(manager.num_blocks):
            users = holders.get(block, [])
            assert manager.ref_count(block) == len(users)
            if len(users) > 1:
                assert manager.is_cached(block) or all(seq.request_id in self.before_reset for seq, _ in users)
                assert len({(end, *seq.token_ids[:end]) for seq, end in users}) == 1
                assert all(seq.num_computed_tokens >= end for seq, end in users)
        assert manager.num_free_blocks + len(holders) == manager.num_blocks

    def check_outputs(self) -> None:
        """Every sequence that ended by itself has the tokens it would have alone; a cut one a prefix of them."""
        for seq in self.added:
            expected = run_alone(seq.token_ids[: seq.num_prompt_tokens], seq.params, self.max_model_len)
            if seq.finish_reason in ("stop", "length"):
                assert seq.output_token_ids == expected
            else:
                assert seq.output_token_ids == expected[: seq.num_output_tokens]


def is_prefilling(seq: Sequence) -> bool:
    return seq.num_tokens - seq.num_computed_tokens > 1 or seq.num_computed_tokens < seq.num_prompt_tokens


def params(max_tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **more)  # type: ignore[arg-type]


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, aborts, deadlines, failed steps and resets over pools that force preemption."""

    engine: Engine

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(5, 12),
        max_num_seqs=st.integers(1, 6),
        spare_budget=st.integers(0, 20),
        prefix_caching=st.booleans(),
    )
    def start(
        self, block_size: int, num_blocks: int, max_num_seqs: int, spare_budget: int, prefix_caching: bool
    ) -> None:
        self.engine = Engine(
            num_blocks, block_size, max_num_seqs, max_num_seqs + spare_budget, prefix_caching=prefix_caching
        )

    @rule(data=st.data(), max_tokens=st.integers(1, 30), seed=st.integers(0, 3), stops=st.booleans())
    def add(self, data: st.DataObject, max_tokens: int, seed: int, stops: bool) -> None:
        limit = self.engine.max_model_len - 1
        earlier = data.draw(st.sampled_from([None, *self.engine.added]))
        if earlier is not None:  # one more turn of that conversation
            prompt = [*earlier.token_ids, *data.draw(st.lists(st.integers(0, 1), max_size=3))][:limit]
        else:
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=limit))
        deadline = data.draw(st.none() | st.integers(1, 40))
        self.engine.add(
            prompt,
            SamplingParams(
                max_tokens=max_tokens, seed=seed, ignore_eos=not stops, stop_token_ids=(3,) if stops else ()
            ),
            None if deadline is None else self.engine.clock.now + deadline,
        )

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            unfinished = self.engine.scheduler.running + self.engine.scheduler.waiting
            batch, _ = self.engine.step()
            now = self.engine.clock.now
            due = [seq for seq in unfinished if seq.deadline is not None and seq.deadline <= now]
            assert sorted(seq.request_id for seq in batch.expired) == sorted(seq.request_id for seq in due)
            assert all(seq.finish_reason == "deadline" and not seq.block_table for seq in due)

    @rule()
    def failed_step(self) -> None:
        batch = self.engine.schedule()
        self.engine.runner.run(batch)
        again = self.engine.schedule()
        assert again.sequences[: len(batch.sequences)] or not batch.sequences
        for seq, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
            assert seq.status is not SequenceStatus.RUNNING or seq.num_scheduled_tokens == count
        self.engine.check_state()

    @precondition(lambda self: self.engine.added)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.engine.added))
        was_finished, reason = seq.is_finished, seq.finish_reason
        aborted = self.engine.scheduler.abort(seq.request_id)
        if was_finished:
            assert aborted is None
            assert seq.finish_reason == reason
        else:
            assert aborted is seq
            assert seq.finish_reason == "abort"
        assert seq.is_finished
        assert not seq.block_table
        self.engine.runner.poison_unreadable()
        self.engine.check_state()

    @rule()
    def reset_prefix_cache(self) -> None:
        self.engine.reset_prefix_cache()

    @invariant()
    def finished_is_final(self) -> None:
        if hasattr(self, "engine"):
            alive = {seq.request_id for seq in self.engine.scheduler.running + self.engine.scheduler.waiting}
            assert alive == {seq.request_id for seq in self.engine.added if not seq.is_finished}

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run()
        assert self.engine.manager.num_free_blocks == self.engine.manager.num_blocks
        assert all(seq.is_finished and seq.finish_reason for seq in self.engine.added)
        self.engine.check_outputs()


SchedulerMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSchedulerMachine = SchedulerMachine.TestCase


def random_load(engine: Engine, count: int, rng: random.Random, longest: int) -> None:
    for index in range(count):
        prompt = [rng.randrange(2) for _ in range(rng.randrange(1, longest))]
        if index % 2 == 0 and engine.added:
            prompt = (rng.choice(engine.added).token_ids + prompt)[:longest]
        engine.add(prompt, SamplingParams(max_tokens=rng.randrange(1, 40), seed=index, ignore_eos=index % 4 != 0))


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_many_sequences_in_a_small_pool_equal_each_alone(prefix_caching: bool) -> None:
    engine = Engine(num_blocks=24, block_size=4, max_num_seqs=8, budget=16, prefix_caching=prefix_caching)
    random_load(engine, 64, random.Random(1), longest=60)
    while engine.scheduler.has_unfinished:
        engine.step()
        if engine.scheduler.num_steps % 17 == 0:
            engine.scheduler.abort(engine.scheduler.num_steps % 64)
            engine.runner.poison_unreadable()
    engine.check_outputs()
    assert engine.scheduler.total().num_preemptions > 5
    assert engine.manager.num_free_blocks == 24
    assert (engine.manager.prefix_cache_hits > 20) == prefix_caching
    survivors = [seq for seq in engine.added if seq.finish_reason != "abort"]
    assert 40 < len(survivors) < 64


def test_a_constant_hash_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager_module, "hash_block", lambda parent, tokens: b"same")
    engine = Engine(num_blocks=24, block_size=2, max_num_seqs=8, budget=16)
    random_load(engine, 40, random.Random(2), longest=24)
    engine.run()
    engine.check_outputs()


def test_one_step_mixes_decodes_with_a_chunk_of_a_prompt() -> None:
    engine = Engine(num_blocks=40, block_size=4, max_num_seqs=4, budget=10)
    first, second = engine.add([1, 2], params(20)), engine.add([3], params(20))
    engine.step()
    third = engine.add([4] * 20, params(20))
    seen = []
    for _ in range(3):
        batch, updates = engine.step()
        seen.append((batch.num_decodes, batch.num_scheduled_tokens, batch.needs_sample))
        assert [seq for seq, _, _ in updates][:2] == [first, second]
    assert seen == [
        (2, [1, 1, 8], [True, True, False]),
        (2, [1, 1, 8], [True, True, False]),
        (2, [1, 1, 4], [True, True, True]),
    ]
    assert third.num_output_tokens == 1


def test_the_budget_goes_to_prompts_in_order_and_the_last_is_split() -> None:
    engine = Engine(num_blocks=40, block_size=4, max_num_seqs=4, budget=10)
    for prompt in ([1] * 4, [2] * 4, [3] * 4, [4] * 4):
        engine.add(prompt, params(1))
    batch, _ = engine.step()
    assert batch.num_scheduled_tokens == [4, 4, 2]
    assert batch.needs_sample == [True, True, False]
    batch, _ = engine.step()
    assert batch.num_scheduled_tokens == [2, 4]


def test_a_new_sequence_joins_at_the_next_step() -> None:
    engine = Engine(num_blocks=20, block_size=4)
    engine.add([1, 2, 3], params(20))
    engine.step()
    late = engine.add([4, 5], params(5))
    batch, updates = engine.step()
    assert late in batch.sequences
    assert late.first_scheduled == late.first_token == engine.clock.now
    assert len(updates) == 2


def test_the_newest_is_preempted_and_continues_at_its_output_position() -> None:
    engine = Engine(num_blocks=6, block_size=2, max_num_seqs=3, budget=12)
    old, new = engine.add([1, 1, 1], params(9)), engine.add([2, 2, 2], params(9))
    while not engine.scheduler.total().num_preemptions:
        engine.step()
    assert (old.num_preemptions, new.num_preemptions) == (0, 1)
    assert engine.scheduler.waiting == [new]
    kept, times = list(new.output_token_ids), (new.first_scheduled, new.first_token)
    assert kept
    engine.add([3], params(1))
    engine.run()
    assert new.output_token_ids[: len(kept)] == kept
    assert (new.first_scheduled, new.first_token) == times
    assert new.num_output_tokens == 9
    assert engine.scheduler.total().generation_tokens == 9 + 9 + 1
    assert engine.scheduler.total().prompt_tokens == 3 + 3 + 1
    engine.check_outputs()


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    engine = Engine(num_blocks=8, block_size=2, max_num_seqs=2, budget=16)
    old, new = engine.add([1, 1], params(8)), engine.add([2] * 8, params(6))
    while not engine.scheduler.total().num_preemptions:
        engine.step()
    engine.scheduler.abort(old.request_id)
    batch, _ = engine.step()
    assert batch.sequences == [new]
    assert batch.num_tokens < new.num_prompt_tokens, "most of it came from the cache"
    assert new.cached_tokens == 0, "which counts the first admission only"
    engine.run()
    engine.check_outputs()


def test_preempted_with_all_but_one_token_cached_is_a_decode() -> None:
    engine = Engine(num_blocks=8, block_size=1, max_num_seqs=2, budget=16)
    old, new = engine.add([1, 1], params(6)), engine.add([1, 1], params(6))  # equal draws: `old` computes all of `new`
    while not engine.scheduler.total().num_preemptions:
        engine.step()
    engine.scheduler.abort(old.request_id)
    batch, _ = engine.step()
    assert (batch.sequences, batch.num_decodes, batch.num_tokens) == ([new], 1, 1)
    engine.run()
    engine.check_outputs()


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    engine = Engine(num_blocks=16, block_size=2, max_num_seqs=4, budget=8)
    for _ in range(3):
        engine.add([1, 0], params(4))
    long = engine.add([1] * 28, params(2))
    for _ in range(60):
        engine.add([0, 1], params(4))
        engine.step()
        if long.is_finished:
            break
    assert long.is_finished
    later = [seq.first_scheduled for seq in engine.added[long.request_id + 1 :] if seq.first_scheduled]
    assert all(long.first_scheduled <= moment for moment in later)


def test_an_old_decode_outlives_a_stream_of_newcomers_in_a_full_pool() -> None:
    engine = Engine(num_blocks=8, block_size=2, max_num_seqs=4, budget=8)
    old = engine.add([1, 1], params(14))
    steps = 0
    while not old.is_finished:
        engine.add([0] * 6, params(6))
        engine.step()
        steps += 1
    assert steps == 14, "a token at every step"
    assert old.num_preemptions == 0


def test_the_whole_pool_can_serve_one_sequence() -> None:
    engine = Engine(num_blocks=4, block_size=4, max_num_seqs=2, budget=4)
    seq, other = engine.add([1] * 8, params(100)), engine.add([2] * 15, params(100))
    engine.run()
    assert (seq.num_tokens, other.num_tokens) == (16, 16)
    assert {seq.finish_reason, other.finish_reason} == {"length"}
    engine.check_outputs()


def test_choices_of_one_prompt_wait_for_its_first_computation() -> None:
    engine = Engine(num_blocks=40, block_size=4, max_num_seqs=8, budget=64)
    choices = [engine.add([1, 2, 3, 4, 5, 6, 7, 8, 9], params(3, seed=seed)) for seed in range(4)]
    batch, _ = engine.step()
    assert batch.sequences == choices[:1]
    batch, _ = engine.step()
    assert batch.num_scheduled_tokens == [1, 1, 1, 1]
    assert [seq.cached_tokens for seq in choices] == [0, 8, 8, 8]
    engine.run()
    engine.check_outputs()


def test_a_longer_prompt_waits_for_all_of_the_shorter_one() -> None:
    engine = Engine(num_blocks=40, block_size=4, max_num_seqs=8, budget=64)
    engine.add([1] * 8, params(3))
    longer = engine.add([1] * 8 + [2] * 3, params(3))
    engine.step()
    engine.step()
    assert longer.cached_tokens == 8


def test_a_late_one_waits_for_the_last_chunk_of_its_prefix() -> None:
    engine = Engine(num_blocks=40, block_size=4, max_num_seqs=8, budget=16)
    engine.add([1] * 20, params(3))
    engine.step()
    late = engine.add([1] * 20 + [2], params(3))
    batch, _ = engine.step()
    assert batch.num_scheduled_tokens == [4]
    engine.step()
    assert late.cached_tokens == 20


def test_a_small_common_part_does_not_hold_anyone_back() -> None:
    engine = Engine(num_blocks=40, block_size=4, max_num_seqs=8, budget=64)
    engine.add([1] * 4 + [2] * 10, params(3))
    engine.add([1] * 4 + [3] * 10, params(3))
    batch, _ = engine.step()
    assert batch.num_scheduled_tokens == [14, 14]


def test_nobody_waits_for_blocks_that_will_not_be_cached() -> None:
    engine = Engine(num_blocks=40, block_size=4, max_num_seqs=8, budget=64)
    early = engine.add([1] * 12, params(3))
    assert engine.schedule().sequences == [early]
    engine.reset_prefix_cache()
    late = engine.add([1] * 12, params(3))
    batch, _ = engine.step()
    assert batch.sequences == [early, late]


def test_admission_keeps_a_block_for_each_running_sequence() -> None:
    engine = Engine(num_blocks=7, block_size=2, max_num_seqs=4, budget=12)
    engine.add([1] * 4, params(4))
    engine.step()
    late = engine.add([2] * 8, params(4))
    engine.step()
    assert engine.manager.num_free_blocks == 4, "what it needs, and no more"
    assert late.status is SequenceStatus.WAITING
    engine.run()
    assert engine.scheduler.total().num_preemptions == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 4], ids=["waiting", "first chunk", "second chunk", "decoding"])
def test_abort_frees_at_once_in_any_state(steps: int) -> None:
    engine = Engine(num_blocks=8, block_size=4, max_num_seqs=2, budget=4)
    seq = engine.add([1] * 9, params(10))
    for _ in range(steps):
        engine.step()
    assert (seq.num_output_tokens > 0) == (steps == 4)
    assert engine.scheduler.abort(seq.request_id) is seq
    assert (seq.finish_reason, seq.finished) == ("abort", engine.clock.now)
    assert engine.manager.num_free_blocks == 8
    assert not engine.scheduler.has_unfinished
    assert engine.scheduler.abort(seq.request_id) is None
    assert engine.scheduler.abort(12345) is None


def test_abort_after_schedule_drops_the_row_only() -> None:
    engine = Engine(num_blocks=8, block_size=4)
    first, second = engine.add([1], params(5)), engine.add([2], params(5))
    batch = engine.schedule()
    sampled = engine.runner.run(batch)
    engine.scheduler.abort(first.request_id)
    assert engine.scheduler.update(batch, sampled) == [(second, [sampled[1]], False)]
    assert first.num_output_tokens == 0
    engine.run()
    engine.check_outputs()


def test_a_failed_draw_ends_its_sequence_only() -> None:
    engine = Engine(num_blocks=8, block_size=4)
    first, second = engine.add([1], params(5)), engine.add([2], params(5))
    batch = engine.schedule()
    sampled = engine.runner.run(batch)
    assert engine.scheduler.update(batch, [None, sampled[1]]) == [(first, [], True), (second, [sampled[1]], False)]
    assert first.finish_reason == "error"
    engine.run()
    assert second.finish_reason == "length"
    engine.check_outputs()


def test_deadlines_end_waiting_and_running_sequences() -> None:
    engine = Engine(num_blocks=8, block_size=4, max_num_seqs=1, budget=8)
    running = engine.add([1], params(20), deadline=4.0)
    waiting = engine.add([2], params(20), deadline=3.0)
    in_time = engine.add([3], params(2), deadline=100.0)
    expired = [engine.step()[0].expired for _ in range(4)]
    assert expired == [[], [waiting], [running], []]
    assert (running.finish_reason, running.num_output_tokens) == ("deadline", 2)
    assert waiting.first_scheduled == 0.0
    engine.run()
    assert in_time.finish_reason == "length"


def test_a_deadline_does_not_outlive_its_sequence() -> None:
    engine = Engine(num_blocks=8, block_size=4)
    engine.add([1], params(1), deadline=5.0)
    engine.run()
    again = Sequence(0, [1], params(20), (), engine.max_model_len, 0.0, deadline=100.0)
    engine.scheduler.add(again)
    engine.run()
    assert engine.clock.now > 5.0
    assert again.finish_reason == "length"


def test_finished_sequences_do_not_pile_up_behind_far_deadlines() -> None:
    engine = Engine(num_blocks=8, block_size=4)
    for _ in range(500):
        engine.add([1], params(1), deadline=1e12)
        engine.run()
    assert len(engine.scheduler._deadlines) <= 70


def test_stop_rules_and_what_update_returns() -> None:
    engine = Engine(num_blocks=8, block_size=4)
    by_eos = engine.add([1])
    by_token = engine.add([2], SamplingParams(stop_token_ids=(7,)))
    goes_on = engine.add([3], SamplingParams(ignore_eos=True, max_tokens=2))
    updates = engine.scheduler.update(engine.scheduler.schedule(), [EOS, 7, EOS])
    assert updates == [(by_eos, [EOS], True), (by_token, [7], True), (goes_on, [EOS], False)]
    assert (by_eos.finish_reason, by_eos.stop_token_id) == ("stop", None)
    assert (by_token.finish_reason, by_token.stop_token_id) == ("stop", 7)
    updates = engine.scheduler.update(engine.scheduler.schedule(), [5])
    assert updates == [(goes_on, [5], True)]
    assert (goes_on.finish_reason, goes_on.token_ids) == ("length", [3, EOS, 5])


def test_generated_blocks_serve_the_next_turn() -> None:
    engine = Engine(num_blocks=20, block_size=4)
    turn = engine.add([1, 2, 3], params(10))
    engine.run()
    follow = engine.add([*turn.token_ids, 5, 6], params(3))
    engine.run()
    assert follow.cached_tokens == 12
    engine.check_outputs()


def test_limits_that_could_hang_are_refused() -> None:
    with pytest.raises(SchedulerConfigError, match="holds 32 tokens, less than the context of 33"):
        Scheduler(BlockManager(8, 4), 4, 16, max_model_len=33)
    with pytest.raises(SchedulerConfigError, match="max_num_batched_tokens"):
        Scheduler(BlockManager(8, 4), 4, 3, max_model_len=32)
    with pytest.raises(SchedulerConfigError, match="max_num_seqs"):
        Scheduler(BlockManager(8, 4), 0, 3, max_model_len=32)


def test_sequences_that_could_hang_are_refused() -> None:
    engine = Engine(num_blocks=8, block_size=4)
    engine.add([1])
    with pytest.raises(InvalidSequenceError, match="request_id 0 is in use"):
        engine.scheduler.add(Sequence(0, [1], SamplingParams(), (), 32, 0.0, None))
    with pytest.raises(InvalidSequenceError, match="context of 32"):
        engine.scheduler.add(Sequence(1, [1] * 40, SamplingParams(), (), 64, 0.0, None))
    assert engine.scheduler.num_waiting == 1


def test_an_idle_scheduler_gives_an_empty_batch() -> None:
    engine = Engine(num_blocks=8, block_size=4)
    batch = engine.scheduler.schedule()
    assert batch.is_empty
    assert engine.scheduler.update(batch, []) == []
