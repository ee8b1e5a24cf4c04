"""Sequence: its limits and stop rules."""

from __future__ import annotations

import pytest

from model.sampling_params import SamplingParams
from server.engine.sequence import InvalidSequenceError, Sequence, SequenceStatus

EOS = 9


def make(prompt: list[int], params: SamplingParams | None = None, max_model_len: int = 32) -> Sequence:
    return Sequence(1, prompt, params or SamplingParams(), (EOS, 10), max_model_len, 0.5, None)


def stop_after(seq: Sequence, token_id: int) -> str | None:
    seq.token_ids.append(token_id)
    return seq.check_stop()


def test_counts_follow_the_token_list() -> None:
    prompt = [1, 2, 3]
    seq = make(prompt)
    seq.token_ids += [4, 5]
    assert (seq.num_prompt_tokens, seq.num_tokens, seq.num_output_tokens) == (3, 5, 2)
    assert seq.output_token_ids == [4, 5]
    assert prompt == [1, 2, 3], "the caller's list is not the sequence's"
    assert seq.status is SequenceStatus.WAITING
    assert not seq.is_finished


@pytest.mark.parametrize("eos", [EOS, 10])
def test_eos_stops_without_a_stop_token(eos: int) -> None:
    seq = make([1])
    assert stop_after(seq, 5) is None
    assert stop_after(seq, eos) == "stop"
    assert seq.stop_token_id is None


def test_stop_token_is_named() -> None:
    seq = make([1], SamplingParams(stop_token_ids=(7, 8)))
    assert stop_after(seq, 8) == "stop"
    assert seq.stop_token_id == 8


def test_ignore_eos_leaves_explicit_stop_tokens_in_force() -> None:
    seq = make([1], SamplingParams(ignore_eos=True, stop_token_ids=(10,)))
    assert stop_after(seq, EOS) is None
    assert stop_after(seq, 10) == "stop"
    assert seq.stop_token_id == 10


def test_eos_wins_over_the_same_id_as_a_stop_token() -> None:
    seq = make([1], SamplingParams(stop_token_ids=(EOS,)))
    assert stop_after(seq, EOS) == "stop"
    assert seq.stop_token_id is None


def test_length_by_max_tokens() -> None:
    seq = make([1, 2], SamplingParams(max_tokens=2))
    assert [stop_after(seq, 5), stop_after(seq, 5)] == [None, "length"]


def test_length_by_the_context() -> None:
    seq = make([1, 2], SamplingParams(max_tokens=100), max_model_len=4)
    assert [stop_after(seq, 5), stop_after(seq, 5)] == [None, "length"]


def test_a_stop_on_the_last_allowed_token_is_a_stop() -> None:
    assert stop_after(make([1], SamplingParams(max_tokens=1)), EOS) == "stop"


def test_a_token_of_the_prompt_never_stops() -> None:
    seq = make([EOS, EOS])
    assert stop_after(seq, 5) is None


def test_prompt_must_hold_a_token_and_leave_room_for_one() -> None:
    with pytest.raises(InvalidSequenceError, match="at least one token"):
        make([])
    with pytest.raises(InvalidSequenceError, match=r"4 tokens.*context of 4"):
        make([1, 2, 3, 4], max_model_len=4)
    assert make([1, 2, 3], max_model_len=4).max_num_tokens == 4


def test_repr_says_where_it_stands() -> None:
    assert repr(make([1, 2])) == "Sequence(1, waiting, prompt=2, tokens=2, computed=0)"
