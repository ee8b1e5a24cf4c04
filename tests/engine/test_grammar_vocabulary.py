"""What llguidance is told of tokenizers of every family: texts that a grammar chose decode to texts of its language."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from model.grammar import Grammar
from model.tokenizer import Tokenizer
from server.engine.grammar_compiler import MAX_COMPILED, GrammarCompiler, GrammarError
from server.engine.grammar_matcher import mask_words
from server.engine.grammar_vocabulary import GrammarVocabulary
from tests.model import tokenizer_samples as samples

FAMILIES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_bpe": samples.train_byte_bpe, "regex_byte_bpe": samples.train_regex_byte_bpe,
    "metaspace": samples.train_metaspace,
    "byte_fallback": samples.train_byte_fallback, "word_end": samples.train_word_end,
}  # fmt: skip
OURS = {
    "gpt2": Tokenizer.gpt2, "bytes": Tokenizer.bytes,
    "characters": lambda: Tokenizer.characters('theandorl ."{}:,[]-0123456789', end_of_text=False),
}  # fmt: skip


@pytest.fixture(scope="module", params=[*FAMILIES, *OURS])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param in OURS:
        return OURS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    samples.write_tokenizer(folder, FAMILIES[request.param]())
    return Tokenizer.load(folder)


def compiler_for(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(lambda: GrammarVocabulary.of(tokenizer))


def write(compiler: GrammarCompiler, grammar: Grammar, size: int, seed: int) -> list[int] | None:
    """Ids of a text that random choices among the allowed tokens lead to; None where they lead nowhere."""
    matcher = compiler.matcher(compiler.start(grammar))
    mask = np.empty(mask_words(size), dtype=np.int32)
    generator, ids = random.Random(seed), []
    for _ in range(200):
        matcher.fill(mask, ())
        if matcher.has_failed:
            return None
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        assert len(allowed)
        assert allowed[-1] < size
        ids.append(int(generator.choice(allowed)))
        matcher.accept(ids[-1])
        if matcher.is_complete:
            return ids
    return None


def test_texts_of_every_family(tokenizer: Tokenizer) -> None:
    pattern = r"(the|and|no|all) [0-9]{1,2}( (the|and|no))?\."
    compiler = compiler_for(tokenizer)
    found = 0
    for seed in range(12):
        ids = write(compiler, Grammar.regex(pattern), tokenizer.vocab_size, seed)
        if ids is not None:
            text = tokenizer.decode(ids)
            assert re.fullmatch(pattern, text), text
            assert not set(ids) & set(tokenizer.special_tokens.values())
            found += 1
    assert found >= 3


def test_a_vocabulary_may_be_cut_to_the_models(tokenizer: Tokenizer) -> None:
    vocabulary = GrammarVocabulary.of(tokenizer, 120)
    assert vocabulary is not None
    assert vocabulary.size == min(120, tokenizer.vocab_size)
    assert vocabulary.ll_tokenizer().vocab_size == vocabulary.size + 1


@pytest.mark.parametrize("family", [samples.train_unusual, samples.train_word_piece])
def test_tokenizers_that_no_grammar_can_be_followed_with(
    tmp_path: Path, family: Callable[[], tokenizers.Tokenizer]
) -> None:
    samples.write_tokenizer(tmp_path, family())
    compiler = compiler_for(Tokenizer.load(tmp_path))
    with pytest.raises(GrammarError, match="not supported with this model"):
        compiler.check(Grammar.regex("a"))


def test_compiled_grammars_are_shared_and_bounded() -> None:
    compiler = compiler_for(Tokenizer.bytes())
    first = compiler.start(Grammar.regex("first"))
    assert compiler.start(Grammar.regex("first")) is first
    for number in range(3 * MAX_COMPILED):
        compiler.check(Grammar.regex(f"word{number}"))
        if number % 8 == 0:
            assert compiler.start(Grammar.regex("first")) is first, "what is asked for again stays"
    assert len(compiler._compiled) <= MAX_COMPILED + 1


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.regex("(canary"), "regular expression"), (Grammar.regex("a(?=canary)"), "look-around"),
        (Grammar.regex(r"(a)\1"), "backreference"), (Grammar.lark("start: canary"), "not defined"),
        (Grammar.json_schema({"uniqueItems": True, "not": {"const": "canary"}}), "uses not and uniqueItems"),
        (Grammar.json_schema({"type": "string", "format": "canary"}), "format"),
        (Grammar.json_schema({"$ref": "#/$defs/canary"}), r"\$ref"), (Grammar.json_schema(False), "no value"),
        (Grammar.json_schema({"type": "canary"}), "cannot be compiled"),
        (Grammar.json_schema({"oneOf": [{"type": "string"}, {"minLength": 2}]}), "anyOf"),
        (Grammar.json_schema({"type": "integer", "multipleOf": 999_999_937}), "too large"),
    ],
)  # fmt: skip
def test_reasons_are_sentences_that_repeat_nothing(grammar: Grammar, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason) as error:
        compiler_for(Tokenizer.bytes()).check(grammar)
    assert "canary" not in str(error.value)
    assert "\n" not in str(error.value)
