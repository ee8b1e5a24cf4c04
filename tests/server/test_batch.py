"""A file of requests over the app and a scripted engine: each line once, whatever came before and in between."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server import batch_cli
from server.batch import Batch, BatchStoppedError
from server.batch_files import AnswerFile, read_requests
from server.batch_settings import BatchSettings
from server.settings import Settings, UsageError
from tests.server.conftest import make_app
from tests.server.fake_engine import FakeEngine, Plan, says, seeded_letters
from tests.server.live import wait_until


class Counted:
    """A progress that counts."""

    def __init__(self) -> None:
        self.refused: list[bool] = []

    def advance(self, *, refused: bool) -> None:
        self.refused.append(refused)


def request_line(custom_id: object, url: str = "/generate", method: str = "POST", **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def generate_line(number: int) -> str:
    return request_line(f"line-{number}", prompt=f"prompt {number}", max_tokens=1 + number % 20, seed=number)


def answer_all(
    source: Path, target: Path, engine: FakeEngine | None = None, *, at_once: int = 4, seed: int | None = None
) -> list[bool]:
    """Run a batch in this process; whether each line that it answered was refused."""
    counted = Counted()
    answers = AnswerFile(target)

    async def run() -> None:
        fake = engine or FakeEngine()
        batch = Batch(make_app(fake), fake, answers, counted, seed)
        await batch.run(read_requests(source), at_once)

    try:
        asyncio.run(run())
    finally:
        answers.close()
    return counted.refused


def answers_of(path: Path) -> dict[str, dict[str, Any]]:
    """The output's lines by custom_id, each there once; those without one by the number of their line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    keys = [line["custom_id"] if line["custom_id"] is not None else f"#{line['error']['line']}" for line in lines]
    assert [key for key, count in Counter(keys).items() if count > 1] == []
    assert len({line["id"] for line in lines}) == len(lines)
    return dict(zip(keys, lines, strict=True))


def choices_of(path: Path) -> dict[str, list[Any]]:
    return {
        key: [line["response"]["status_code"], line["response"]["body"].get("choices")]
        for key, line in answers_of(path).items()
    }


@pytest.fixture(autouse=True)
def logging_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.batch_cli.setup_logging", lambda level, form: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(generate_line(number) for number in range(40)) + "\n")
    return path


def test_every_line_is_answered_as_the_server_answers(source: Path, tmp_path: Path) -> None:
    assert answer_all(source, tmp_path / "out") == [False] * 40
    found = answers_of(tmp_path / "out")
    assert sorted(found) == sorted(f"line-{number}" for number in range(40))
    for number in range(40):
        line = found[f"line-{number}"]
        assert line["error"] is None
        assert line["id"].startswith("batch_req_")
        assert line["response"]["request_id"].startswith("req-")
        plan = seeded_letters(list(f"prompt {number}".encode()), SamplingParams(1 + number % 20, seed=number))
        choice = line["response"]["body"]["choices"][0]
        assert choice["token_ids"] == [token for chunk in plan.chunks for token in chunk]
        assert choice["text"] == bytes(choice["token_ids"]).decode()


def test_openais_routes_are_answered(tmp_path: Path) -> None:
    (tmp_path / "in").write_text(
        request_line("text", "/v1/completions", model="tiny", prompt=["ab", "cd"], max_tokens=3, seed=1)
        + "\n"
        + request_line("chat", "/v1/chat/completions", model="tiny", messages=[{"role": "user", "content": "x"}])
        + "\n"
        + request_line("other", "/v1/completions", model="other", prompt="ab")
    )
    answer_all(tmp_path / "in", tmp_path / "out")
    found = answers_of(tmp_path / "out")
    text = found["text"]["response"]["body"]
    assert (text["object"], len(text["choices"])) == ("text_completion", 2)
    assert found["chat"]["response"]["status_code"] == 400  # the model has no chat template
    assert "chat template" in found["chat"]["error"]["message"]
    assert found["other"]["response"]["status_code"] == 404


