"""The load generator against a small streaming server: right requests, right counts, loud failures."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.http_client import LoadGenerator, Target, TargetError
from benchmarks.recording import StreamResult
from tests.benchmarks.fake_server import Answer, FakeServer, chunked, fake_server, native_events, stream_of


@contextmanager
def server_thread(answer: Answer = stream_of, pause: float = 0.0) -> Iterator[FakeServer]:
    """The server on a loop of its own, so that the benchmark can run its own loop here."""
    ready: list[FakeServer] = []
    started = threading.Event()
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def run() -> None:
        async with fake_server(answer, pause) as fake:
            stop.append((asyncio.get_running_loop(), asyncio.Event()))
            ready.append(fake)
            started.set()
            await stop[0][1].wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert started.wait(10)
    try:
        yield ready[0]
    finally:
        stop[0][0].call_soon_threadsafe(stop[0][1].set)
        thread.join(10)


def run_benchmark(fake: FakeServer, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    arguments = ["--url", fake.url, "--prompt-len", "5", "--output-len", "12", *options]
    assert serving.main(arguments) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    return json.loads(line)


@pytest.mark.parametrize("mode", [("--mode", "closed"), ("--mode", "waves"), ("--mode", "poisson", "--rate", "500")])
def test_every_mode_measures_every_request(mode: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with server_thread() as fake:
        figures = run_benchmark(fake, capsys, "--clients", "3", "--requests", "9", *mode)
    timed = fake.bodies[3:]
    assert (figures["requests"], figures["output_tokens"], figures["prompt_tokens"]) == (9, 108, 45)
    assert figures["output_tokens_per_second"] == pytest.approx(108 / figures["seconds"])
    assert [body["max_tokens"] for body in fake.bodies] == [8] * 3 + [12] * 9
    assert all(body["stream"] and body["ignore_eos"] and body["temperature"] == 0 for body in timed)
    assert len({tuple(body["prompt"]) for body in fake.bodies}) == 12
    assert set(figures["ttft_ms"]) == {"mean", "p50", "p99"}


def test_closed_loop_keeps_its_connections(capsys: pytest.CaptureFixture[str]) -> None:
    with server_thread() as fake:
        run_benchmark(fake, capsys, "--clients", "2", "--requests", "8")
    assert fake.num_connections == 2


def test_latencies_are_those_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with server_thread(pause=0.01) as fake:
        figures = run_benchmark(fake, capsys, "--clients", "1", "--requests", "1")
    # The server waits 10 ms after each write: after the headers, then after each of twelve tokens.
    assert 10 <= figures["ttft_ms"]["p50"] <= figures["e2e_ms"]["p50"]
    assert figures["e2e_ms"]["p50"] >= 120


def test_openai_urls_get_openai_bodies_and_extra_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with server_thread() as fake:
        fake.url = fake.url.replace("/generate", "/v1/completions")
        run_benchmark(
            fake, capsys, "--clients", "1", "--requests", "1", "--model", "m", "--extra-body", '{"ignore_eos": false}'
        )
    body = fake.bodies[-1]
    assert body["stream_options"] == {"include_usage": True}
    assert (body["model"], body["ignore_eos"]) == ("m", False)


def _short(body: dict[str, Any]) -> list[bytes]:
    return chunked(native_events(body["max_tokens"] - 1))


def _refused(body: dict[str, Any]) -> list[bytes]:
    return [b"HTTP/1.1 422 Unprocessable\r\ncontent-length: 7\r\n\r\n", b"no, sir"]


def _hangs_up(body: dict[str, Any]) -> list[bytes]:
    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    return [head, *stream_of(body)[1:3]]


@pytest.mark.parametrize(
    ("answer", "message"), [(_short, "7 tokens"), (_refused, "status 422: no, sir"), (_hangs_up, "last chunk")]
)
@pytest.mark.parametrize("mode", [("--mode", "closed"), ("--mode", "poisson", "--rate", "500")])
def test_a_stream_that_is_not_whole_fails_the_run(
    answer: Answer, message: str, mode: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with server_thread(answer) as fake:
        assert serving.main(["--url", fake.url, "--clients", "2", "--requests", "2", *mode]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_silent_server_fails_the_run_in_poisson_mode_too(capsys: pytest.CaptureFixture[str]) -> None:
    with server_thread(lambda body: [stream_of(body)[0]]) as fake:
        options = ["--mode", "poisson", "--rate", "500", "--warmup", "0", "--timeout", "0.2"]
        assert serving.main(["--url", fake.url, "--clients", "1", "--requests", "2", *options]) == 1
    assert "longer than 0.2 s" in capsys.readouterr().err


def test_no_server_is_said_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with server_thread() as fake:
        url = fake.url
    assert serving.main(["--url", url, "--clients", "1"]) == 1
    assert "no server answers at 127.0.0.1" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["https://127.0.0.1/generate", "127.0.0.1:8000", "http:///generate"])
def test_a_url_that_cannot_be_driven_is_refused(url: str) -> None:
    with pytest.raises(TargetError, match="must look like"):
        Target.from_url(url)


def test_waves_do_not_overlap() -> None:
    async def run() -> list[tuple[float, float]]:
        async with fake_server(pause=0.002) as fake:
            target = Target.from_url(fake.url)
            generator = LoadGenerator(target)
            await generator.connect(3)
            requests = [
                target.request(json.dumps({"prompt": [1], "max_tokens": n}).encode()) for n in (1, 2, 9, 1, 1, 1)
            ]
            result = await generator.waves(requests, 3)
            await generator.close()
            return [(recording.sent_at, recording.times[-1]) for recording in result.recordings]

    spans = asyncio.run(run())
    assert len(spans) == 6
    assert max(end for _, end in spans[:3]) <= min(start for start, _ in spans[3:])


def test_latencies_of_one_stream() -> None:
    result = StreamResult(sent_at=1.0, token_times=[1.5, 1.75, 2.5], finished_at=2.625, num_tokens=5,
                          prompt_tokens=1, cached_tokens=0)  # fmt: skip
    assert serving.latencies(result) == (0.5, 1.625, [0.25, 0.75], 0.25)
    single = StreamResult(1.0, [1.5], 1.5, 1, 1, 0)
    assert serving.latencies(single) == (0.5, 0.5, [], None)


@pytest.mark.parametrize(
    "options", [["--mode", "poisson"], ["--mode", "waves", "--clients", "3", "--requests", "4"], ["--clients", "0"]]
)
def test_settings_that_make_no_sense_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serving.parse_args(options)
    assert "error:" in capsys.readouterr().err
