"""Turns in the queue: order inside a pool, bounded unfairness between pools, and a whole engine's worth of steps."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling_params import SamplingParams
from server.engine.block_manager import BlockManager
from server.engine.fair_queue import FairQueue
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence

CONTEXT = 1000
MOST = 60
QUANTUM = 16


def sequence(number: int, pool: int, cost: int) -> Sequence:
    """One that may come to `cost` tokens."""
    seq = Sequence(number, [1], SamplingParams(max_tokens=cost - 1), (), CONTEXT, 0.0)
    seq.pool = pool
    assert seq.max_num_tokens == cost
    return seq


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(
    st.tuples(st.just("add"), st.integers(0, 3), st.integers(2, MOST)),
    st.tuples(st.just("take"), st.integers(1, 6), st.just(0)),
    st.tuples(st.just("remove"), st.integers(0, 400), st.just(0)),
), max_size=120))  # fmt: skip
def test_unfairness_is_bounded_and_order_kept(actions: list[tuple[str, int, int]]) -> None:
    """Between two pools that both had something waiting all the time, service differs by at most 2 * most + quantum
    (Shreedhar and Varghese 1996, theorem 2); in a pool, who came first is first."""
    queue = FairQueue(QUANTUM)
    waiting: dict[int, list[Sequence]] = {pool: [] for pool in range(4)}
    # For each pair, tokens given to each since both have been waiting without a break.
    served: dict[tuple[int, int], list[int]] = {}
    number = 0
    for action, first, cost in actions:
        if action == "add":
            seq = sequence(number, first, cost)
            number += 1
            queue.add(seq)
            waiting[first].append(seq)
        elif action == "take":
            for _ in range(min(first, len(queue))):
                seq = queue.peek()
                assert queue.peek() is seq
                assert waiting[seq.pool][0] is seq
                queue.take(seq)
                del waiting[seq.pool][0]
                for pair, counts in served.items():
                    if seq.pool in pair:
                        counts[pair.index(seq.pool)] += seq.max_num_tokens
                        assert abs(counts[0] - counts[1]) <= 2 * MOST + QUANTUM
                served = {pair: counts for pair, counts in served.items() if all(waiting[pool] for pool in pair)}
        else:
            everyone = [seq for pool in waiting.values() for seq in pool]
            if everyone:
                gone = everyone[first % len(everyone)]
                assert queue.get(gone.request_id) is gone
                queue.remove(gone.request_id)
                waiting[gone.pool].remove(gone)
        for a in range(4):
            for b in range(a):
                if waiting[a] and waiting[b]:
                    served.setdefault((b, a), [0, 0])
                else:
                    served.pop((b, a), None)
        assert len(queue) == sum(map(len, waiting.values()))
        assert sorted(seq.request_id for seq in queue) == sorted(
            seq.request_id for pool in waiting.values() for seq in pool
        )


def test_one_pool_alone_is_first_come_first_served() -> None:
    queue, drawn = FairQueue(QUANTUM), random.Random(1)
    everyone = [sequence(number, 5, drawn.randint(2, MOST)) for number in range(50)]
    for seq in everyone:
        queue.add(seq)
    order = []
    while len(queue):
        order.append(queue.peek())
        queue.take(order[-1])
    assert order == everyone


def test_what_came_back_is_first_and_in_its_old_order() -> None:
    queue = FairQueue(QUANTUM)
    for number in range(4):
        queue.add(sequence(number, number % 2, 20))
    taken = []
    for _ in range(3):
        taken.append(queue.peek())
        queue.take(taken[-1])
    for seq in reversed(taken[1:]):  # the newest is preempted first
        queue.give_back(seq)
    assert len(queue) == 3
    assert list(queue)[:2] == taken[1:]
    for seq in taken[1:]:
        assert queue.get(seq.request_id) is seq
        assert queue.peek() is seq
        queue.take(seq)
    queue.remove(99)
    assert len(queue) == 1


def simulate(requests: list[tuple[int, int]], max_num_seqs: int = 4) -> dict[int, int]:
    """The step in which each request had its first token; `requests` are pools and numbers of tokens, by arrival."""
    scheduler = Scheduler(BlockManager(200, 16), max_num_seqs, 64, CONTEXT, clock=lambda: 1.0)
    for number, (pool, num_tokens) in enumerate(requests):
        scheduler.add(sequence(number, pool, num_tokens))
    first: dict[int, int] = {}
    step = 0
    while scheduler.has_unfinished:
        step += 1
        batch = scheduler.schedule()
        for seq, tokens, _ in scheduler.update(batch, [3] * batch.num_samples):
            if tokens:
                first.setdefault(seq.request_id, step)
    return first


def test_a_thousand_requests_of_one_do_not_starve_the_one_of_another() -> None:
    """The latecomer waits for a seat and for one turn of the other pool, not for the thousand before it."""
    flood = [(1, 20)] * 1000
    first = simulate([*flood, (2, 20)])
    alone = simulate(flood)
    assert first[1000] <= 60 < 2000 < max(alone.values())
    assert max(first.values()) <= max(alone.values()) + 20, "and the others lose no more than its own work"


def test_pools_that_all_flood_get_the_same() -> None:
    """Whoever asks for more tokens in a request gets fewer requests, not more tokens."""
    requests = [(1, 20)] * 200 + [(2, 50)] * 80 + [(3, 10)] * 400
    first = simulate(requests)
    by_step = sorted(first, key=first.__getitem__)[:200]
    tokens = {pool: sum(requests[each][1] for each in by_step if requests[each][0] == pool) for pool in (1, 2, 3)}
    assert max(tokens.values()) - min(tokens.values()) <= 2 * 50 + 256
    for pool in (1, 2, 3):
        own = [each for each in sorted(first, key=lambda each: (first[each], each)) if requests[each][0] == pool]
        assert [first[each] for each in own] == sorted(first[each] for each in own)
        assert own == sorted(own)
