"""Compiling grammars with llguidance, within limits, and keeping the latest. Free of torch.

llguidance bounds most of its work by counts ("fuel"), so that a grammar is refused on every machine alike. What these
counts do not see is bounded by trying each grammar of a client in a process of its own first: see
server/engine/grammar_trial.py.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from model.errors import QuillError
from model.grammar import Grammar
from server.engine.grammar_matcher import GrammarMatcher
from server.engine.grammar_vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    import llguidance

MAX_COMPILED = 64
NO_VOCABULARY = "is not supported with this model's kind of tokenizer; leave it out"

# One optional blank where JSON allows any: models of prose would otherwise write blanks without end.
_JSON_OPTIONS: llguidance._lib.JsonCompileOptions = {"whitespace_pattern": "[ ]?", "lenient": False}
# Keywords that llguidance refuses, and that a message may therefore name.
_KEYWORDS = (
    "contains", "dependentRequired", "dependentSchemas", "else", "if", "maxContains", "minContains", "not", "oneOf",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
)  # fmt: skip
# What llguidance says → what a client is told; the first that is found counts.
_REASONS = (
    (r"oneOf constraints", "uses oneOf for schemas that overlap; use anyOf"),
    (r"look-?around|WordUnicode|StartLine|EndLine", "uses look-around or a word boundary; write the pattern without"),
    (r"backreferences", "uses a backreference; write the pattern without"),
    (r"regex parse error|invalid regex", "holds a regular expression that cannot be read; correct it"),
    (r"Unsatisfiable", "holds a schema that no value can meet; correct it"),
    (r"circular references", "holds a $ref that leads back to itself beside other keywords; take it apart"),
    (r"Unknown format", "holds a format that is not supported; leave it out"),
    (r"retriev|registry|Pointer|\$ref", "holds a $ref that leads nowhere in the schema; correct it"),
    (r"not disjoint", "holds patternProperties that overlap; make them disjoint"),
    (r"multipleOf", "holds a multipleOf that is not supported; use one with fewer digits"),
    (r"fuel|too large|too many|too complex|too deep|limit|stack|recursion", "is too large to compile; simplify it"),
    (r"unknown name", "uses a rule or terminal that is not defined; define it"),
)  # fmt: skip


class GrammarError(QuillError):
    """A grammar that cannot be used; its one sentence, "grammar" and the `reason`, repeats nothing of it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"grammar {reason}")
        self.reason = reason


def grammar_limits() -> llguidance.LLParserLimits:
    """Below llguidance's defaults, under which one token's mask may take half a second: nearly all schemas and patterns
    that are meant stay far below these."""
    import llguidance

    return llguidance.LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=200_000,
        step_lexer_fuel=30_000,
        step_max_items=5_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def compile_grammar(grammar: Grammar, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher at the start of the text. Raises GrammarError."""
    import llguidance

    source = _source(grammar)
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=grammar_limits())
    if matcher.is_error():
        raise GrammarError(_reason(matcher.get_error()))
    return matcher


def _source(grammar: Grammar) -> str:
    from llguidance import LLMatcher, regex_to_lark

    if grammar.type == "regex":
        # \\d, \\w and \\s mean ASCII, as in a JSON schema's patterns: few who write them think of the other 600 digits.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.value, 'dws')}/")
    if grammar.type == "lark":
        return LLMatcher.grammar_from_lark(grammar.value)
    if grammar.value == "false":
        raise GrammarError("holds the schema false, which no value can meet; correct it")
    if grammar.type == "choice":
        choices = json.loads(grammar.value)
        return LLMatcher.grammar_from_regex("|".join(f"(?:{_escaped(text)})" for text in choices))
    try:
        return LLMatcher.grammar_from_json_schema(grammar.value, overrides=_JSON_OPTIONS)
    except ValueError:
        raise GrammarError("must hold a JSON schema that is an object, true or false") from None


def _escaped(text: str) -> str:
    """A text as a regular expression of Rust's crate `regex`, where only these signs mean more than themselves."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", text)


def _reason(message: str) -> str:
    if message.startswith("Unimplemented keys"):
        named = [keyword for keyword in _KEYWORDS if f'"{keyword}"' in message]
        return f"uses {' and '.join(named) or 'a keyword'}, which is not supported; write the schema without"
    found = (reason for pattern, reason in _REASONS if re.search(pattern, message, re.IGNORECASE))
    return next(found, "cannot be compiled; correct it")


class GrammarCompiler:
    """Compiles for one tokenizer, off the thread that asks, and keeps the last `MAX_COMPILED` grammars.

    `load_vocabulary` is called in that thread, for the first grammar.
    """

    def __init__(self, load_vocabulary: Callable[[], GrammarVocabulary | None]) -> None:
        self._load_vocabulary = load_vocabulary
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._vocabulary: GrammarVocabulary | None = None
        self._compiled: OrderedDict[bytes, Future[llguidance.LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None

    def start(self, grammar: Grammar) -> Future[llguidance.LLMatcher]:
        """Compile it, or find it compiled. The future raises GrammarError."""
        key = grammar.key
        with self._lock:
            future = self._compiled.get(key)
            if future is None:
                if self._thread is None:
                    self._thread = ThreadPoolExecutor(1, "grammars")
                future = self._compiled[key] = self._thread.submit(self._compile, grammar)
            self._compiled.move_to_end(key)
            self._evict()
            return future

    def matcher(self, compiled: Future[llguidance.LLMatcher]) -> GrammarMatcher:
        """A matcher at the start of a text, of a grammar that is compiled. Raises GrammarError.

        Each has a state of its own, down to what its lexer has seen, so that it behaves the same whoever else uses the
        grammar.
        """
        pristine = compiled.result()
        assert self._vocabulary is not None, "compiled with it"
        return GrammarMatcher(pristine.deep_copy(), self._vocabulary)

    def check(self, grammar: Grammar) -> None:
        """Wait until it is compiled. Raises GrammarError."""
        self.start(grammar).result()

    def _evict(self) -> None:
        """Finished ones first come, first go; those that are still waited for stay."""
        for key in [key for key, future in self._compiled.items() if future.done()][: -MAX_COMPILED or None]:
            del self._compiled[key]

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        if self._tokenizer is None:
            self._vocabulary = self._load_vocabulary()
            if self._vocabulary is None:
                raise GrammarError(NO_VOCABULARY)
            self._tokenizer = self._vocabulary.ll_tokenizer()
        return compile_grammar(grammar, self._tokenizer)
