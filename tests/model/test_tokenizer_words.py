"""Word patterns and normalisers of byte-level BPE: tiktoken against tokenizers, boundaries against UAX #29."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

from model.tokenizer import StreamDecoder, Tokenizer
from model.tokenizer.normalizer import NO_NORMALIZER, Normalizer, read_normalizer
from model.tokenizer.word_patterns import (
    DEVANAGARI_PATTERN,
    GPT2_PATTERN,
    WORD_PATTERNS,
    byte_level_words,
    read_byte_level_words,
)
from tests.model.tokenizer_samples import CORPUS, train_byte_bpe, write_tokenizer
from training.data.readers import cut_text

# Consonants, vowels and their signs, virama, nukta, anusvara, accents, digits, danda, joiners, and what stands beside.
DEVANAGARI = [*"कखरषज़ड़अइािीुृेौ़्ंँः॒॑१९।॥\u200c\u200d", *" \n\t aZé7'.,-“”()👩🚀", "'s", "क्ष", "त्र", "e\u0301"]
# regex's \\X joins a virama to the next consonant whatever precedes it; UAX #29 asks for a consonant there (GB9c).
SYLLABLES = [each for each in DEVANAGARI if each != "्"] + ["क्", "क्‌", "क्‍ष", "त्र्य", "ज़्ज़", "र्क्‌ष", "श्री", "द्धि"]
HINDI = st.lists(st.sampled_from(DEVANAGARI), max_size=24).map("".join)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
MIXED = st.one_of(HINDI, ANY_TEXT)
NORMALIZERS = [(), ("NFC",), ("NFKC",), ("NFD", "Lowercase"), ("NFKC", "Lowercase")]
VARIANTS = [(name, steps) for name in WORD_PATTERNS for steps in NORMALIZERS]


def split(pattern: str, text: str) -> list[str]:
    splitter = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return [word for word, _ in splitter.pre_tokenize_str(text)]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[object, tuple[Tokenizer, tokenizers.Tokenizer]]:
    """Ours, and the library's, of every pattern with every normaliser."""
    base = json.loads(train_byte_bpe().to_str())
    made: dict[object, tuple[Tokenizer, tokenizers.Tokenizer]] = {}
    for name, steps in VARIANTS:
        normalizer = Normalizer(steps).document()
        document = base | {"pre_tokenizer": byte_level_words(WORD_PATTERNS[name]), "normalizer": normalizer}
        folder = write_tokenizer(tmp_path_factory.mktemp("variant"), document)
        made[name, steps] = (Tokenizer.load(folder), tokenizers.Tokenizer.from_str(json.dumps(document)))
    return made


@pytest.mark.parametrize(("name", "steps"), VARIANTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=MIXED)
def test_tiktoken_gives_the_librarys_ids(variants, name: str, steps: tuple[str, ...], text: str) -> None:
    tokenizer, oracle = variants[name, steps]
    assert tokenizer.kind == "byte_bpe"
    oracle.encode_special_tokens = True
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text).ids == tokenizer.encode_batch([text, text])[1]
    normalized = oracle.normalizer.normalize_str(text) if steps else text
    assert tokenizer.normalize(text) == normalized == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(SYLLABLES), max_size=24).map("".join))
def test_devanagari_words_never_cut_a_cluster(text: str) -> None:
    words = split(DEVANAGARI_PATTERN, text)
    assert "".join(words) == text
    clusters = regex.findall(r"\X", text)
    ends = {sum(map(len, clusters[:count])) for count in range(len(clusters) + 1)}
    assert {sum(map(len, words[:count])) for count in range(len(words) + 1)} <= ends


@pytest.mark.parametrize(
    "word", ["कर्म", "क्षेत्र", "ज़िंदगी", "क\u094d\u200dष", "क\u094d\u200cष", "हिंदी", "दुःख", "ढूँढ़ता", "१॑"]
)
def test_gpt2_words_cut_marks_off_and_devanagari_words_do_not(word: str) -> None:
    assert len(split(GPT2_PATTERN, word)) > 1
    assert split(DEVANAGARI_PATTERN, word) == [word]
    assert split(DEVANAGARI_PATTERN, f"वह {word}।") == ["वह", f" {word}", "।"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("abcXYZ 12'.!\n\té日"), max_size=30))
def test_without_marks_devanagari_words_are_gpt2s(text: str) -> None:
    assert split(DEVANAGARI_PATTERN, text) == split(GPT2_PATTERN, text)