def test_lines_that_cannot_be_answered_get_an_error_each(tmp_path: Path) -> None:
    lines = [
        "\ufeff" + generate_line(1),
        "",
        '{"torn": ',
        "[1, 2]",
        generate_line(1),
        request_line(None, prompt="x"),
        request_line("x" * 513, prompt="x"),
        request_line("method", method="GET", prompt="x"),
        request_line("url", url="/metrics", prompt="x"),
        request_line("path", url="../generate", prompt="x"),
        request_line("stream", prompt="x", stream=True),
        json.dumps({"custom_id": "body", "method": "POST", "url": "/generate", "body": "x"}),
        request_line("field", prompt="x", temperature=3),
        request_line("unknown", prompt="x", temprature=1),
        "\0\0",
        '{"custom_id": "\\ud800"}',
        '{"custom_id": "nan", "method": "POST", "url": "/generate", "body": {"prompt": "x", "top_p": NaN}}',
    ]
    (tmp_path / "in").write_text("\n".join(lines))
    refused = answer_all(tmp_path / "in", tmp_path / "out")
    assert (len(refused), sum(refused)) == (16, 15)
    found = answers_of(tmp_path / "out")
    problems = {key: line["error"]["message"] for key, line in found.items() if line["error"] is not None}
    expected = {
        "#3": "not valid JSON", "#4": "not a JSON object", "#5": "custom_id is that of an earlier line",
        "#6": "custom_id must be a string", "#7": "custom_id must be a string", "method": "method must be POST",
        "url": "url must be one of", "path": "url must be one of", "stream": "body.stream must be false",
        "body": "body must be a JSON object", "field": "temperature must be a number from 0 to 2",
        "unknown": "did you mean temperature?", "#15": "not valid JSON", "#16": "", "#17": "not valid JSON",
    }  # fmt: skip
    assert problems.keys() == expected.keys()
    for key, words in expected.items():
        assert words in problems[key], key
        line = found[key]
        assert line["response"]["status_code"] == (422 if key in ("field", "unknown") else 400)
        assert line["response"]["body"]["error"]["message"] == problems[key]
    assert answer_all(tmp_path / "in", tmp_path / "out") == []


