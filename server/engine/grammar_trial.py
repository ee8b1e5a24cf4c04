"""Trying a grammar where nothing is lost when it turns out hostile: `python -m server.engine.grammar_trial`.

llguidance's own counts leave ways to make it compute for minutes or fill the memory. This process compiles a grammar
and writes a few tokens by it, under limits that the kernel enforces by ending the process: of its processor time, so
that it does not matter what else the machine does, and of its memory. Free of torch, FastAPI and pydantic.

It reads a GrammarVocabulary and then Grammars from its standard input, frames of msgpack, and answers each grammar with
a TrialResult. It ends with its standard input.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator

import msgspec

from model.grammar import Grammar
from server.engine.channel import FrameSplitter, frame
from server.engine.grammar_compiler import GrammarError, compile_grammar
from server.engine.grammar_matcher import GrammarMatcher, mask_words
from server.engine.grammar_vocabulary import GrammarVocabulary

PROCESSOR_SECONDS = 0.3
"""For one grammar."""
MEMORY_BYTES = 1 << 30
"""Of address space, beyond what the process has when it has read its vocabulary."""
STEP_SECONDS = 0.03
"""For one token, in processor time. Nearly every grammar takes less than a thousandth."""
_NUM_TOKENS = 12
_CHUNK = 1 << 16


class TrialResult(msgspec.Struct, frozen=True, array_like=True):
    """`reason` why the grammar is refused, as GrammarError has it, or None."""

    reason: str | None


def try_grammar(grammar: Grammar, vocabulary: GrammarVocabulary, tokenizer: object) -> None:
    """Compile it and write a few tokens by it. Raises GrammarError."""
    import numpy as np  # not for the server's process, which asks for trials

    matcher = GrammarMatcher(compile_grammar(grammar, tokenizer), vocabulary)  # type: ignore[arg-type]
    mask = np.empty(mask_words(vocabulary.size), dtype=np.int32)
    generator = random.Random(0)
    for place in range(_NUM_TOKENS):
        started = time.process_time()
        matcher.fill(mask, ())
        if time.process_time() - started > STEP_SECONDS or matcher.is_too_complex:
            raise GrammarError("is too costly to follow; simplify it")
        if matcher.has_failed and place == 0:
            raise GrammarError("allows nothing that this model's vocabulary can write; change it")
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if matcher.has_failed or not len(allowed):
            return
        matcher.accept(int(generator.choice(allowed)))
        if matcher.is_complete:
            return


def main() -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    frames = _frames()
    vocabulary = msgspec.msgpack.decode(next(frames), type=GrammarVocabulary)
    tokenizer = vocabulary.ll_tokenizer()
    _limit_memory()
    decoder = msgspec.msgpack.Decoder(Grammar)
    for message in frames:
        grammar = decoder.decode(message)
        signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)  # and SIGPROF, which nobody handles, ends the process
        reason = None
        try:
            try_grammar(grammar, vocabulary, tokenizer)
        except GrammarError as error:
            reason = error.reason
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(frame(msgspec.msgpack.encode(TrialResult(reason))))
    return 0


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))


def _frames() -> Iterator[bytes]:
    splitter = FrameSplitter()
    while data := os.read(0, _CHUNK):
        yield from [bytes(message) for message in splitter.feed(data)]


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    sys.exit(main())
