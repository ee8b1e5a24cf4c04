"""Grammars as values, and masks of allowed tokens in the sampler."""

from __future__ import annotations

import json

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InvalidSamplingParamsError
from model.grammar import MAX_GRAMMAR_BYTES, MAX_GRAMMAR_CHOICES, MAX_GRAMMAR_DEPTH, Grammar
from model.sampling import Sampler, SamplingRow
from model.sampling.masks import AllowedTokens
from model.sampling_params import SamplingParams


def nested(depth: int) -> object:
    value: object = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def test_a_schema_keeps_its_order_and_may_be_text() -> None:
    schema = {"properties": {"b": {}, "a": {}}, "title": "ü"}
    grammar = Grammar.json_schema(schema)
    assert json.loads(grammar.value) == schema
    assert grammar.value.index('"b"') < grammar.value.index('"a"')
    assert Grammar.json_schema(json.dumps(schema)) == grammar
    assert Grammar.json_schema(True).value == "true"


def test_grammars_are_told_apart_by_type_and_value() -> None:
    grammars = [Grammar.regex("a"), Grammar.lark("a"), Grammar.regex("b"), Grammar.choice(["a"])]
    assert len({grammar.key for grammar in grammars}) == 4
    assert Grammar.regex("a").key == Grammar.regex("a").key


def test_parameters_with_a_grammar_cross_a_process_boundary() -> None:
    params = SamplingParams(grammar=Grammar.choice(["yes", "no"]), temperature=0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: Grammar.choice([]), "choices"), (lambda: Grammar.choice([""]), "not empty"),
        (lambda: Grammar.choice(["a"] * (MAX_GRAMMAR_CHOICES + 1)), "choices"),
        (lambda: Grammar.regex("ä" * MAX_GRAMMAR_BYTES), "bytes"), (lambda: Grammar.regex("\ud800"), "Unicode"),
        (lambda: Grammar.json_schema("{"), "valid JSON"), (lambda: Grammar.json_schema("[1]"), "object"),
        (lambda: Grammar.json_schema('{"maximum": NaN}'), "valid JSON"), (lambda: Grammar("xml", ""), "one of"),
        (lambda: Grammar.json_schema({"maximum": float("inf")}), "infinity"),
        (lambda: Grammar.json_schema({"a": nested(MAX_GRAMMAR_DEPTH + 1)}), "nest"),
        (lambda: Grammar.json_schema({"a": nested(5000)}), "nest"),
        (lambda: SamplingParams(grammar=Grammar.regex("a"), min_tokens=1), "grammar"),
    ],
)  # fmt: skip
def test_what_is_refused(make: object, rule: str) -> None:
    with pytest.raises(InvalidSamplingParamsError, match=rule):
        make()  # type: ignore[operator]


def test_the_deepest_schema_that_is_taken() -> None:
    Grammar.json_schema({"a": nested(MAX_GRAMMAR_DEPTH - 1)})


def as_bits(allowed: list[set[int]], words: int) -> torch.Tensor:
    bits = torch.zeros(len(allowed), words, dtype=torch.int64)
    for row, ids in enumerate(allowed):
        for token_id in ids:
            bits[row, token_id // 32] |= 1 << (token_id % 32)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_only_allowed_tokens_are_drawn_and_other_rows_stay_as_they_are(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([31, 32, 33, 257, 700]))
    num_rows = data.draw(st.integers(1, 5))
    masked = sorted(data.draw(st.sets(st.integers(0, num_rows - 1), min_size=1)))
    some_ids = st.sets(st.integers(0, vocab_size - 1), min_size=1, max_size=6)
    allowed = [data.draw(some_ids) for _ in masked]
    kinds = [{"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}, {"logit_bias": {0: 50.0}}, {}]
    rows = [SamplingRow(SamplingParams(seed=row, **kinds[row])) for row in range(num_rows)]  # type: ignore[arg-type]
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    sampler = Sampler(vocab_size)
    batch, positions = sampler.build_batch(rows), torch.zeros(num_rows, dtype=torch.int64)
    free = sampler.sample(logits, batch, positions).token_ids.tolist()
    which = None if len(masked) == num_rows else torch.tensor(masked)
    tokens = AllowedTokens(as_bits(allowed, vocab_size // 32 + 1), which)
    drawn = sampler.sample(logits, batch, positions, tokens).token_ids.tolist()
    for row in range(num_rows):
        if row in masked:
            ids = allowed[masked.index(row)]
            assert drawn[row] in ids
            if free[row] in ids and kinds[row] == {"temperature": 0.0}:
                assert drawn[row] == free[row]
        else:
            assert drawn[row] == free[row]


def test_frequencies_are_those_of_the_renormalised_distribution() -> None:
    vocab_size, count = 40, 4000
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(2)).expand(count, vocab_size)
    ids = [3, 7, 31, 32, 39]
    sampler = Sampler(vocab_size)
    batch = sampler.build_batch([SamplingRow(SamplingParams(seed=seed)) for seed in range(count)])
    tokens = AllowedTokens(as_bits([set(ids)] * count, 2), None)
    drawn = sampler.sample(logits, batch, torch.zeros(count, dtype=torch.int64), tokens).token_ids
    expected = torch.softmax(logits[0, ids], dim=0) * count
    found = torch.tensor([(drawn == token_id).sum() for token_id in ids])
    assert found.sum() == count
    statistic = ((found - expected) ** 2 / expected).sum()
    assert statistic < 23.5, "chi-squared with 4 degrees of freedom beyond its 0.9999 quantile"


def test_words_beyond_the_mask_are_not_allowed() -> None:
    scores = torch.zeros(2, 100)
    AllowedTokens(as_bits([{1}, {33}], 2), None).apply(scores)
    assert [row.isfinite().nonzero().flatten().tolist() for row in scores] == [[1], [33]]