@pytest.mark.parametrize(("name", "steps"), VARIANTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=MIXED, data=st.data())
def test_text_cut_where_the_tokenizer_allows_has_the_ids_of_the_whole(variants, name, steps, text: str, data) -> None:
    tokenizer, _ = variants[name, steps]
    assert tokenizer.cut == ("never" if "NFKC" in steps else "words")
    size = data.draw(st.integers(1, 12))
    pieces = list(cut_text((text[i : i + size] for i in range(0, len(text), size)), tokenizer.cut))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_compatibility_forms_must_not_be_cut(variants) -> None:
    """´ is a space and a mark under NFKC, so that the word before it ends elsewhere than where a cut would end it."""
    tokenizer, _ = variants["gpt2", ("NFKC",)]
    parts = tokenizer.encode("a  ") + tokenizer.encode(" ´")
    assert parts != tokenizer.encode("a   ´")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gpt2", " " * 1_200_000 + "x"),
        ("devanagari", " " * 1_200_000 + "x"),
        *[("devanagari", sign * 200_000) for sign in "क्."],
        ("whitespace", "." * 200_000),
    ],
)
def test_long_runs_are_read(variants, name: str, text: str) -> None:
    """White space before a word beyond what fancy-regex can go back over."""
    tokenizer, _ = variants[name, ()]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", list(WORD_PATTERNS))
@pytest.mark.parametrize("run", [" ", "\n ", "\u3000", " \t"])
def test_long_white_space_has_the_librarys_ids(variants, name: str, run: str) -> None:
    tokenizer, oracle = variants[name, ()]
    text = f"{run * 60_000}यह{run * 30_000}।{run * 5_000}"
    assert tokenizer.encode(text) == oracle.encode(text).ids


def test_special_tokens_are_taken_out_before_normalisation(variants) -> None:
    tokenizer, oracle = variants["devanagari", ("NFKC", "Lowercase")]
    tokenizer_ids = tokenizer.encode_template("Ａ<|endoftext|>Ｂ <|ENDOFTEXT|>")
    oracle.encode_special_tokens = False
    assert tokenizer_ids == oracle.encode("Ａ<|endoftext|>Ｂ <|ENDOFTEXT|>").ids
    assert tokenizer_ids.count(0) == 1
    assert tokenizer.decode(tokenizer_ids) == "ab <|endoftext|>"


@pytest.mark.parametrize(("name", "steps"), VARIANTS)
def test_a_copy_is_the_same_tokenizer(variants, name: str, steps: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer, _ = variants[name, steps]
    tokenizer.save(tmp_path)
    loaded, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.digest == tokenizer.digest
    written = tokenizers.Tokenizer.from_str(json.dumps(tokenizer._parts.encoder.document()))  # rebuilt from the ranks
    for text in CORPUS:
        assert loaded.encode(text) == theirs.encode(text) == written.encode(text).ids
        assert theirs.decode(loaded.encode(text)) == loaded.decode(loaded.encode(text))


def test_digests_tell_patterns_and_normalisers_apart(variants) -> None:
    assert len({tokenizer.digest for tokenizer, _ in variants.values()}) == len(variants)


def test_a_file_can_ask_for_the_library(tmp_path: Path) -> None:
    oracle = train_byte_bpe()
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, oracle, {"encoder": "tokenizers"}))
    assert tokenizer.kind == "library"
    assert [tokenizer.encode(text) for text in CORPUS] == [each.ids for each in oracle.encode_batch(CORPUS)]
    assert Tokenizer.load(write_tokenizer(tmp_path, oracle, {})).kind == "byte_bpe"


def test_only_known_patterns_run_through_tiktoken() -> None:
    for pattern in WORD_PATTERNS.values():
        assert read_byte_level_words(byte_level_words(pattern)) == pattern
    assert read_byte_level_words(byte_level_words(r"\p{L}+|\P{L}+")) is None
    assert read_byte_level_words(None) is None


def test_normalizers_are_read_as_the_library_writes_them() -> None:
    holder = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [normalizers.NFKC(), normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC()])]
    holder.normalizer = normalizers.Sequence(steps)
    read = read_normalizer(json.loads(holder.to_str())["normalizer"])
    assert read is not None
    assert read.steps == ("NFKC", "Lowercase", "NFC")
    assert read("ＡÉ") == "aé"
    assert read_normalizer(None) is not None
    assert read_normalizer({"type": "Strip", "strip_left": True, "strip_right": True}) is None
    assert NO_NORMALIZER("Ａ") == "Ａ"


def test_a_streamed_text_is_the_decoded_one(variants) -> None:
    tokenizer, _ = variants["devanagari", ("NFC",)]
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("".join(CORPUS))
    deltas = [decoder.push([i]) for i in ids]
    assert "".join(deltas) + decoder.finish() == tokenizer.normalize("".join(CORPUS))
    assert not any("\ufffd" in delta for delta in deltas)
