"""StreamDecoder: joined deltas are the whole text, and no delta holds half a character."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import TokenizerError
from model.tokenizer import StreamDecoder, Tokenizer
from tests.model.tokenizer_samples import CORPUS, FAMILIES, write_tokenizer

DEVANAGARI = "नमस्ते दुनिया, क्षत्रिय ज्ञान।"
EMOJI = "👩‍🚀 🙂 🇮🇳 👍🏽 go"
REPLACEMENT = "\ufffd"


@functools.cache
def family(name: str) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Our tokenizer of that family, and the library's."""
    oracle = FAMILIES[name]()
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.load(write_tokenizer(Path(folder), oracle)), oracle


def stream(tokenizer: Tokenizer, ids: list[int], size: int = 1) -> list[str]:
    """The deltas of pushing `size` ids at a time, the rest at the end included."""
    decoder = StreamDecoder(tokenizer)
    deltas = [decoder.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [*deltas, decoder.finish()]


@pytest.mark.parametrize("make", [Tokenizer.gpt2, Tokenizer.bytes])
@pytest.mark.parametrize("text", [DEVANAGARI, EMOJI])
def test_no_delta_holds_half_a_character(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # or no character would be split over tokens
    deltas = stream(tokenizer, ids)
    assert "".join(deltas) == text
    assert not any(REPLACEMENT in delta for delta in deltas)
    assert deltas[-1] == ""


def test_a_character_appears_with_its_last_byte():
    tokenizer = Tokenizer.bytes()
    assert stream(tokenizer, list("a🙂".encode())) == ["a", "", "", "", "🙂", ""]


def test_bytes_of_an_unfinished_character_are_flushed_at_the_end():
    decoder = StreamDecoder(Tokenizer.bytes())
    assert decoder.push([*b"ok \xe0\xa4"]) == "ok "
    assert decoder.finish() == REPLACEMENT
    assert decoder.finish() == ""


@given(st.lists(st.binary(max_size=6), max_size=20))
def test_invalid_bytes_become_what_python_makes_of_them(chunks):
    decoder = StreamDecoder(Tokenizer.bytes())
    text = "".join([*(decoder.push(list(chunk)) for chunk in chunks), decoder.finish()])
    assert text == b"".join(chunks).decode("utf-8", "replace")


@given(st.lists(st.integers(0, 50_256), max_size=40), st.integers(1, 5))
def test_any_gpt2_ids_stream_to_their_decoded_text(ids, size):
    tokenizer = Tokenizer.gpt2()
    assert "".join(stream(tokenizer, ids, size)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40)
@given(data=st.data())
def test_any_ids_of_any_family_stream_to_their_decoded_text(name, data):
    tokenizer, oracle = family(name)
    ids = data.draw(st.lists(st.sampled_from(sorted(oracle.get_vocab().values())), max_size=150))
    text = tokenizer.decode(ids)
    assert "".join(stream(tokenizer, ids)) == text
    assert "".join(stream(tokenizer, ids, 7)) == text
    if name != "byte_fallback":  # there the library spoils the valid characters beside an invalid byte
        assert text == oracle.decode(ids)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("text", [*CORPUS, DEVANAGARI, " ".join(CORPUS) * 3])
def test_encoded_text_streams_to_what_the_library_decodes(name, text):
    tokenizer, oracle = family(name)
    ids = oracle.encode(text).ids
    assert tokenizer.encode(text) == ids
    deltas = stream(tokenizer, ids)
    assert "".join(deltas) == oracle.decode(ids)
    assert not any(REPLACEMENT in delta for delta in deltas)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_comes_steadily(name):
    tokenizer, oracle = family(name)
    deltas = stream(tokenizer, oracle.encode(CORPUS[1] * 10).ids)
    longest_silence = max(map(len, "".join("x" if delta else "." for delta in deltas).split("x")))
    assert longest_silence <= 2  # a token that only marks a space or a special one, and the empty end


def test_special_tokens_add_no_text_and_do_not_count_as_the_first():
    tokenizer, oracle = family("metaspace")
    word = oracle.token_to_id("▁the")
    ids = [1, word, 2, word, 1]
    assert tokenizer.decode(ids) == "the the" == oracle.decode(ids)
    assert stream(tokenizer, ids) == ["", "the", "", " the", "", ""]


def test_byte_tokens_keep_the_characters_already_sent():
    tokenizer, oracle = family("byte_fallback")
    ids = [oracle.token_to_id(f"<0x{byte:02X}>") for byte in "日".encode() + b"\xff"]
    assert stream(tokenizer, ids) == ["", "", "日", REPLACEMENT, ""]
    assert tokenizer.decode(ids) == "日" + REPLACEMENT


@pytest.mark.parametrize("name", ["byte_bpe", "metaspace", "unusual"])
@pytest.mark.parametrize("bad_id", [-1, 10_000, 2**70])
def test_an_unknown_id_is_refused_and_leaves_the_stream_as_it_was(name, bad_id):
    tokenizer, oracle = family(name)
    ids = oracle.encode("the king").ids
    decoder = StreamDecoder(tokenizer)
    text = decoder.push(ids[:1])
    with pytest.raises(TokenizerError, match=f"token id {bad_id} is not"):
        decoder.push([ids[1], bad_id])
    assert text + decoder.push(ids[1:]) + decoder.finish() == tokenizer.decode(ids)


def test_nothing_piles_up_over_a_long_stream():
    lead_byte, tokenizer = 0xF0, Tokenizer.bytes()
    decoder = StreamDecoder(tokenizer)
    num_characters = sum(len(decoder.push([lead_byte])) for _ in range(1_000))
    assert num_characters == 999  # all but the one that could still become a character

    tokenizer, oracle = family("unusual")
    collector = tokenizer.collector()
    for token_id in oracle.encode(" ".join(CORPUS) * 20).ids:
        collector.push([token_id])
    assert len(collector._window) <= 64
