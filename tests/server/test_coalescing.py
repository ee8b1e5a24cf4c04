"""Streams coalesce by themselves: a token goes out at once while the loop is idle, and what has gathered while the loop
or the client was busy goes out together, at the first moment at which it can."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sampling_params import SamplingParams
from server.engine.channel import frame
from server.engine.client import AsyncEngine, EngineStream
from server.engine.config import EngineConfig
from server.engine.messages import EngineStats, RequestTimings, SequenceOutput, StepOutput
from tests.server.clients import read_events
from tests.server.fake_engine import FakeEngine, says
from tests.server.fake_engine import fake_info as info
from tests.server.live import LiveServer, read_all, wait_until

MOST_LATE = 0.05
_encode = msgspec.msgpack.Encoder().encode


class Feed:
    """An AsyncEngine without a process: what it hears is written here."""

    def __init__(self) -> None:
        self.engine = AsyncEngine(EngineConfig("folder", "test"), 100)
        self.engine.data_received(frame(_encode(info(64, 257))))

    def step(self, stream: EngineStream, token: int, *, last: bool = False, first: bool = False) -> bytes:
        timings = RequestTimings(1.0, 2.0, 3.0, 0.0, 0) if first else None
        output = SequenceOutput(stream.request_id, [token], "length" if last else None, timings=timings)
        return frame(_encode(StepOutput([output], EngineStats())))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(["idle", "loop busy", "client busy"])), min_size=1,
                max_size=12), st.integers(0, 99))  # fmt: skip
def test_tokens_wait_for_nothing_but_the_loop_and_the_client(bursts: list[tuple[int, str]], seed: int) -> None:
    """While the loop is idle each token is one event; what comes while the loop or the client is busy is one event,
    sent once both are free. In order, each once, whatever the socket cuts the bytes into."""

    async def run() -> None:
        feed = Feed()
        stream = feed.engine.submit([1], SamplingParams())
        events: list[tuple[float, list[int], RequestTimings | None]] = []
        free = asyncio.Event()
        free.set()

        async def consume() -> None:
            async for output in stream:
                events.append((time.monotonic(), output.token_ids, output.timings))
                await free.wait()

        consumer = asyncio.create_task(consume())
        await asyncio.sleep(0)
        sent: list[int] = []
        num_expected = 0
        for count, manner in bursts:
            if manner == "client busy":
                # The client takes one more event, then reads no further until the rest has come.
                free.clear()
                deliver(feed, stream, sent)
                await settle()
            steps = b"".join(next_step(feed, stream, sent) for _ in range(count))
            if manner == "idle":
                for message in split_frames(steps):
                    feed.engine.data_received(message)
                    await settle()
                num_expected += count
            else:
                for part in cut(steps, seed):
                    feed.engine.data_received(part)
                num_expected += 1 + (manner == "client busy")
            ready = time.monotonic()
            free.set()
            await settle()
            assert [token for _, tokens, _ in events for token in tokens] == sent
            assert len(events) == num_expected
            assert events[-1][0] - ready < MOST_LATE
        timings = [each for _, _, each in events if each is not None]
        assert timings == [RequestTimings(1.0, 2.0, 3.0, 0.0, 0)]
        consumer.cancel()

    asyncio.run(run())


def next_step(feed: Feed, stream: EngineStream, sent: list[int]) -> bytes:
    sent.append(len(sent))
    return feed.step(stream, sent[-1], first=len(sent) == 1)


def deliver(feed: Feed, stream: EngineStream, sent: list[int]) -> None:
    feed.engine.data_received(next_step(feed, stream, sent))


def split_frames(data: bytes) -> list[bytes]:
    """The messages one by one: a frame begins with its length."""
    parts = []
    while data:
        size = 4 + int.from_bytes(data[:4], "little")
        parts.append(data[:size])
        data = data[size:]
    return parts


def cut(data: bytes, seed: int) -> list[bytes]:
    drawn = random.Random(seed)
    places = sorted(drawn.sample(range(len(data) + 1), 2))
    return [data[: places[0]], data[places[0] : places[1]], data[places[1] :]]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_loop_that_stalls_delivers_all_at_its_next_turn() -> None:
    """Tokens come every 2 ms through a socket; the loop is blocked for 30 ms, again and again. No token waits longer
    than the stall that it fell into and MOST_LATE."""

    async def run() -> tuple[list[float], int]:
        feed = Feed()
        stream = feed.engine.submit([1], SamplingParams())
        late: list[float] = []
        born: list[float] = []
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(reader, lambda: feed.engine.data_received(reader.recv(65_536)))
        num_events = 0

        def produce() -> None:
            for token in range(100):
                born.append(time.monotonic())
                writer.sendall(feed.step(stream, token, last=token == 99))
                time.sleep(0.002)

        def stall() -> None:
            time.sleep(0.03)
            loop.call_later(0.01, stall)

        producing = asyncio.create_task(asyncio.to_thread(produce))
        loop.call_later(0.02, stall)
        async for output in stream:
            now = time.monotonic()
            num_events += 1
            late += [now - born[token] for token in output.token_ids]
        await producing
        loop.remove_reader(reader)
        reader.close()
        writer.close()
        return late, num_events

    late, num_events = asyncio.run(run())
    assert len(late) == 100
    assert max(late) < 0.03 + MOST_LATE
    assert num_events < 60, "what came during a stall came together"


def test_a_client_that_reads_slowly_gets_fewer_and_larger_events() -> None:
    """Over HTTP: it loses nothing, nobody waits for it, and the server holds little back for it."""
    count = 12_000
    engine = FakeEngine(says("x" * count, delay=0.0), max_model_len=count + 10)
    body = json.dumps({"prompt": "p", "stream": True, "max_tokens": count, "logprobs": 5}).encode()
    head = (
        b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
        + b"content-length: %d\r\n\r\n" % len(body)
    )
    with LiveServer(engine, write_timeout=60.0) as server, server.connect(receive_buffer=4096) as sock:
        sock.sendall(head + body)
        wait_until(lambda: engine.submitted)
        wait_until(lambda: not engine.live, seconds=20)
        raw = read_all(sock)
    _, _, chunks = raw.partition(b"\r\n\r\n")
    events = [json.loads(data) for _, data in read_events(unchunked(chunks)) if data != "[DONE]"]
    deltas = [event["choices"][0] for event in events if event["choices"]]
    assert "".join(delta["text"] for delta in deltas) == "x" * count
    sizes = [len(delta["token_ids"]) for delta in deltas]
    assert sum(sizes) == count
    assert sizes[0] == 1
    early = next(index for index, size in enumerate(sizes) if size > 1)
    assert early < count / 10, "only so much lies in buffers, event by event"
    assert max(sizes) > count / 2, "what gathered while nothing was read is one event"


def unchunked(data: bytes) -> str:
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        parts.append(data[:length])
        data = data[length + 2 :]
    return b"".join(parts).decode()
