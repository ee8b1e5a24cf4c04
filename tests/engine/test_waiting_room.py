"""Limits of the queue, and shares of it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.waiting_room import WaitingRoom


def fill(room: WaitingRoom, pool: int, count: int, tokens: int = 10) -> None:
    for _ in range(count):
        room.enter(pool, tokens)


def test_one_pool_has_the_limit_to_itself() -> None:
    room = WaitingRoom(4)
    assert room.admits(0, 4, 0, num_queued=4)
    assert not room.admits(0, 5, 0, num_queued=5)
    fill(room, 0, 4)
    assert not room.admits(0, 1, 0, num_queued=5)


def test_a_pool_below_its_share_is_let_in() -> None:
    room = WaitingRoom(8)
    fill(room, 1, 8)
    assert not room.admits(1, 1, 10, num_queued=9)
    assert room.admits(2, 1, 10, num_queued=9)
    assert room.admits(2, 4, 40, num_queued=12)
    assert not room.admits(2, 5, 50, num_queued=13), "half of the limit is its share"
    fill(room, 2, 4)
    assert not room.admits(2, 1, 10, num_queued=13)
    assert room.admits(3, 2, 20, num_queued=14)


def test_tokens() -> None:
    room = WaitingRoom(100, max_tokens=50)
    assert room.admits(0, 1, 400, num_queued=0), "nothing waits: any size is taken"
    fill(room, 0, 1, tokens=400)
    assert not room.admits(0, 1, 1, num_queued=0)
    assert room.admits(1, 1, 25, num_queued=0)
    assert not room.admits(1, 1, 26, num_queued=0)
    room.leave(0, 400)
    assert room.num_tokens == room.num_sequences == 0
    fill(room, 0, 1, tokens=20)
    assert room.admits(0, 3, 30, num_queued=0)
    assert not room.admits(0, 3, 31, num_queued=0)


def test_who_is_ahead() -> None:
    room = WaitingRoom(1000)
    fill(room, 1, 300)
    assert room.num_ahead(1, 301) == 301
    assert room.num_ahead(2, 301) == 2, "one of the other pool, and itself"
    fill(room, 2, 3)
    assert room.num_ahead(2, 304) == 8
    assert room.num_ahead(1, 304) == 304
    room.clear()
    assert room.num_ahead(1, 7) == 7


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=300), st.integers(4, 40))
def test_the_most_that_ever_waits(requests: list[tuple[int, int]], limit: int) -> None:
    """With everything taken by whoever asks: 1 + 1/2 + 1/3 + 1/4 of the limit for four pools, and one each for pools
    whose share is less than a sequence."""
    room = WaitingRoom(limit, max_tokens=10 * limit)
    for pool, tokens in requests:
        if room.admits(pool, 1, tokens, num_queued=room.num_sequences + 1):
            room.enter(pool, tokens)
    assert room.num_sequences <= limit * (1 + 1 / 2 + 1 / 3 + 1 / 4) + 4
    assert room.num_tokens <= 10 * limit * (1 + 1 / 2 + 1 / 3 + 1 / 4) + 30
