"""The life of a real server and its engine: loading, overload, drain, a stalled and a killed engine, wrong folders.

The model is a parrot: what it says is known byte by byte, and a full answer takes it seconds.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.clients import Answer, ask, ask_all, ask_one, open_client, read_answer
from tests.server.live import wait_until
from tests.server.real import PATIENCE, RealServer, running, save_parrot

PHRASE = "नमस्ते दुनिया 🦜👩‍👩‍👧 żółw é\u0301 中文 "
SIZE = len(PHRASE.encode())
CONTEXT = 2048
# A prompt of one token is at position 0, so that the answer starts at the phrase's first byte.
SAY: dict[str, Any] = {"prompt": "p", "temperature": 0.0}
WHOLE: dict[str, Any] = SAY | {"max_tokens": None}
MAX_QUEUED = 4
MAX_NUM_SEQS = 2


def said(num_tokens: int) -> str:
    """The first tokens of the endless phrase; a cut character at the end becomes U+FFFD."""
    return (PHRASE.encode() * (num_tokens // SIZE + 1))[:num_tokens].decode("utf-8", "replace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_parrot(tmp_path_factory.mktemp("real") / "parrot", PHRASE, context=CONTEXT)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RealServer]:
    options = ("--max-num-seqs", str(MAX_NUM_SEQS), "--max-queued-requests", str(MAX_QUEUED), "--num-threads", "1")
    options += ("--no-speculation",)  # the model says one sentence over and over: with guesses its streams end too soon
    with running(folder, *options) as server:
        server.wait_ready()
        yield server


class Stream(threading.Thread):
    """A request in the background. `started` is set by the answer's first bytes."""

    def __init__(self, server: RealServer, **body: Any) -> None:
        super().__init__(daemon=True)
        self._url, self._body = f"{server.url}/generate", body
        self.started = threading.Event()
        self.answer: Answer | None = None
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=PATIENCE) as response:
            parts = []
            for part in response.iter_bytes():
                self.started.set()
                parts.append(part)
            content = b"".join(parts)
            whole = httpx.Response(response.status_code, headers=response.headers, content=content)
            self.answer = read_answer(whole, self._body.get("n", 1))

    def result(self) -> Answer:
        self.join(PATIENCE)
        assert self.answer is not None
        return self.answer


