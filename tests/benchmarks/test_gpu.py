"""The GPU benchmark: its parts on a tiny model on the CPU, their processes, its goals; on a card, what it must show."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_correct
from benchmarks.gpu_device import data_sheet_bandwidth
from benchmarks.gpu_engine import TINY
from benchmarks.gpu_goals import Results, Row, goal_rows
from benchmarks.gpu_job import Figures, Job, SkippedError
from benchmarks.gpu_part import PARTS
from benchmarks.gpu_process import Part, read_figures, run_part
from benchmarks.gpu_transformers import affordable_tokens
from benchmarks.make_model import make_model

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("models")
    make_model("gpt2", folder / "tiny", **TINY)
    return gpu.tiny_job(Job(str(folder / "tiny"), str(folder / "large")))


def run_here(name: str, job: Job) -> dict[str, Any]:
    out = io.StringIO()
    PARTS[name](job, Figures(out, limit=60.0))
    entries = [json.loads(line) for line in out.getvalue().splitlines()]
    return {entry["name"]: entry["value"] for entry in entries}


def test_every_part_of_the_list_can_be_run() -> None:
    assert {part.name for part in gpu.PARTS} == PARTS.keys()


def test_without_a_device_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "no CUDA device: nothing to measure\n"


@pytest.mark.parametrize("name", ["engine", "no overlap", "no graphs", "deterministic"])
def test_the_engine_is_timed_greedy_and_sampled(name: str, job: Job) -> None:
    figures = run_here(name, job)
    assert figures.pop("start")["weight_bytes"] == 4 * 3_382_080  # float32: 50,257 + 1,024 vectors of 64, two layers
    assert figures.keys() == {"greedy/1", "greedy/4", "sampled/1", "sampled/4"}
    for rates in figures.values():
        assert min(rates["prefill"], rates["decode"], rates["end_to_end"]) > 0


def test_the_large_model_is_made_once(job: Job) -> None:
    first = run_here("large", job)
    weights = Path(job.large_model, "model.safetensors")
    written = weights.stat().st_mtime_ns
    assert run_here("large", job).keys() == first.keys() == {"start", "greedy/1"}
    assert weights.stat().st_mtime_ns == written


def test_the_engine_agrees_with_generate(job: Job) -> None:
    figures = run_here("correct", job)
    assert figures["greedy float32"] == {"equal": 3, "prompts": 3, "tokens": 18, "largest_gap": 0.0}
    assert figures["attention torch 12/12 x 64 window None float32"] == {"within": 2e-4}
    assert "runs on CUDA only" in figures["sampling/1"]["skipped"]


def test_a_wrong_token_shows_with_the_gap_between_the_logits(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_correct.generate_together

    def wrong(*args: Any) -> list[list[int]]:
        tokens = right(*args)
        tokens[1][2] = (tokens[1][2] + 1) % 50_257
        return tokens

    monkeypatch.setattr(gpu_correct, "generate_together", wrong)
    figures = gpu_correct.compare_greedy(job, "float32")
    assert figures["equal"] == 2
    assert 0 < figures["largest_gap"] < 10


def test_prompts_have_many_lengths(job: Job) -> None:
    lengths = [len(prompt) for prompt in gpu_correct.prompts_of_many_lengths(replace(job, compared=5), 100)]
    assert lengths == [3, 5, 8, 10, 12]


def test_a_step_is_told_apart(job: Job) -> None:
    for row in run_here("host", job).values():
        parts = [row[name] for name in ("schedule", "build", "launch", "update")]
        assert min(parts) > 0
        assert sum(parts) < row["host"] * 1.5  # medians of each, not of one step
        assert row["host"] < row["step"] * 1.5


@pytest.mark.parametrize("name", ["device", "attention", "sampling"])
def test_kernels_are_timed(name: str, job: Job) -> None:
    for figure, values in run_here(name, job).items():
        assert "error" not in values, figure
        assert all(value > 0 for value in values.values() if isinstance(value, float))


def test_a_part_runs_in_a_process_of_its_own(job: Job) -> None:
    result = run_part(Part("device", 60.0), job, seconds_left=60.0)
    assert "error" not in result
    assert result["figures"]["card"] == {"name": "cpu", "data_sheet_gb_per_second": None}
    assert result["figures"]["copy"]["gb_per_second"] > 0


def test_a_part_that_fails_or_hangs_is_reported(job: Job) -> None:
    broken = run_part(Part("engine", 60.0), replace(job, model="/no-such-folder"), seconds_left=60.0)
    assert broken["error"].startswith("exit code 1")
    assert "no-such-folder" in broken["error"]
    assert run_part(Part("device", 0.01), job, 60.0, least=0.0)["error"] == "ended after its 0 s"


def test_a_part_for_which_no_time_is_left_is_skipped(job: Job) -> None:
    assert run_part(Part("engine", 60.0), job, seconds_left=3.0) == {"figures": {}, "skipped": "no time"}


def fail() -> dict[str, Any]:
    raise ValueError("broken kernel")


def skip() -> dict[str, Any]:
    raise SkippedError("not here")


def test_a_figure_that_fails_is_reported_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "figures"
    with path.open("w") as out:
        figures = Figures(out, limit=60.0)
        figures.add("first", fail)
        figures.add("second", skip)
        figures.add("third", lambda: {"value": 3})
        Figures(out, limit=-1.0).add("late", fail)
        out.write('{"name": "cut o')
    assert read_figures(path) == {
        "first": {"error": "ValueError: broken kernel"},
        "second": {"skipped": "not here"},
        "third": {"value": 3},
        "late": {"skipped": "no time"},
    }


def part(**figures: dict[str, Any]) -> dict[str, Any]:
    return {"figures": {name.replace("__", "/").replace("_x_", ", "): value for name, value in figures.items()}}


@pytest.fixture
def results() -> Results:
    engine = {"greedy__1": {"decode": 3_300.0}, "greedy__256": {"end_to_end": 90_000.0}}
    return {
        "device": part(copy={"gb_per_second": 4_000.0}, card={"name": "new", "data_sheet_gb_per_second": None}),
        "engine": part(**engine),
        "http": part(greedy__256={"error": "SystemFailedError: exit code 1: one\ntwo"}),
        "large": part(start={"weight_bytes": 3_000_000_000}, greedy__1={"decode": 1_000.0}),
        "transformers": part(
            batching_x_default__256={"end_to_end": 4_000.0}, batching_x_sized__256={"end_to_end": 5_000.0}
        ),
        "no graphs": {"figures": {}, "error": "exit code 1: Traceback\nConfigError: why"},
        "no overlap": part(**engine | {"greedy__256": {"end_to_end": 60_000.0}}),
        "deterministic": {"figures": {}, "skipped": "no time"},
    }


def rows_of(results: Results) -> dict[str, Row]:
    rows = goal_rows(results, Job("model", "large"))
    found = {row.name: row for row in rows}
    assert len(found) == len(rows), "names tell rows apart"
    return found


def test_goals_are_met_or_missed(results: Results) -> None:
    rows = rows_of(results)
    verdicts = {name: (row.measured, row.verdict) for name, row in rows.items()}
    assert verdicts["GPT-2, 1 stream, decoding"] == (3_300.0, "met")
    assert verdicts["GPT-2, 256 streams, in 256 / out 256"] == (90_000.0, "MISSED")
    assert verdicts["gpt2-xl, 1 stream, decoding"] == (1_000.0, "met")
    assert verdicts["gpt2-xl, 1 stream, weights read"] == (0.75, "met")  # 3 TB/s of 4
    assert verdicts["GPT-2, 256 streams ÷ transformers' continuous batching"] == (18.0, "met")
    assert verdicts["with ÷ without overlap, streams: 256"] == (1.5, "")


def test_what_was_not_measured_says_why(results: Results) -> None:
    rows = rows_of(results)
    reasons = {
        "over HTTP, 256 clients ÷ engine": "http, greedy/256: SystemFailedError: exit code 1: one",
        "gpt2-xl, 1 stream, weights read (data sheet)": "device, card: no data_sheet_gb_per_second",
        "with ÷ without graphs, streams: 1": "no graphs, greedy/1: ConfigError: why",
        "free ÷ deterministic, streams: 256": "deterministic, greedy/256: no time",
        "attention of GPT-2's heads equals the reference": "no backend was checked",
        "greedy tokens of 32 prompts are generate()'s, float32": "part correct was not asked for",
    }
    for name, reason in reasons.items():
        assert rows[name].verdict == f"not measured: {reason}"


def test_failures_are_counted(results: Results) -> None:
    assert gpu.count_failures(results) == 2  # a figure of http, the part without graphs


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [("NVIDIA H200", 4_800), ("NVIDIA H100 PCIe", 2_000), ("NVIDIA L40S", 864), ("NVIDIA L4", 300), ("Mystery", None)],
)
def test_data_sheets(name: str, bandwidth: int | None) -> None:
    assert data_sheet_bandwidth(name) == bandwidth


def test_a_slow_peer_generates_fewer_tokens() -> None:
    assert affordable_tokens(256, 0.1) == 256
    assert affordable_tokens(256, 1.0) == 35
    assert affordable_tokens(256, 100.0) == 1


@pytest.mark.slow
def test_the_whole_command_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert gpu.main(["--quick", "--seconds", "0", "--out", str(out)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads(out.read_text())
    assert last["failed"] == 0
    assert list(written["parts"]) == [part.name for part in gpu.PARTS]
    assert {"commit", "command", "card", "driver", "versions", "machine", "job"} <= written.keys()
    missing = {name for name, measured in last["goals"].items() if measured is None}
    assert missing == {
        "sampling kernel draws torch's tokens, 4 rows",
        "gpt2, 1 stream, weights read (data sheet)",
        *(f"our kernels ÷ torch's varlen, streams: {streams}" for streams in (1, 4)),
    }


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in ("correct", "backends")])
def test_everything_is_right_on_a_card(name: str, job: Job) -> None:
    """Every backend is the reference, every draw torch's, every greedy token generate()'s."""
    on_card = replace(job, device="cuda", dtype="bfloat16", streams=(1, 256), compared=32)
    for figure, values in run_here(name, on_card).items():
        assert "error" not in values, figure
        if figure == "greedy float32":
            assert values["equal"] == values["prompts"]