def test_a_torn_last_line_is_cut_wherever_it_is_torn(source: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    answer_all(source, whole)
    expected, data = choices_of(whole), whole.read_bytes()
    last = data.rindex(b"\n", 0, len(data) - 1) + 1
    out = tmp_path / "out"
    for end in [*range(last, last + 20), *range(len(data) - 12, len(data) + 1)]:
        out.write_bytes(data[:end])
        assert len(answer_all(source, out)) == (1 if end < len(data) - 1 else 0)
        assert choices_of(out) == expected
        assert out.read_bytes().startswith(data[:last])
    out.write_bytes(data[:last] + bytes(100))  # what a loss of power may leave
    assert len(answer_all(source, out)) == 1
    assert choices_of(out) == expected


def test_a_run_that_is_cancelled_is_gone_on_with(source: Path, tmp_path: Path) -> None:
    answer_all(source, tmp_path / "whole")
    out = tmp_path / "out"

    def slowly(prompt: list[int], params: SamplingParams) -> Plan:
        plan = seeded_letters(prompt, params)
        return Plan(plan.chunks, delay=0.001)

    async def run_for(seconds: float, answers: AnswerFile) -> None:
        engine = FakeEngine(slowly)
        batch = Batch(make_app(engine), engine, answers, Counted())
        task = asyncio.create_task(batch.run(read_requests(source), 3))
        await asyncio.wait({task}, timeout=seconds)
        task.cancel()
        await asyncio.wait({task})
        assert not engine.live

    rounds, size = 0, -1
    while len(choices_of(out) if out.exists() else {}) < 40:
        answers = AnswerFile(out)
        asyncio.run(run_for(0.05, answers))
        answers.close()
        assert out.stat().st_size >= size
        size, rounds = out.stat().st_size, rounds + 1
        assert rounds < 100
    assert rounds > 1
    assert choices_of(out) == choices_of(tmp_path / "whole")


def test_what_the_engine_gives_up_on_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.batch._RETRY_SECONDS", 0.01)
    (tmp_path / "in").write_text(request_line("a", prompt="a", max_tokens=3) + "\n" + request_line("b", prompt="b"))
    attempts: Counter[bytes] = Counter()

    def script(prompt: list[int], params: SamplingParams) -> Plan:
        attempts[bytes(prompt)] += 1
        fails = bytes(prompt) == b"b" or attempts[b"a"] < 3
        return Plan([[97]] * 3, fail_after=1 if fails else None)

    answer_all(tmp_path / "in", tmp_path / "out", FakeEngine(script))
    found = answers_of(tmp_path / "out")
    assert found["a"]["response"]["status_code"] == 200
    assert found["b"]["response"]["status_code"] == 503
    assert found["b"]["error"]["code"] == "request_failed"
    assert attempts == {b"a": 3, b"b": 3}


def test_a_dead_engine_ends_the_batch_and_answers_nothing_for_it(source: Path, tmp_path: Path) -> None:
    engine = FakeEngine()
    count = 0

    def script(prompt: list[int], params: SamplingParams) -> Plan:
        nonlocal count
        count += 1
        if count == 10:
            asyncio.get_running_loop().call_soon(engine.kill)
        return seeded_letters(prompt, params)

    engine.script = script
    with pytest.raises(BatchStoppedError, match="killed by a test"):
        answer_all(source, tmp_path / "out", engine)
    found = answers_of(tmp_path / "out")
    assert 0 < len(found) < 40
    assert {line["response"]["status_code"] for line in found.values()} == {200}
    answer_all(source, tmp_path / "out")
    assert len(answers_of(tmp_path / "out")) == 40


def test_a_full_disk_ends_the_batch_with_its_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_all(source, tmp_path / "whole")
    limit, write = 3_000, os.write

    def limited(descriptor: int, data: memoryview) -> int:
        room = limit - os.fstat(descriptor).st_size
        if room <= 0:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:room])

    with monkeypatch.context() as patch:
        patch.setattr("server.batch_files.os.write", limited)
        with pytest.raises(BatchStoppedError, match=r"--output cannot be written \(No space left on device\)"):
            answer_all(source, tmp_path / "out")
    assert (tmp_path / "out").stat().st_size == limit
    answer_all(source, tmp_path / "out")
    assert choices_of(tmp_path / "out") == choices_of(tmp_path / "whole")


def test_a_seed_for_all_gives_each_line_its_own(tmp_path: Path) -> None:
    lines = [request_line(f"line-{number}", prompt="same", max_tokens=9) for number in range(6)]
    lines += [request_line("own", prompt="same", max_tokens=9, seed=5)]
    for order, name in ((lines, "in"), (lines[::-1], "reversed")):
        (tmp_path / name).write_text("\n".join(order))
    seeds: dict[str, dict[str, int]] = {}
    for out, name, seed in (("a", "in", 1), ("b", "reversed", 1), ("c", "in", 2), ("d", "in", None)):
        answer_all(tmp_path / name, tmp_path / out, seed=seed)
        found = answers_of(tmp_path / out)
        seeds[out] = {key: line["response"]["body"]["choices"][0]["seed"] for key, line in found.items()}
        assert seeds[out].pop("own") == 5
        assert len(set(seeds[out].values())) == 6
    assert seeds["a"] == seeds["b"]
    assert not set(seeds["a"].values()) & (set(seeds["c"].values()) | set(seeds["d"].values()))


@pytest.mark.parametrize("content", ["a user's own notes", "notes\n", '{"id": 1}\n', '{"custom_id": "x"}', "[]\n[]\n"])
def test_a_file_that_is_no_output_is_not_touched(source: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "out").write_text(content)
    with pytest.raises(UsageError, match=r"--output: line 1 of .* is no answer of a batch; choose another file"):
        AnswerFile(tmp_path / "out")
    assert (tmp_path / "out").read_text() == content
    with pytest.raises(UsageError, match="is no answer of a batch"):
        AnswerFile(source)


