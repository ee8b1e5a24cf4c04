"""Recorded bytes become timed, checked streams, however the network cut them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.recording import Recording, StreamError, read_events, read_stream
from tests.benchmarks.fake_server import HEAD, chunk, chunked, event, native_events


def record(reads: list[bytes], sent_at: float = 10.0) -> Recording:
    """Reads that arrive one second apart, the first one second after the request."""
    return Recording(sent_at, [sent_at + 1 + index for index in range(len(reads))], reads)


def test_each_token_gets_the_time_of_the_read_that_completed_its_event() -> None:
    first, second, last = native_events(2)
    reads = [HEAD, chunk(first), chunk(second)[:9], chunk(second)[9:] + chunk(last), b"0\r\n\r\n"]
    result = read_stream(record(reads), expected_tokens=2)
    assert result.token_times == [12.0, 14.0]
    assert result.finished_at == 14.0
    assert (result.num_tokens, result.prompt_tokens) == (2, 3)


def test_an_event_that_ends_within_a_chunk_is_timed_by_its_own_last_byte() -> None:
    first, second, last = native_events(2)
    both = chunk(first + second)
    cut = both.index(first) + len(first)  # the first read holds exactly the first event
    result = read_stream(record([HEAD + both[:cut], both[cut:], chunk(last) + b"0\r\n\r\n"]), expected_tokens=2)
    assert result.token_times == [11.0, 12.0]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 6))
def test_no_cut_of_the_bytes_changes_the_count(sizes: list[int], num_tokens: int) -> None:
    raw = b"".join(chunked(native_events(num_tokens)))
    reads, start = [], 0
    for size in sizes:
        reads.append(raw[start : start + size])
        start += size
    reads = [read for read in [*reads, raw[start:]] if read]
    result = read_stream(record(reads), expected_tokens=num_tokens)
    assert len(result.token_times) == num_tokens
    assert result.token_times == sorted(result.token_times)
    assert result.token_times[-1] <= result.finished_at


def test_openai_chunks_are_counted_by_their_usage() -> None:
    events = [
        event({"choices": [{"index": 0, "text": "a", "finish_reason": None}], "usage": None}),
        event({"choices": [{"index": 0, "text": "bc", "finish_reason": None}]}),
        event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}),
        event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3,
                                        "prompt_tokens_details": {"cached_tokens": 4}}}),
        b"data: [DONE]\n\n",
    ]  # fmt: skip
    result = read_stream(record(chunked(events)), expected_tokens=3)
    assert result.token_times == [12.0, 13.0]
    assert (result.num_tokens, result.prompt_tokens, result.cached_tokens) == (3, 5, 4)


def test_carriage_returns_comments_and_bodies_without_chunks_are_understood() -> None:
    body = b"".join(native_events(1)).replace(b"\n", b"\r\n")
    raw = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n: ping\r\n\r\n" + body
    assert read_stream(record([raw[:50], raw[50:]]), expected_tokens=1).token_times == [12.0]


def _broken(events: list[bytes]) -> list[bytes]:
    return [HEAD, *map(chunk, events)]


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        ([], "before the response's headers"),
        ([HEAD[:-3]], "before the response's headers"),
        (_broken(native_events(2)), "before its last chunk"),
        ([HEAD, chunk(native_events(2)[0])[:-5]], "inside a chunk"),
        (chunked(native_events(2)[:-1]), r"\[DONE\]"),
        (chunked([]), r"\[DONE\]"),
        (chunked(native_events(3)), "3 tokens"),
        (chunked([*native_events(2)[:1], native_events(2)[-1]]), "1 tokens"),
        (chunked([*native_events(2)[:2], b"data: [DONE]\n\n"]), "no usage"),
        (chunked([native_events(2)[-1]]), "no tokens"),
        (chunked([b'event: error\ndata: {"message": "down"}\n\n', b"data: [DONE]\n\n"]), "down"),
        (chunked([event({"error": {"code": "engine_down"}}), b"data: [DONE]\n\n"]), "engine_down"),
    ],
)
def test_an_incomplete_or_faulty_stream_is_refused(reads: list[bytes], message: str) -> None:
    with pytest.raises(StreamError, match=message):
        read_stream(record(reads), expected_tokens=2)


def test_an_error_status_is_named_with_its_body() -> None:
    raw = b'HTTP/1.1 429 Too Many Requests\r\ncontent-length: 15\r\n\r\n{"error": "full'
    with pytest.raises(StreamError, match=r"status 429.*full"):
        read_events(record([raw]))
