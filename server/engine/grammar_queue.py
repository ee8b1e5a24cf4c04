"""GrammarQueue: sequences whose grammars are being compiled. They hold no seat and no blocks. Free of torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING

from server.engine.grammar_compiler import GrammarCompiler, GrammarError
from server.engine.sequence import Sequence

if TYPE_CHECKING:
    import llguidance

logger = logging.getLogger(__name__)


class GrammarQueue:
    """`add` takes sequences in, `take` gives back those whose turn it is."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[int, tuple[Sequence, GrammarCompiler, Future[llguidance.LLMatcher]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def generations(self) -> set[int]:
        """The weights that its sequences will need."""
        return {seq.generation for seq, _, _ in self._waiting.values()}

    def add(self, seq: Sequence, compiler: GrammarCompiler) -> None:
        """`seq` has a grammar in its parameters."""
        assert seq.params.grammar is not None, "there is something to compile"
        self._waiting[seq.request_id] = seq, compiler, compiler.start(seq.params.grammar)

    def discard(self, request_id: int) -> Sequence | None:
        """Let go of a sequence; None if it is not here."""
        entry = self._waiting.pop(request_id, None)
        return None if entry is None else entry[0]

    def take(self, timeout: float) -> tuple[list[Sequence], list[Sequence]]:
        """Sequences that can be scheduled, with their matchers, and those that cannot and have a finish_reason; after
        up to `timeout` seconds in which there is none of either."""
        ready: list[Sequence] = []
        ended: list[Sequence] = []
        if not self._waiting:
            return ready, ended
        wait([future for _, _, future in self._waiting.values()], timeout, FIRST_COMPLETED)
        now = self._clock()
        for request_id, (seq, compiler, future) in list(self._waiting.items()):
            if seq.deadline is not None and seq.deadline <= now:
                seq.end("deadline", now)
            elif not future.done():
                continue
            else:
                self._attach(seq, compiler, future, now)
            del self._waiting[request_id]
            (ended if seq.is_finished else ready).append(seq)
        return ready, ended

    def _attach(
        self, seq: Sequence, compiler: GrammarCompiler, future: Future[llguidance.LLMatcher], now: float
    ) -> None:
        try:
            seq.grammar = compiler.matcher(future)
        except GrammarError as error:
            logger.warning("request %d is ended: %s", seq.request_id, error)
            seq.end("grammar", now)
        except Exception:
            logger.exception("request %d is ended: its grammar could not be compiled", seq.request_id)
            seq.end("error", now)
