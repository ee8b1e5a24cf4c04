"""Text deltas and stop strings against the plain definition: whatever the pieces, the text is the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.text_output import StopMatcher
from model.tokenizer import Tokenizer
from server.engine.messages import SequenceOutput, TokenLogprobs
from server.output import ChoiceDelta, ChoiceOutput

BYTES = Tokenizer.bytes()
EOS = 256


def feed(choice: ChoiceOutput, chunks: list[list[int]], reason: str = "length") -> list[ChoiceDelta]:
    """Push chunks as the engine would until the choice ends."""
    deltas = []
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        deltas.append(choice.push(SequenceOutput(0, chunk, reason if last else None)))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the shortest prefix that holds a stop string, cut before the earliest one in it."""
    for end in range(1, len(text) + 1):
        found = [(text[:end].find(stop), stop) for stop in stops if stop in text[:end]]
        if found:
            position, stop = min(found, key=lambda pair: pair[0])
            return text[:position], stop
    return text, None


def split(items: list[int], sizes: list[int]) -> list[list[int]]:
    chunks, rest = [], items
    for size in sizes:
        chunks.append(rest[:size])
        rest = rest[size:]
    return [chunk for chunk in [*chunks, rest] if chunk]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abé", min_size=1, max_size=30),
    stops=st.lists(st.text("abé", min_size=1, max_size=5), max_size=3),
    sizes=st.lists(st.integers(1, 6), max_size=12),
)
def test_any_chunking_gives_the_defined_text(text: str, stops: list[str], sizes: list[int]) -> None:
    ids = list(text.encode())
    deltas = feed(ChoiceOutput(0, BYTES, stops), split(ids, sizes))
    shown, stop = cut(text, stops)
    assert "".join(delta.text for delta in deltas) == shown
    assert deltas[-1].stop_reason == stop
    assert deltas[-1].finish_reason == ("length" if stop is None else "stop")
    single = feed(ChoiceOutput(0, BYTES, stops), [[token_id] for token_id in ids])
    joined_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    assert joined_ids == [token_id for delta in single for token_id in delta.token_ids]


def test_text_is_held_only_while_it_may_become_a_stop() -> None:
    matcher = StopMatcher(["end."])
    assert matcher.push("the e") == "the "
    assert matcher.push("n") == ""
    assert matcher.push("t") == "ent"
    assert matcher.push(" end") == " "
    assert matcher.push(". more") == ""
    assert matcher.matched == "end."


def test_half_characters_wait() -> None:
    ids = list("नमस्ते 👩‍🚀".encode())
    deltas = feed(ChoiceOutput(0, BYTES, []), [[token_id] for token_id in ids])
    assert "".join(delta.text for delta in deltas) == "नमस्ते 👩‍🚀"
    assert "\ufffd" not in "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("stops", [[], ["zz"]])
def test_a_cut_character_becomes_a_replacement(stops: list[str]) -> None:
    deltas = feed(ChoiceOutput(0, BYTES, stops), [[97], [0xE2], [0x82]])
    assert "".join(delta.text for delta in deltas) == "a\ufffd"


@pytest.mark.parametrize("stops", [[], ["zz"]])
def test_the_token_that_ends_has_no_text(stops: list[str]) -> None:
    choice = ChoiceOutput(0, BYTES, stops)
    delta = choice.push(SequenceOutput(0, [97, 98, 99], "stop", 99))
    assert (delta.text, delta.token_ids, delta.stop_reason) == ("ab", [97, 98, 99], 99)
    assert choice.num_tokens == 3


def test_held_text_comes_out_at_the_end() -> None:
    deltas = feed(ChoiceOutput(0, BYTES, ["abcd"]), [[97], [98], [99], [EOS]], "stop")
    assert "".join(delta.text for delta in deltas) == "abc"
    assert deltas[-1].stop_reason is None


def test_tokens_after_a_match_are_dropped_with_their_logprobs() -> None:
    choice = ChoiceOutput(0, BYTES, ["b"])
    logprobs = [TokenLogprobs(token_id, -1.0, []) for token_id in (97, 98, 99)]
    delta = choice.push(SequenceOutput(0, [97, 98, 99], None, logprobs=logprobs))
    assert (delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason) == ("a", [97, 98], "stop", "b")
    assert delta.logprobs is not None
    assert [entry.id for entry in delta.logprobs] == [97, 98]
    assert choice.num_tokens == 2


def test_stop_strings_count_after_min_tokens() -> None:
    deltas = feed(ChoiceOutput(0, BYTES, ["b"], min_tokens=2), [list(b"abab")])
    assert "".join(delta.text for delta in deltas) == "aba"
    assert deltas[-1].token_ids == list(b"abab")


@pytest.mark.parametrize("stops", [[], ["zz"]])
def test_ids_beyond_the_vocabulary_have_no_text(stops: list[str]) -> None:
    deltas = feed(ChoiceOutput(0, BYTES, stops), [[97, 300, 98], [301], [99]])
    assert "".join(delta.text for delta in deltas) == "abc"
    assert sum(len(delta.token_ids) for delta in deltas) == 5


def test_logprobs_carry_token_texts() -> None:
    entry = TokenLogprobs(97, -0.5, [(98, -0.7), (0xE2, -0.9)])
    delta = ChoiceOutput(0, BYTES, []).push(SequenceOutput(0, [97], None, logprobs=[entry]))
    assert delta.logprobs is not None
    assert delta.logprobs[0].text == "a"
    assert [(top.id, top.text) for top in delta.logprobs[0].top] == [(98, "b"), (0xE2, "\ufffd")]
