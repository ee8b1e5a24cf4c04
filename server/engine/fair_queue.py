"""FairQueue: the sequences that wait, one queue for each pool of clients, served in turns by tokens. Free of torch.

Deficit round robin (Shreedhar and Varghese 1996): at its turn a pool is given `quantum` tokens of credit and is served
as long as its oldest sequence costs no more than its credit; what is left stays its own until its next turn, unless
nothing of it waits any more. Over any time in which two pools always have something waiting, what they are given
differs by at most 2 * most + quantum, where `most` is the largest cost; so a thousand requests of one cannot keep
another's one waiting. Inside a pool it is first come, first served.

A sequence's cost is the most tokens that it may come to, prompt and answer: what it asks for is known, what it will
take is not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from server.engine.sequence import Sequence

QUANTUM = 256


class _Pool:
    __slots__ = ("credit", "waiting")

    def __init__(self) -> None:
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.credit = 0

    @property
    def oldest(self) -> Sequence:
        return next(iter(self.waiting.values()))


class FairQueue:
    """`peek` names the sequence whose turn it is and `take` removes it; what was taken once and had to come back is
    always before all others, in the order in which it was taken."""

    def __init__(self, quantum: int = QUANTUM) -> None:
        assert quantum > 0, "a pool without credit would wait for ever"
        self._quantum = quantum
        self._pools: OrderedDict[int, _Pool] = OrderedDict()  # the first one's turn it is
        self._returned: OrderedDict[int, Sequence] = OrderedDict()
        self._pool_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._returned) + len(self._pool_of)

    def __iter__(self) -> Iterator[Sequence]:
        """Who came back first, then each pool's in order, the pool whose turn it is before the others."""
        yield from self._returned.values()
        for pool in self._pools.values():
            yield from pool.waiting.values()

    def get(self, request_id: int) -> Sequence | None:
        if request_id in self._pool_of:
            return self._pools[self._pool_of[request_id]].waiting[request_id]
        return self._returned.get(request_id)

    def add(self, seq: Sequence) -> None:
        """At the end of its pool's queue."""
        pool = self._pools.setdefault(seq.pool, _Pool())
        pool.waiting[seq.request_id] = seq
        self._pool_of[seq.request_id] = seq.pool

    def give_back(self, seq: Sequence) -> None:
        """Before everything: of several that come back, the last is the first. It costs its pool no more credit."""
        self._returned[seq.request_id] = seq
        self._returned.move_to_end(seq.request_id, last=False)

    def peek(self) -> Sequence:
        """Whose turn it is; the same until something is taken, given back or removed. Not for an empty queue."""
        if self._returned:
            return next(iter(self._returned.values()))
        if len(self._pools) == 1:
            return next(iter(self._pools.values())).oldest  # with nobody to be fair to, nothing is counted
        while True:
            pool = next(iter(self._pools.values()))
            seq = pool.oldest
            if seq.max_num_tokens <= pool.credit:
                return seq
            self._pools.move_to_end(next(iter(self._pools)))
            self._begin_turn()

    def take(self, seq: Sequence) -> None:
        """Remove the sequence that `peek` named."""
        if seq.request_id not in self._returned and len(self._pools) > 1:
            self._pools[seq.pool].credit -= seq.max_num_tokens
        self.remove(seq.request_id)

    def remove(self, request_id: int) -> None:
        """Harmless for an id that does not wait."""
        self._returned.pop(request_id, None)
        number = self._pool_of.pop(request_id, None)
        if number is None:
            return
        waiting = self._pools[number].waiting
        del waiting[request_id]
        if waiting:
            return
        had_turn = next(iter(self._pools)) == number
        del self._pools[number]
        if had_turn and self._pools:
            self._begin_turn()

    def _begin_turn(self) -> None:
        next(iter(self._pools.values())).credit += self._quantum
