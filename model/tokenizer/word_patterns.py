"""How a text is divided into words before bytes merge: regular expressions that tiktoken and `tokenizers` read alike.

tiktoken runs them by the crate fancy-regex, `tokenizers` by Oniguruma. Every pattern matches all of any text, gives a
word the space before it, and begins a word at a space or line end that something visible follows. They are written with
possessive quantifiers, so that letters, digits and signs never make them backtrack. Free of torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from model.tokenizer.files import as_dict

# GPT-2's words: contractions, letters, digits, other symbols, white space. The same language as the pattern of the
# original release. Combining marks are no letters, so that it cuts the vowel signs of Indic scripts off their letters.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# The same for scripts that write with combining marks: marks and joiners (ZWNJ, ZWJ) stay with what they follow, so
# that no boundary falls inside an extended grapheme cluster (UAX #29) of Devanagari: consonants joined by virama,
# nukta, vowel signs, anusvara, accents.
_JOINING = r"\p{M}\x{200c}\x{200d}"
DEVANAGARI_PATTERN = (
    rf"'(?:[sdmt]|ll|ve|re)(?![{_JOINING}])| ?[\p{{L}}{_JOINING}]++| ?\p{{N}}[\p{{N}}{_JOINING}]*+"
    rf"| ?[^\s\p{{L}}\p{{N}}{_JOINING}][^\s\p{{L}}\p{{N}}]*+|\s++\z|\s+(?!\S)|\s"
)

# Words are what stands between white space, punctuation and all.
WHITESPACE_PATTERN = r" ?\S++|\s++\z|\s+(?!\S)|\s"

WORD_PATTERNS = {"gpt2": GPT2_PATTERN, "devanagari": DEVANAGARI_PATTERN, "whitespace": WHITESPACE_PATTERN}


# fancy-regex panics at about a million states to go back to: one for each character of a run of white space before a
# word, whose boundary always lies before the run's last character. (NFKC makes up to 18 characters of one.)
MANY_CHARACTERS = 50_000
_LONG_RUN = re.compile(rf"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{{{MANY_CHARACTERS},}}")


def runnable_parts(text: str) -> Iterator[str]:
    """The text, cut within long runs of white space where every pattern ends a word, so that tiktoken can read it."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        if run.end() < len(text):
            yield text[start : run.end() - 1]
            start = run.end() - 1
    yield text[start:]


def byte_level(*, use_regex: bool) -> dict[str, object]:
    """The part of a tokenizer.json that spells bytes; with `use_regex` it first divides the text by GPT-2's pattern."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split_at(pattern: str) -> dict[str, object]:
    """The part of a tokenizer.json that makes each match of a pattern a word of its own."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level_words(pattern: str) -> dict[str, object]:
    """The pre_tokenizer of a byte-level BPE with one of these patterns."""
    if pattern == GPT2_PATTERN:
        return byte_level(use_regex=True)
    return {"type": "Sequence", "pretokenizers": [split_at(pattern), byte_level(use_regex=False)]}


def read_byte_level_words(pre_tokenizer: object) -> str | None:
    """The pattern behind a byte-level pre_tokenizer, or None for one that is not known to mean the same in tiktoken."""
    entry = as_dict(pre_tokenizer)
    if entry.get("type") == "ByteLevel":
        return GPT2_PATTERN if _is_byte_level(entry, use_regex=True) else None
    steps = entry.get("pretokenizers")
    if entry.get("type") != "Sequence" or not isinstance(steps, list) or len(steps) != 2:
        return None
    known = (pattern for pattern in WORD_PATTERNS.values() if steps[0] == split_at(pattern))
    return next(known, None) if _is_byte_level(as_dict(steps[1]), use_regex=False) else None


def _is_byte_level(entry: dict[str, object], *, use_regex: bool) -> bool:
    return (
        entry.get("type") == "ByteLevel"
        and entry.get("add_prefix_space") is False
        and entry.get("use_regex", True) is use_regex
    )
