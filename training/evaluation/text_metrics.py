"""Measures of generated texts that need no model. Free of torch.

Words are what white space separates, in every script. With n-grams of words:

- distinct-n: different n-grams over all n-grams of all texts (Li et al. 2016).
- diversity: the mean of distinct-1 to distinct-4, which is the n-gram diversity score of Shaib et al. 2024 over 4.
- repetition: the share of a text's 4-grams that stood in it before, averaged over the texts that have one (seq-rep-4,
  Welleck et al. 2020).
- BLEU: n-grams of 1 to 4 words shared with references (Papineni et al. 2002), from 0 to 100, by sacrebleu.
- pattern: the share of lines that a regular expression finds something in.

Whether a text is coherent, or a verse a good one, is for readers to judge; a metre can be a pattern only as far as its
spelling shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from training.errors import DataError, RecipeError

BleuTokenizer = Literal["13a", "intl", "char", "none"]
MAX_ORDER = 4


@dataclass(frozen=True, slots=True)
class TextStatistics:
    """Lengths are means over the texts. Shares are None where no text is long enough to have one."""

    texts: int
    words: float
    characters: float
    distinct: tuple[float | None, float | None, float | None, float | None]
    diversity: float | None
    repetition: float | None


@dataclass(frozen=True, slots=True)
class Bleu:
    """`score` lies between 0 and 100; `signature` says how it was computed, for others to compare with."""

    score: float
    precisions: tuple[float, ...]
    brevity_penalty: float
    signature: str


@dataclass(frozen=True, slots=True)
class PatternMatches:
    """Of `lines` that are not empty, the share in which the pattern is found; None without lines."""

    pattern: str
    lines: int
    share: float | None


def text_statistics(texts: Sequence[str]) -> TextStatistics:
    """Raises DataError for no texts at all."""
    if not texts:
        raise DataError("there is no text to measure; name a file that holds some")
    words = [text.split() for text in texts]
    distinct = tuple(distinct_share(words, order) for order in range(1, MAX_ORDER + 1))
    known = [share for share in distinct if share is not None]
    return TextStatistics(
        texts=len(texts),
        words=sum(map(len, words)) / len(texts),
        characters=sum(map(len, texts)) / len(texts),
        distinct=(distinct[0], distinct[1], distinct[2], distinct[3]),
        diversity=sum(known) / MAX_ORDER if len(known) == MAX_ORDER else None,
        repetition=repetition(words),
    )


def distinct_share(texts: Sequence[Sequence[str]], order: int) -> float | None:
    """Different n-grams over all n-grams, of all texts together."""
    total, different = 0, set()
    for words in texts:
        for gram in ngrams(words, order):
            total += 1
            different.add(gram)
    return len(different) / total if total else None


def repetition(texts: Sequence[Sequence[str]], order: int = MAX_ORDER) -> float | None:
    """The mean over texts of the share of n-grams that repeat an earlier one of the same text."""
    different = [distinct_share([words], order) for words in texts]
    shares = [1 - share for share in different if share is not None]
    return sum(shares) / len(shares) if shares else None


def ngrams(words: Sequence[str], order: int) -> Iterator[tuple[str, ...]]:
    """Runs of `order` neighbours."""
    return zip(*(words[start:] for start in range(order)), strict=False)


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]], tokenize: BleuTokenizer = "13a") -> Bleu:
    """BLEU-4 of the corpus; `references[i]` are the ones of `texts[i]`, one or more, as many as there are.

    `tokenize` is sacrebleu's: 13a for languages that put spaces between words, intl for Unicode punctuation, char,
    none for text that is tokenised already. Raises RecipeError without sacrebleu.
    """
    metric = bleu_metric(tokenize)
    most = max(map(len, references))
    # sacrebleu takes the first references of all texts, then the second ones …, None where a text has fewer.
    columns: list[Any] = [[own[number] if number < len(own) else None for own in references] for number in range(most)]
    result = metric.corpus_score(list(texts), columns)
    return Bleu(result.score, tuple(result.precisions), result.bp, str(metric.get_signature()))


def bleu_metric(tokenize: BleuTokenizer) -> Any:
    """sacrebleu's metric. Raises RecipeError without the library."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise RecipeError("BLEU needs sacrebleu; install quill's extra `evaluation`") from None
    return BLEU(tokenize=tokenize, max_ngram_order=MAX_ORDER)


def pattern_matches(texts: Sequence[str], pattern: str) -> PatternMatches:
    """`pattern` is of Python's `re` and is searched in each line; ^ and $ bind it to the whole line.

    Raises RecipeError for one that is no regular expression.
    """
    expression = compiled(pattern)
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    found = sum(expression.search(line) is not None for line in lines)
    return PatternMatches(pattern, len(lines), found / len(lines) if lines else None)


def compiled(pattern: str) -> re.Pattern[str]:
    """Raises RecipeError for what is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"--pattern {pattern!r} is no regular expression ({error}); mend it") from None
