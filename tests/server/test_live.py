"""Over real sockets: streaming, clients that leave, stall or dawdle, and the connection's own limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.sse import DONE, EventSender, Heartbeat
from tests.server.fake_engine import FakeEngine, Plan, says
from tests.server.live import LiveServer, read_all, wait_until


def post(body: dict[str, object], *, headers: str = "") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(FakeEngine(), request_timeout=0.6, max_connections=20, ping_interval=0.2) as server:
        yield server


@pytest.fixture(autouse=True)
def _reset(server: LiveServer) -> Iterator[None]:
    server.engine.script = says("hello world")
    yield
    server.in_loop(server.engine.open_gate)
    wait_until(lambda: not server.engine.live)


def test_events_arrive_as_they_are_made(server: LiveServer) -> None:
    server.engine.script = says("abc", delay=0.1)
    times = []
    with httpx.stream("POST", f"{server.url}/generate", json={"prompt": "p", "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
    assert len(times) == 4
    assert times[1] - times[0] > 0.05
    assert times[2] - times[1] > 0.05


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_sequences(server: LiveServer, stream: bool) -> None:
    server.engine.script = says("a" * 100, delay=0.02)
    before = len(server.engine.submitted)
    with server.connect() as sock:
        sock.sendall(post({"prompt": "p", "n": 3, "stream": stream, "max_tokens": 100}))
        wait_until(lambda: len(server.engine.submitted) == before + 3)
    assert wait_until(lambda: not server.engine.live) < 1.0
    assert all(stream.aborted for stream in server.engine.submitted[before:])
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_client_that_leaves_while_queued(server: LiveServer) -> None:
    server.in_loop(server.engine.close_gate)
    with server.connect() as sock:
        sock.sendall(post({"prompt": "p", "stream": True}))
        wait_until(lambda: server.engine.live)
    assert wait_until(lambda: not server.engine.live) < 1.0


def test_silence_is_filled_with_pings(server: LiveServer) -> None:
    server.in_loop(server.engine.close_gate)
    with httpx.stream("POST", f"{server.url}/generate", json={"prompt": "p", "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines) == ": ping"
        server.in_loop(server.engine.open_gate)
        data = [line for line in lines if line.startswith("data: ")]
    assert data[-1] == "data: [DONE]"
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in data[:-2]) == "hello world"


def test_no_ping_follows_the_end_of_a_stream() -> None:
    async def scenario() -> None:
        sent: list[bytes] = []
        room = asyncio.Event()

        async def send(message: Any) -> None:
            await room.wait()
            sent.append(message["body"])

        sender, heartbeat = EventSender({}, send), Heartbeat(ping_interval=0.02, write_timeout=9)
        heartbeat.add(sender)
        ending = asyncio.create_task(sender.end(DONE))
        await asyncio.sleep(0.1)  # several pings' time, in which the client reads nothing
        room.set()
        await ending
        await asyncio.sleep(0.05)
        heartbeat.remove(sender)
        assert sent == [DONE]

    asyncio.run(scenario())


def test_a_fault_after_the_first_byte_is_an_error_event(server: LiveServer) -> None:
    server.engine.script = lambda prompt, params: Plan([[97], [98], [99]], fail_after=2)
    text = httpx.post(f"{server.url}/generate", json={"prompt": "p", "stream": True, "n": 2}).text
    blocks = text.rstrip("\n").split("\n\n")
    kind, data = blocks[-1].split("\n")
    assert kind == "event: error"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert error["code"] == "request_failed"
    assert "[DONE]" not in text
    assert text.count("event: error") == 1


def test_http_1_0_and_connection_close(server: LiveServer) -> None:
    content = b'{"prompt": "p"}'
    head = b"POST /generate HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.connect() as sock:
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        assert b"hello world" in read_all(sock)


def test_keep_alive_serves_the_next_request(server: LiveServer) -> None:
    with httpx.Client() as client:
        for _ in range(3):
            assert client.post(f"{server.url}/generate", json={"prompt": "p"}).status_code == 200
            assert client.post(f"{server.url}/generate", content=b"{", headers={}).status_code == 422


@pytest.mark.parametrize(
    "start",
    [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: loc", post({"prompt": "p"})[:-3]],
    ids=["silent", "request line", "headers", "body"],
)
def test_a_request_has_a_deadline_to_arrive(server: LiveServer, start: bytes) -> None:
    with server.connect() as sock:
        sock.sendall(start)
        begun = time.monotonic()
        answer = read_all(sock)
        assert time.monotonic() - begun < 2.0
    assert answer.startswith(b"HTTP/1.1 408 ") if start else answer == b""


def test_dripping_bytes_do_not_extend_the_deadline(server: LiveServer) -> None:
    begun = time.monotonic()
    with server.connect() as sock:
        sock.setblocking(False)
        while not _is_closed(sock):
            assert time.monotonic() - begun < 3.0
            sock.send(b"X")
            time.sleep(0.05)


def _is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(65_536) is not None
    except BlockingIOError:
        return False


def test_a_pipelined_request_has_a_deadline_too(server: LiveServer) -> None:
    with server.connect() as sock:
        sock.sendall(post({"prompt": "p"}) + post({"prompt": "p"})[:-3])
        begun = time.monotonic()
        answers = read_all(sock)
        assert time.monotonic() - begun < 2.5
    assert answers.count(b"HTTP/1.1 200 ") == 1
    assert answers.count(b"HTTP/1.1 408 ") == 1


def test_pipelined_requests_wait_for_a_long_answer(server: LiveServer) -> None:
    server.engine.script = says("a" * 8, delay=0.1)
    with server.connect() as sock:
        sock.sendall(post({"prompt": "p"}) + post({"prompt": "p"}, headers="Connection: close\r\n"))
        assert read_all(sock).count(b"HTTP/1.1 200 ") == 2


def test_a_client_that_leaves_with_requests_in_its_pipeline(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.script = says("a" * 100, delay=0.02)
    before = len(server.engine.submitted)
    with server.connect() as sock:
        body = {"prompt": "p", "n": 3, "stream": True, "max_tokens": 100}
        sock.sendall(post(body) * 3)
        wait_until(lambda: len(server.engine.submitted) == before + 3)
        # Data that the client has not read makes its close a reset.
        time.sleep(0.1)
    assert wait_until(lambda: not server.engine.live) < 1.0
    assert len(server.engine.submitted) == before + 3
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_what_follows_a_stream_cannot_garble_it(server: LiveServer) -> None:
    server.engine.script = says("a" * 20, delay=0.02)
    with server.connect() as sock:
        sock.sendall(post({"prompt": "p", "stream": True, "max_tokens": 20}) * 2)
        start = sock.recv(65_536)
        sock.sendall(b"nonsense\r\n\r\n")
        answer = start + read_all(sock)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 400 " not in answer.partition(b"[DONE]")[0]


def test_headers_cannot_grow_behind_a_stream(server: LiveServer) -> None:
    server.engine.script = says("a" * 100, delay=0.05)
    with server.connect() as sock:
        sock.sendall(post({"prompt": "p", "stream": True}))
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
        with contextlib.suppress(OSError):
            sock.sendall(b"GET / HTTP/1.1\r\nX-Big: " + b"a" * 400_000)
        read_all(sock)
    assert wait_until(lambda: not server.engine.live) < 1.0


def test_a_long_answer_outlives_the_deadline_to_arrive(server: LiveServer) -> None:
    server.engine.script = says("a" * 10, delay=0.1)
    assert httpx.post(f"{server.url}/generate", json={"prompt": "p"}).json()["choices"][0]["text"] == "a" * 10


def test_chunked_body_over_the_limit(server: LiveServer) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    headers = {"content-type": "application/json"}
    assert httpx.post(f"{server.url}/generate", content=chunks(), headers=headers).status_code == 413


def test_declared_body_over_the_limit_is_not_awaited(server: LiveServer) -> None:
    with server.connect() as sock:
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {2 << 30}\r\n\r\n".encode())
        assert sock.recv(65_536).startswith(b"HTTP/1.1 413 ")
        assert read_all(sock) == b""


@pytest.mark.parametrize(
    "head",
    [b"X-Big: " + b"a" * 40_000, b"X-Big: " + b"a" * 4_000_000, b"\r\n".join(b"X-%d: a" % i for i in range(9_000))],
    ids=["one", "huge", "many"],
)
def test_large_headers_are_refused(server: LiveServer, head: bytes) -> None:
    with server.connect() as sock:
        try:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n")
            answer = read_all(sock)
        except OSError:
            return
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
    assert len(answer) <= 4096


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x16\x03\x01\x00\xa5", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
     b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"],
    ids=["tls", "bare", "version", "connect", "length", "smuggling"],
)  # fmt: skip
def test_what_is_not_http_gets_a_400(server: LiveServer, request_bytes: bytes) -> None:
    with server.connect() as sock:
        sock.sendall(request_bytes)
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"Traceback" not in answer


def test_a_wish_to_upgrade_is_ignored(server: LiveServer) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert sock.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_connections_are_capped(server: LiveServer) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(server.connect()) for _ in range(21)]
        answer = socks[-1].recv(65_536)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
    wait_until(lambda: _is_up(server))


def _is_up(server: LiveServer) -> bool:
    try:
        return httpx.get(f"{server.url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_client_that_does_not_read_is_cut() -> None:
    engine = FakeEngine(lambda prompt, params: Plan([[97] * 200] * 20_000), max_model_len=10**7)
    with (
        LiveServer(engine, write_timeout=0.4, request_timeout=5) as server,
        server.connect(receive_buffer=4096) as sock,
    ):
        sock.sendall(post({"prompt": "p", "stream": True, "max_tokens": 9_000_000}))
        wait_until(lambda: engine.submitted)
        wait_until(lambda: server.app.state.services.lifecycle.num_active == 0, seconds=8)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert not engine.live