def test_streams_never_hold_half_a_character(server: RealServer) -> None:
    for count in (SIZE, 5 * SIZE):
        answer = ask_one(server.url, **SAY, max_tokens=count, stream=True)
        assert answer.only.text == said(count) == PHRASE * (count // SIZE)
        assert "\ufffd" not in "".join(data for _, data in answer.events)
        assert ask_one(server.url, **SAY, max_tokens=count).only.text == answer.only.text
    cut = ask_one(server.url, **SAY, max_tokens=SIZE + 4, stream=True)
    assert cut.only.text == PHRASE + "न\ufffd"


@pytest.mark.parametrize("stop", ["🦜", "दुनिया", "\u200d👧", "ó", "\u0301", "中文 न", " "])
def test_stop_strings_of_many_bytes(server: RealServer, stop: str) -> None:
    answer = ask_one(server.url, **SAY, max_tokens=2 * SIZE, stop=["🦜🦜", stop], stream=True)
    text, _, _ = (PHRASE * 2).partition(stop)
    assert (answer.only.text, answer.only.finish_reason, answer.only.stop_reason) == (text, "stop", stop)
    assert bytes(answer.only.token_ids) == (text + stop).encode()


def test_overload_is_refused_and_what_was_accepted_finishes(server: RealServer) -> None:
    refused_before = server.metric("vllm:admission_rejections_total", reason="queue_full")
    answers = ask_all(server.url, [SAY | {"max_tokens": 400 + i, "stream": i % 2 == 0} for i in range(30)])
    accepted = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status != 200]
    assert len(accepted) >= MAX_NUM_SEQS + MAX_QUEUED
    assert len(refused) > 0
    for answer in accepted:
        assert answer.only.text == said(len(answer.only.token_ids))
        assert answer.only.finish_reason == "length"
    for answer in refused:
        assert (answer.status, answer.code) == (429, "queue_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert server.metric("vllm:admission_rejections_total", reason="queue_full") - refused_before == len(refused)
    assert ask_one(server.url, **SAY, max_tokens=SIZE).only.text == PHRASE
    never = ask_one(server.url, **SAY, n=MAX_NUM_SEQS + MAX_QUEUED + 1)
    assert (never.status, never.body["error"]["param"]) == (422, "n")
    most = ask_one(server.url, **SAY, max_tokens=SIZE, n=MAX_NUM_SEQS + MAX_QUEUED)
    assert [choice.text for choice in most.choices] == [PHRASE] * (MAX_NUM_SEQS + MAX_QUEUED)


def test_a_deadline_that_passes_in_the_queue(server: RealServer) -> None:
    """The seats are taken for seconds, so that the last request never gets one in time."""

    async def scenario() -> Answer:
        async with open_client(server.url) as client:
            busy = [asyncio.create_task(ask(client, WHOLE | {"stream": True})) for _ in range(MAX_NUM_SEQS)]
            await asyncio.to_thread(server.wait_used, "vllm:num_requests_running", MAX_NUM_SEQS)
            hurried = await ask(client, SAY | {"deadline_ms": 100})
            assert not any(task.done() for task in busy)
            for task in busy:
                task.cancel()
            return hurried

    hurried = asyncio.run(scenario())
    if hurried.status == 429:  # by what the requests before it met, it cannot start in time
        assert hurried.code == "deadline_unreachable"
        assert int(hurried.headers["retry-after"]) >= 1
    else:
        assert (hurried.only.finish_reason, hurried.only.text) == ("deadline", "")
    server.wait_idle()
    for answer in (ask_one(server.url, **WHOLE, deadline_ms=1) for _ in range(5)):
        if answer.status == 429:
            assert answer.code == "deadline_unreachable"
        else:
            assert answer.only.finish_reason == "deadline"


def test_sigterm_refuses_at_once_and_lets_streams_finish(server: RealServer) -> None:
    """Ends the module's server, so it stands last of those that use it."""
    body = SAY | {"max_tokens": 1500}
    streams = [Stream(server, **body, stream=True) for _ in range(MAX_NUM_SEQS)]
    assert all(stream.started.wait(PATIENCE) for stream in streams)
    whole = Stream(server, **body)
    wait_until(lambda: server.metric("vllm:num_requests_waiting") == 1)
    server.terminate()
    assert wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503) < 1.0
    assert any(stream.is_alive() for stream in streams)
    refused = ask_one(server.url, **SAY)
    assert (refused.status, refused.code) == (503, "draining")
    assert int(refused.headers["retry-after"]) >= 1
    assert httpx.get(f"{server.url}/health").status_code == 200
    for stream in [*streams, whole]:
        answer = stream.result()
        assert (answer.status, answer.only.finish_reason) == (200, "length")
        assert answer.only.text == said(1500)
    assert server.wait() == 0
    assert "Traceback" not in server.log


def test_loading_then_a_stalled_then_a_killed_engine(folder: Path) -> None:
    with running(folder, "--health-timeout", "1") as server:
        engine = server.engine
        engine.suspend()  # it loads for as long as the test wants
        server.wait_listening()
        for path in ("/health", "/ready", "/info"):
            response = httpx.get(server.url + path, timeout=PATIENCE)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
            assert int(response.headers["retry-after"]) >= 1
        early = ask_one(server.url, **SAY)
        assert (early.status, early.code) == (503, "loading")
        assert server.metric("quill:engine_up") == 0
        engine.resume()
        server.wait_ready()
        assert httpx.get(f"{server.url}/ready").status_code == 200

        stream, whole = Stream(server, **WHOLE, stream=True), Stream(server, **WHOLE)
        assert stream.started.wait(PATIENCE)
        engine.suspend()
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        stalled = ask_one(server.url, **SAY)
        assert (stalled.status, stalled.code) == (503, "engine_down")
        engine.resume()
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)

        begun = time.monotonic()
        engine.send_signal(signal.SIGKILL)
        broken = stream.result()
        assert broken.events[-1][0] == "error"
        assert broken.code == "engine_down"
        assert said(CONTEXT).startswith(broken.only.text)
        assert broken.only.finish_reason is None
        assert (whole.result().status, whole.result().code) == (503, "engine_down")
        assert time.monotonic() - begun < 2.0
        assert server.wait() == 1
        assert "Traceback" not in server.log


def test_sigterm_while_loading(folder: Path) -> None:
    with running(folder) as server:
        engine = server.engine
        server.wait_listening()
        httpx.get(f"{server.url}/health", timeout=PATIENCE)
        server.terminate()
        assert server.wait() == 0
        assert not engine.is_running()
