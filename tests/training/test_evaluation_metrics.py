"""Measures of texts against their definitions, worked out by hand or by counting."""

from __future__ import annotations

import math
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import DataError, RecipeError
from training.evaluation.text_metrics import (
    bleu,
    distinct_share,
    ngrams,
    pattern_matches,
    repetition,
    text_statistics,
)

HYPOTHESES = ["the cat sat on the mat today", "a quill writes what the hand has thought"]
REFERENCES = [
    ["the cat sat on the mat", "there was a cat on the mat today"],
    ["the quill writes what the hand thought of"],
]


def test_statistics_of_texts_worked_out_by_hand() -> None:
    result = text_statistics(["a b a b a b", "a b c"])
    assert result.texts == 2
    assert result.words == 4.5
    assert result.characters == 8
    # words a b a b a b a b c; pairs ab ba ab ba ab, ab bc; triples aba bab aba bab, abc; fours abab baba abab
    assert result.distinct == (3 / 9, 3 / 7, 3 / 5, 2 / 3)
    assert result.diversity == pytest.approx((3 / 9 + 3 / 7 + 3 / 5 + 2 / 3) / 4)
    assert result.repetition == pytest.approx(1 / 3)  # the second text is too short to have a 4-gram


def test_texts_too_short_for_a_measure_have_none() -> None:
    result = text_statistics(["one two", "", "  \n "])
    assert result.distinct == (1.0, 1.0, None, None)
    assert result.diversity is None
    assert result.repetition is None
    assert result.words == 2 / 3
    with pytest.raises(DataError, match="no text to measure"):
        text_statistics([])


def test_words_are_what_white_space_separates_in_every_script() -> None:
    assert text_statistics(["नदी बहे नदी बहे"]).distinct[:2] == (1 / 2, 2 / 3)


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=5), st.integers(1, 4))
def test_shares_are_those_of_counting(texts: list[list[str]], order: int) -> None:
    counts = [Counter("".join(words[i : i + order]) for i in range(len(words) - order + 1)) for words in texts]
    total = sum(map(Counter.total, counts))
    together: Counter[str] = sum(counts, Counter())
    assert distinct_share(texts, order) == (len(together) / total if total else None)
    repeated = [sum(n - 1 for n in own.values()) / own.total() for own in counts if own]
    expected = sum(repeated) / len(repeated) if repeated else None
    assert repetition(texts, order) == (None if expected is None else pytest.approx(expected))
    assert [len(list(ngrams(words, order))) for words in texts] == [max(0, len(words) - order + 1) for words in texts]


def corpus_bleu(hypotheses: list[str], references: list[list[str]]) -> float:
    """Papineni et al. 2002, formula for formula; no smoothing, so every precision must be above 0."""
    logs, length, closest = 0.0, 0, 0
    for order in range(1, 5):
        clipped = total = 0
        for text, own in zip(hypotheses, references, strict=True):
            counts = Counter(tuple(text.split()[i : i + order]) for i in range(len(text.split()) - order + 1))
            most: Counter[tuple[str, ...]] = Counter()
            for reference in own:
                words = reference.split()
                most |= Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
            clipped += (counts & most).total()
            total += counts.total()
        logs += math.log(clipped / total) / 4
    for text, own in zip(hypotheses, references, strict=True):
        size = len(text.split())
        length += size
        closest += min((abs(len(r.split()) - size), len(r.split())) for r in own)[1]
    return 100 * math.exp(min(0.0, 1 - closest / length)) * math.exp(logs)


def test_bleu_is_that_of_the_paper() -> None:
    result = bleu(HYPOTHESES, REFERENCES)
    assert result.score == pytest.approx(corpus_bleu(HYPOTHESES, REFERENCES))
    assert 0 < result.score < 100
    assert "tok:13a" in result.signature
    assert bleu(["the cat sat on a mat"], [["the cat sat on a mat"]]).score == pytest.approx(100)
    short = bleu([text.rsplit(" ", 2)[0] for text in HYPOTHESES], REFERENCES)
    assert short.brevity_penalty < 1
    assert short.score == pytest.approx(corpus_bleu([t.rsplit(" ", 2)[0] for t in HYPOTHESES], REFERENCES))


def test_bleu_of_characters() -> None:
    hypothesis, reference = "नदी बहे", "नदी बही"
    result = bleu([hypothesis], [[reference]], "char")
    spaced = [" ".join(text.replace(" ", "")) for text in (hypothesis, reference)]
    assert result.score == pytest.approx(corpus_bleu([spaced[0]], [[spaced[1]]]))


def test_bleu_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(RecipeError, match="install quill's extra `evaluation`"):
        bleu(HYPOTHESES, REFERENCES)


def test_a_pattern_is_found_in_a_share_of_the_lines() -> None:
    texts = ["ROMEO:\nO, speak again\n\n", "  JULIET:\nromeo:"]
    result = pattern_matches(texts, r"^[A-Z]+:$")
    assert (result.lines, result.share) == (4, 0.5)
    assert pattern_matches(texts, "(?i)^romeo").share == 0.5
    assert pattern_matches(["", "\n"], "a").share is None
    with pytest.raises(RecipeError, match="'\\(' is no regular expression"):
        pattern_matches(texts, "(")
