"""Whether a client's grammar can be used, found out before its request is taken and at nobody else's cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import msgspec

from model.grammar import Grammar
from model.tokenizer import Tokenizer
from server.engine.channel import FrameSplitter, frame
from server.engine.grammar_compiler import NO_VOCABULARY
from server.engine.grammar_trial import TrialResult
from server.engine.grammar_vocabulary import GrammarVocabulary
from server.errors import BusyError, InvalidRequestError

MAX_REMEMBERED = 1024
MAX_WAITING = 64
_START_SECONDS = 30.0
# Processor time is limited where it is spent; this is for a machine so loaded that there is hardly any.
_TRIAL_SECONDS = 15.0
_TOO_SLOW = "takes too long to compile or too much memory; simplify it"


class GrammarChecks:
    """The checks of each tokenizer, whose vocabulary decides with the grammar what can be written."""

    def __init__(self) -> None:
        self._checks: weakref.WeakKeyDictionary[Tokenizer, GrammarCheck] = weakref.WeakKeyDictionary()

    def of(self, tokenizer: Tokenizer) -> GrammarCheck:
        check = self._checks.get(tokenizer)
        if check is None:
            check = self._checks[tokenizer] = GrammarCheck(weakref.ref(tokenizer))
        return check


class GrammarCheck:
    """Tries grammars one after the other in a process that is started for the first and, if it had to end, anew.

    What was found is remembered by the grammars' content, of the last `MAX_REMEMBERED`.
    """

    def __init__(self, tokenizer: weakref.ref[Tokenizer]) -> None:
        self._tokenizer = tokenizer
        self._found: OrderedDict[bytes, str | None] = OrderedDict()
        self._under_way: dict[bytes, asyncio.Future[str | None]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._process: TrialProcess | None = None

    async def check(self, grammar: Grammar, field: str) -> None:
        """Raises InvalidRequestError, naming the `field` that holds the grammar, or BusyError."""
        reason = await self._reason(grammar)
        if reason is not None:
            raise InvalidRequestError(f"{field} {reason}", code="invalid_grammar", param=field)

    async def _reason(self, grammar: Grammar) -> str | None:
        key = grammar.key
        if key in self._found:
            self._found.move_to_end(key)
            return self._found[key]
        if key not in self._under_way:
            if len(self._under_way) >= MAX_WAITING:
                raise BusyError("too many grammars wait to be compiled; try again later", 1)
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "grammar-check")
            loop = asyncio.get_running_loop()
            self._under_way[key] = loop.run_in_executor(self._thread, self._try, grammar)
            self._under_way[key].add_done_callback(lambda future: self._remember(key, future))
        # Shielded: others may wait for the same grammar when this request's client leaves.
        return await asyncio.shield(self._under_way[key])

    def _remember(self, key: bytes, future: asyncio.Future[str | None]) -> None:
        del self._under_way[key]
        if not future.cancelled() and future.exception() is None:
            self._found[key] = future.result()
            while len(self._found) > MAX_REMEMBERED:
                self._found.popitem(last=False)

    def _try(self, grammar: Grammar) -> str | None:
        """In the thread: why the grammar is refused, or None."""
        if self._process is None:
            self._process = self._start()
        if self._process is None:
            return NO_VOCABULARY
        try:
            return self._process.ask(grammar)
        except TrialEndedError:
            self._process.close()
            self._process = self._start()  # which goes on while nobody waits for it
            return _TOO_SLOW

    def _start(self) -> TrialProcess | None:
        """None for a tokenizer that no grammar can hold to anything."""
        tokenizer = self._tokenizer()
        vocabulary = None if tokenizer is None else GrammarVocabulary.of(tokenizer)
        return None if vocabulary is None else TrialProcess(vocabulary)


class TrialEndedError(Exception):
    """The process ended at a grammar."""


class TrialProcess:
    """The parent's side of server.engine.grammar_trial. Ends with this object."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.engine.grammar_trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a library in distress would print what it was given
            bufsize=0,
            start_new_session=True,  # Ctrl+C is for the server
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._input, self._output = process.stdin.fileno(), process.stdout.fileno()
        self._splitter = FrameSplitter()
        self.close = weakref.finalize(self, _end, process)
        self._send(msgspec.msgpack.encode(vocabulary))
        self._patience = _START_SECONDS

    def ask(self, grammar: Grammar) -> str | None:
        """Why a grammar is refused, or None. Raises TrialEndedError."""
        self._send(msgspec.msgpack.encode(grammar))
        deadline = time.monotonic() + self._patience
        while (left := deadline - time.monotonic()) > 0 and select.select([self._output], [], [], left)[0]:
            data = os.read(self._output, 1 << 16)
            if not data:
                raise TrialEndedError
            answers = [msgspec.msgpack.decode(message, type=TrialResult) for message in self._splitter.feed(data)]
            if answers:
                self._patience = _TRIAL_SECONDS
                return answers[0].reason
        raise TrialEndedError

    def _send(self, payload: bytes) -> None:
        data = frame(payload)
        try:
            while data:
                data = data[os.write(self._input, data) :]
        except BrokenPipeError:
            raise TrialEndedError from None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
