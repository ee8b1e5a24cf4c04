"""The server's life as a process: ready line, drain, exit codes, the engine's death, wrong usage."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli import listen, main
from tests.server.live import wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    return tmp_path / "tiny"


class Process:
    """A running fake_main: its URL, exit code and what it wrote to stderr."""

    def __init__(self, folder: Path, *options: str, **env: str) -> None:
        command = [sys.executable, "-m", "tests.server.fake_main", "--model", str(folder), "--port", "0", *options]
        self.popen = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
        )
        assert self.popen.stdout is not None
        self.greeting = self.popen.stdout.readline() + self.popen.stdout.readline()
        match = re.search(r"http://[\d.]+:\d+", self.greeting)
        self.url = match[0] if match else ""

    def terminate(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def status(self, path: str) -> int:
        return httpx.get(self.url + path).status_code

    def wait(self) -> tuple[int, str]:
        _, stderr = self.popen.communicate(timeout=15)
        return self.popen.returncode, stderr


@contextmanager
def running(folder: Path, *options: str, **env: str) -> Iterator[Process]:
    process = Process(folder, *options, **env)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.communicate()


class Client(threading.Thread):
    """One request in the background; `response` is set when it ends."""

    def __init__(self, process: Process, **body: Any) -> None:
        super().__init__()
        self._url, self._body = process.url, {"prompt": "slow"} | body
        self.response: httpx.Response | None = None
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        begun = time.monotonic()
        self.response = httpx.post(f"{self._url}/generate", json=self._body, timeout=15)
        self.seconds = time.monotonic() - begun

    def result(self) -> httpx.Response:
        self.join(15)
        assert self.response is not None
        return self.response


def wait_running(process: Process, count: int) -> None:
    line = f'vllm:num_requests_running{{engine="0",model_name="tiny"}} {count}.0'
    wait_until(lambda: line in httpx.get(f"{process.url}/metrics").text)


def test_sigterm_lets_running_requests_finish(folder: Path) -> None:
    with running(folder) as process:
        streamed, whole = Client(process, max_tokens=30, stream=True), Client(process, max_tokens=30)
        wait_running(process, 2)
        process.terminate()
        wait_until(lambda: process.status("/ready") == 503, seconds=1)
        refused = httpx.post(f"{process.url}/generate", json={"prompt": "p"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        assert process.status("/health") == 200
        assert streamed.result().text.endswith("data: [DONE]\n\n")
        assert whole.result().json()["choices"][0]["text"] == "a" * 30
        assert process.wait()[0] == 0


def test_what_outlasts_the_drain_gets_an_error(folder: Path) -> None:
    with running(folder, "--drain-timeout", "0.2") as process:
        streamed, whole = Client(process, max_tokens=200, stream=True), Client(process, max_tokens=200)
        wait_running(process, 2)
        process.terminate()
        assert "event: error\n" in streamed.result().text
        assert '"code":"draining"' in streamed.result().text
        assert whole.result().status_code == 503
        assert whole.seconds < 3
        assert process.wait()[0] == 0


def test_the_drain_delay_keeps_the_listener_open(folder: Path) -> None:
    with running(folder, "--drain-delay", "0.6") as process:
        process.terminate()
        begun = time.monotonic()
        wait_until(lambda: process.status("/ready") == 503, seconds=1)
        assert process.wait()[0] == 0
        assert time.monotonic() - begun > 0.5


def test_a_second_signal_ends_at_once(folder: Path) -> None:
    with running(folder) as process:
        streamed = Client(process, max_tokens=200, stream=True)
        wait_running(process, 1)
        process.terminate()
        wait_until(lambda: process.status("/ready") == 503, seconds=1)
        process.popen.send_signal(signal.SIGINT)
        assert "event: error\n" in streamed.result().text
        assert process.wait()[0] == 0


def test_the_engines_death_reaches_clients_and_supervisor(folder: Path) -> None:
    with running(folder, "--log-format", "json") as process:
        streamed = Client(process, max_tokens=200, stream=True)
        wait_running(process, 1)
        dying = Client(process, prompt="die", max_tokens=100)
        assert dying.result().status_code == 503
        assert dying.seconds < 2.2
        assert '"code":"engine_down"' in streamed.result().text
        assert process.status("/health") == 503
        assert process.status("/ready") == 503
        code, stderr = process.wait()
    assert code == 1
    lines = [json.loads(line) for line in stderr.splitlines()]
    assert any(line["message"] == "the engine died: killed by a test" for line in lines)


def test_an_engine_that_cannot_start(folder: Path) -> None:
    with running(folder, FAKE_LOAD_ERROR="model.safetensors is cut short; copy it again") as process:
        code, stderr = process.wait()
    assert code == 1
    assert stderr == "quill: error: model.safetensors is cut short; copy it again\n"


def test_the_ready_line_can_be_pasted(folder: Path) -> None:
    with running(folder) as process:
        command = process.greeting.splitlines()[1]
        shell = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20, check=False)
        assert shell.stdout.endswith("data: [DONE]\n\n"), shell.stderr


def test_wrong_usage_is_one_sentence_and_exit_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    model = ["--model", str(folder)]
    for arguments, words in (
        ([*model, "--model", str(folder)], "two models are called"),
        ([*model, "--served-model-name", "a,b"], "--served-model-name: gives 2 names for 1 models"),
        ([*model, "--split", "chat=tiny:1,other:2"], "--split (QUILL_SPLIT): names other, which is not served"),
        ([*model, "--shadow", "tiny=tiny:0.5"], "--shadow (QUILL_SHADOW): must give each model one other model"),
        (["--model", str(tmp_path / "none")], "does not exist"),
        (["--model", str(folder / "config.json")], "is not a folder"),
        (["--model", str(tmp_path / "empty")], "holds no config.json"),
        (["--model", "x" * 300], "--model"),
        ([*model, "--port", "99999"], "--port"),
        ([*model, "--host", "no.such.host.invalid"], "--host"),
        ([*model, "--host", ".."], "--host"),
        ([*model, "--kv-cache-memory", "2q"], "--kv-cache-memory"),
        ([*model, "--kv-cache-memory", "0"], "--kv-cache-memory"),
        ([*model, "--device", "tpu"], "--device"),
        ([*model, "--no-such-option", "1"], "--no-such-option"),
        ([*model, "--api-key-file", str(tmp_path / "keys")], "cannot be read"),
    ):
        assert main(arguments) == 2
        stderr = capsys.readouterr().err
        assert words in stderr
        assert stderr.count("\n") == 1


def test_a_port_in_use_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--model", str(folder), "--port", port]) == 2
    assert f"port {port}" in capsys.readouterr().err


def test_python_m_server_reports_wrong_usage() -> None:
    command = [sys.executable, "-m", "server", "--model", "/no/such/folder"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_the_api_process_imports_no_torch() -> None:
    code = "import sys, server.cli, server.serve, server.app, server.engine.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