def test_one_batch_at_a_time_writes_a_file(tmp_path: Path) -> None:
    first = AnswerFile(tmp_path / "out")
    with pytest.raises(UsageError, match="another batch writes"):
        AnswerFile(tmp_path / "out")
    first.close()
    AnswerFile(tmp_path / "out").close()
    with (tmp_path / "out").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_wrong_usage_is_one_sentence_and_exit_2(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["--input", str(source), "--output", str(tmp_path / "out")]
    for arguments, words in (
        ([], "--input (QUILL_INPUT): must be given"),
        (files[:2], "--output"),
        (["--input", str(tmp_path / "none"), *files[2:]], "--input: "),
        (["--input", str(tmp_path), *files[2:]], "Is a directory"),
        ([*files[:2], "--output", str(tmp_path)], "--output: "),
        ([*files[:2], "--output", str(source)], "is no answer of a batch"),
        ([*files, "--seed", "-1"], "--seed"),
        ([*files, "--port", "1"], "--port"),
        ([*files, "--model", str(tmp_path)], "holds no config.json"),
        ([*files, "--model", "no-such-org/no-such-model"], "HF_HUB_OFFLINE is set"),
    ):
        assert batch_cli.main(arguments) == 2
        stderr = capsys.readouterr().err
        assert words in stderr
        assert stderr.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_the_servers_own_variables_have_no_say(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("QUILL_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("QUILL_MAX_NUM_SEQS", "3")
    settings = BatchSettings(input=source, output=tmp_path / "out").for_app()
    assert isinstance(settings, Settings)
    assert (settings.port, settings.engine_config().max_num_seqs) == (8000, 3)
    assert settings.max_body_size > 1 << 20


def test_when_nothing_is_missing_no_engine_is_started(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_all(source, tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    monkeypatch.setattr("server.engine.client.AsyncEngine.start", None)
    assert batch_cli.main(["--input", str(source), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "out: 0 lines answered; 40 were there already\n"
    assert (tmp_path / "out").read_bytes() == before


def test_a_terminal_sees_how_far_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("server.engine.client.AsyncEngine", lambda *_: FakeEngine())
    monkeypatch.setattr("server.serve.tokenizer_of", lambda settings: Tokenizer.bytes())
    assert batch_cli.main(["--input", str(source), "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out == "out: 40 lines answered\n"
    assert "40/40" in re.sub(r"\x1b\[[0-9;]*m", "", err)
    assert "tokens/s" in err


@pytest.mark.parametrize("number", [2, 15])
def test_signals_end_it_with_their_code_and_a_valid_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """The command itself over a scripted engine: a signal comes when some lines are answered."""
    out = tmp_path / "out"

    def script(prompt: list[int], params: SamplingParams) -> Plan:
        if out.read_bytes().count(b"\n") >= 8:
            os.kill(os.getpid(), number)
        return Plan(seeded_letters(prompt, params).chunks, delay=0.001)

    patched = {"script": script}
    monkeypatch.setattr("server.engine.client.AsyncEngine", lambda config, limit: FakeEngine(patched["script"]))
    monkeypatch.setattr("server.serve.tokenizer_of", lambda settings: Tokenizer.bytes())
    command = ["--input", str(source), "--output", str(out)]
    assert batch_cli.main(command) == 128 + number
    kept = len(answers_of(out))
    assert 8 <= kept < 40
    assert capsys.readouterr().out.endswith(f"{40 - kept} remain: run the same command again\n")
    patched["script"] = says("x")
    assert batch_cli.main(command) == 0
    assert len(answers_of(out)) == 40


def test_an_engine_that_cannot_start_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("server.engine.client.AsyncEngine", lambda *_: FakeEngine(load_error="no such device"))
    assert batch_cli.main(["--input", str(source), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "quill: error: no such device\n"
    assert wait_until(lambda: (tmp_path / "out").read_bytes() == b"") < 1
