"""From the recorded bytes of an HTTP response to timed server-sent events, after the run.

A load generator that parses while it measures takes processor time from the server that it measures. Here the
client only keeps each read with its time; everything else happens when the clock has stopped.
Formats: HTTP/1.1 chunked coding (RFC 9112 §7.1), server-sent events (WHATWG HTML §9.2).
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate

HEADER_END = b"\r\n\r\n"


class StreamError(Exception):
    """A response that is not the complete stream that was asked for."""


@dataclass(slots=True)
class Recording:
    """One exchange as the client saw it. `sent_at` and the read times are `perf_counter()` seconds."""

    sent_at: float = 0.0
    times: list[float] = field(default_factory=list)
    reads: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event: the time at which its last byte had arrived, its type and its data."""

    at: float
    kind: str
    data: str


@dataclass(frozen=True, slots=True)
class StreamResult:
    """What one stream delivered. `token_times` has an entry per event that brought tokens."""

    sent_at: float
    token_times: list[float]
    finished_at: float
    num_tokens: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class ResponseHead:
    status: int
    headers: dict[str, str]
    body_start: int

    @property
    def chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower() == "chunked"


def parse_head(raw: bytes) -> ResponseHead:
    end = raw.find(HEADER_END)
    if end < 0:
        raise StreamError("the connection ended before the response's headers did")
    status_line, *lines = raw[:end].decode("latin-1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines)
    headers = {name.strip().lower(): value.strip() for name, value in pairs}
    return ResponseHead(int(status_line.split(" ", 2)[1]), headers, end + len(HEADER_END))


def dechunk(raw: bytes, start: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Undo the chunked coding of `raw[start:]`.

    Returns the body and, per chunk, (end in the body, offset in `raw` of the chunk's last byte).
    Raises StreamError if the last chunk is missing.
    """
    body: list[bytes] = []
    ends: list[tuple[int, int]] = []
    length = 0
    while True:
        line_end = raw.find(b"\r\n", start)
        if line_end < 0:
            raise StreamError("the stream broke off before its last chunk")
        size = int(raw[start:line_end].split(b";", 1)[0], 16)
        data_end = line_end + 2 + size
        if size == 0:
            return b"".join(body), ends
        if data_end > len(raw):
            raise StreamError("the stream broke off inside a chunk")
        body.append(raw[line_end + 2 : data_end])
        length += size
        ends.append((length, data_end - 1))
        start = data_end + 2


def read_events(recording: Recording) -> list[Event]:
    """The events of a recorded response. Raises StreamError for another status than 200 or a broken stream."""
    raw = b"".join(recording.reads)
    head = parse_head(raw)
    if head.chunked:
        body, ends = dechunk(raw, head.body_start)
    else:
        body, ends = raw[head.body_start :], [(len(raw) - head.body_start, len(raw) - 1)]
    if head.status != 200:
        raise StreamError(f"status {head.status}: {body[:500].decode(errors='replace')}")
    return _split_events(body, head, ends, recording)


def _split_events(body: bytes, head: ResponseHead, ends: list[tuple[int, int]], recording: Recording) -> list[Event]:
    read_ends = list(accumulate(len(read) for read in recording.reads))
    chunk_ends = [end for end, _ in ends]
    events: list[Event] = []
    start = 0
    separator = b"\r\n\r\n" if b"\r\n\r\n" in body else b"\n\n"
    while (found := body.find(separator, start)) >= 0:
        stop = found + len(separator)
        if head.chunked:
            chunk = bisect_left(chunk_ends, stop)
            raw_offset = ends[chunk][1] - (chunk_ends[chunk] - stop)
        else:
            raw_offset = head.body_start + stop - 1
        at = recording.times[bisect_left(read_ends, raw_offset + 1)]
        event = _parse_event(body[start:found].decode(), at)
        if event is not None:
            events.append(event)
        start = stop
    return events


def _parse_event(block: str, at: float) -> Event | None:
    kind = "message"
    data: list[str] = []
    for line in block.splitlines():
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            kind = value
        elif name == "data":
            data.append(value)
    return Event(at, kind, "\n".join(data)) if data else None


def read_stream(recording: Recording, expected_tokens: int) -> StreamResult:
    """Check one recorded stream and time its tokens.

    Understands our `/generate` events (which carry `token_ids`) and OpenAI's completion chunks (which do not;
    there the final `usage` counts the tokens). Raises StreamError unless the stream ended with [DONE], no event
    was an error, and exactly `expected_tokens` tokens came.
    """
    events = read_events(recording)
    if not events or events[-1].data != "[DONE]":
        raise StreamError("the stream did not end with [DONE]")
    token_times: list[float] = []
    counted = 0
    usage: dict[str, object] | None = None
    for event in events[:-1]:
        payload = json.loads(event.data)
        if event.kind == "error" or "error" in payload:
            raise StreamError(f"the stream carried an error: {event.data[:500]}")
        tokens = _count_tokens(payload)
        if tokens is None or tokens > 0:
            token_times.append(event.at)
        counted += tokens or 0
        usage = payload.get("usage") or usage
    if usage is None:
        raise StreamError("the stream carried no usage")
    completion_tokens = _integer(usage, "completion_tokens")
    if completion_tokens != expected_tokens or (counted and counted != expected_tokens):
        raise StreamError(
            f"the stream brought {counted or completion_tokens} tokens (usage says {completion_tokens}), "
            f"not the {expected_tokens} asked for"
        )
    if not token_times:
        raise StreamError("the stream carried no tokens")
    return StreamResult(
        sent_at=recording.sent_at,
        token_times=token_times,
        finished_at=events[-1].at,
        num_tokens=completion_tokens,
        prompt_tokens=_integer(usage, "prompt_tokens"),
        cached_tokens=_cached_tokens(usage),
    )


def _count_tokens(payload: dict[str, object]) -> int | None:
    """Tokens in one event; None when the format does not say (an OpenAI chunk with text)."""
    choices = payload.get("choices")
    if not isinstance(choices, list) or not choices:
        return 0
    choice = choices[0]
    token_ids = choice.get("token_ids")
    if isinstance(token_ids, list):
        return len(token_ids)
    return None if choice.get("text") else 0


def _integer(usage: dict[str, object], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0


def _cached_tokens(usage: dict[str, object]) -> int:
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        return _integer(details, "cached_tokens")
    return _integer(usage, "cached_tokens")
