"""Start the server as a user would, wait until it is ready, and stop it again."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

STOP_SECONDS = 45.0


class ServerError(Exception):
    """The server did not get ready or did not stop."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(arguments: Sequence[str], timeout: float = 120.0) -> Iterator[str]:
    """`python -m server` with these arguments on a free port; yields its base URL once /ready says 200.

    Raises ServerError, with the end of the server's log, if it dies or takes longer than `timeout` seconds.
    """
    with running_command([sys.executable, "-m", "server", *arguments], "/ready", timeout) as url:
        yield url


@contextmanager
def running_command(command: Sequence[str], ready_path: str, timeout: float = 120.0) -> Iterator[str]:
    """Any server that takes `--port`; yields its base URL once `ready_path` says 200. Raises ServerError."""
    with running_process(command, ready_path, timeout) as (_, url):
        yield url


@contextmanager
def running_process(
    command: Sequence[str], ready_path: str, timeout: float = 120.0, poll_seconds: float = 0.05
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """As `running_command`, with the process beside the URL and a choice of how often readiness is asked for."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait_ready(process, port, ready_path, timeout, poll_seconds, log)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            _stop(process)


def _wait_ready(
    process: subprocess.Popen[bytes], port: int, path: str, timeout: float, poll_seconds: float, log: IO[bytes]
) -> None:
    deadline = time.monotonic() + timeout
    while not _answers(port, path):
        if process.poll() is not None:
            raise ServerError(f"the server ended with exit code {process.returncode}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"the server was not ready after {timeout:g} s:\n{_tail(log)}")
        time.sleep(poll_seconds)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tail(log: IO[bytes], size: int = 2_000) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")[-size:].strip() or "(no output)"


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.wait()
        raise ServerError(f"the server did not stop within {STOP_SECONDS:g} s of SIGTERM") from error
