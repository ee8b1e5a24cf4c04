"""`python -m server batch` as a process over a real engine, killed and gone on with; its model comes by name."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.hub_stand_in import HubStandIn, commit_of
from tests.server.expected import alone
from tests.server.live import wait_until
from tests.server.real import PATIENCE, load_alone, save_random
from tests.server.test_batch import answers_of, choices_of

REPO = "tiny-org/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("batch") / "tiny")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[HubStandIn]:
    with HubStandIn({REPO: {"main": folder}}) as hub:
        yield hub


def make_bodies(count: int) -> list[dict[str, Any]]:
    """Greedy and seeded, behind shared prefixes, of different lengths."""
    rng = random.Random(5)
    return [
        {
            "prompt": ("It was the best of times. " if number % 2 else "") + f"line {number}",
            "max_tokens": rng.randrange(10, 40),
            "temperature": rng.choice([0.0, 0.9]),
            "seed": rng.getrandbits(53),
            "ignore_eos": True,
        }
        for number in range(count)
    ]


def write_requests(path: Path, bodies: list[dict[str, Any]]) -> Path:
    lines = [
        {"custom_id": f"line-{number}", "method": "POST", "url": "/generate", "body": body}
        for number, body in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class BatchProcess:
    """One run of the command; what it prints is in `output` after `wait`."""

    def __init__(self, source: Path, target: Path, environment: dict[str, str], *options: str) -> None:
        command = [sys.executable, "-m", "server", "batch", "--input", str(source), "--output", str(target)]
        command += ["--device", "cpu", "--dtype", "float32", "--max-num-seqs", "4", *options]
        self._target = target
        self._popen = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.output = self.errors = ""

    def wait(self) -> int:
        self.output, self.errors = self._popen.communicate(timeout=PATIENCE)
        return self._popen.returncode

    def interrupt(self, number: int, at_line: int) -> int:
        """Send a signal when the output has so many lines; the exit code."""
        process = psutil.Process(self._popen.pid)
        wait_until(lambda: self._popen.poll() is not None or count_lines(self._target) >= at_line, seconds=PATIENCE)
        engines = process.children() if process.is_running() else []
        self._popen.send_signal(number)
        code = self.wait()
        wait_until(lambda: not any(is_alive(engine) for engine in engines), seconds=PATIENCE)
        return code


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_and_stopped_batches_go_on_to_the_same_tokens(folder: Path, hub: HubStandIn, tmp_path: Path) -> None:
    bodies = make_bodies(24)
    source, out = write_requests(tmp_path / "in.jsonl", bodies), tmp_path / "out.jsonl"
    home = {"HF_HOME": str(tmp_path / "home")}
    offline = home | {"HF_HUB_OFFLINE": "1"}

    first = BatchProcess(source, out, home | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}, "--model", REPO)
    assert first.interrupt(signal.SIGKILL, 5) == -signal.SIGKILL
    assert f"quill: {REPO} is {REPO}@{commit_of(REPO, 'main')}" in first.errors
    kept = out.read_bytes()
    whole = kept[: kept.rindex(b"\n") + 1]
    stopped = BatchProcess(source, out, offline, "--model", REPO)
    assert stopped.interrupt(signal.SIGTERM, count_lines(out) + 4) == 128 + signal.SIGTERM
    assert "remain: run the same command again" in stopped.output
    assert len(answers_of(out)) >= 9
    last = BatchProcess(source, out, offline, "--model", REPO)
    assert last.wait() == 0
    assert last.errors.startswith(f"quill: {REPO} is {REPO}@{commit_of(REPO, 'main')}\n")
    assert "Traceback" not in first.errors + stopped.errors + last.errors
    assert out.read_bytes().startswith(whole)

    model, found = load_alone(folder), answers_of(out)
    assert sorted(found) == sorted(f"line-{number}" for number in range(24))
    for number, body in enumerate(bodies):
        response = found[f"line-{number}"]["response"]
        assert response["body"]["model"] == REPO
        choice = response["body"]["choices"][0]
        assert choice["token_ids"] == alone(model, body, body["seed"]).token_ids


@pytest.mark.slow
def test_twenty_random_moments(folder: Path, tmp_path: Path) -> None:
    rng = random.Random(8)
    source = write_requests(tmp_path / "in.jsonl", make_bodies(2_000))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert BatchProcess(source, whole, {}, "--model", str(folder)).wait() == 0
    rounds = 0
    while count_lines(out) < 2_000:
        process = BatchProcess(source, out, {}, "--model", str(folder))
        if rounds < 20:
            time.sleep(rng.uniform(0, 2))
            number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            process.interrupt(number, count_lines(out) + rng.randrange(90))
        else:
            assert process.wait() == 0
        rounds += 1
    assert rounds > 10
    assert choices_of(out) == choices_of(whole)
