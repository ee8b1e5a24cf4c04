"""The scaling benchmark on a real, tiny engine, and its stopwatch."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.make_model import make_model
from benchmarks.scaling import BOOKKEEPING, WATCHED, Stopwatch
from server.engine.scheduler import Scheduler


def test_every_size_is_measured_and_plotted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model("llama-tiny", tmp_path / "model", hidden_size=64, max_seq_len=96)
    out = tmp_path / "out.json"
    arguments = ["--model", str(tmp_path / "model"), "--dtype", "float32", "--threads", "1", "--quick"]
    assert scaling.main([*arguments, "--out", str(out)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads(out.read_text())
    assert written["by_batch"] == figures["by_batch"]
    assert [list(figures[f"by_{what}"]) for what in ("batch", "context", "queue")] == [
        ["1", "4"],
        ["16", "48"],
        ["2", "20"],
    ]
    rows = [row for what in ("batch", "context", "queue") for row in figures[f"by_{what}"].values()]
    for row in (*rows, figures["at_running"]["8"]):
        assert 0 < sum(row[name] for name in WATCHED) < row["step"]
    row = figures["at_running"]["8"]
    assert figures["bookkeeping_share"] == pytest.approx(sum(row[name] for name in BOOKKEEPING) / row["step"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert Scheduler.schedule.__name__ == "schedule", "the stopwatch has put everything back"


def test_the_stopwatch_adds_up_and_lets_go() -> None:
    class Sleeper:
        def sleep(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

    before, watch = Sleeper.sleep, Stopwatch()
    with watch.watching(nap=(Sleeper, "sleep")):
        assert Sleeper().sleep(0.02) + Sleeper().sleep(0.01) == pytest.approx(0.03)
    assert 0.03 <= watch.parts["nap"] < 1.0
    assert Sleeper.sleep is before
    Sleeper().sleep(0.01)
    assert watch.parts["nap"] < 1.0


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--model", str(tmp_path), "--quick", "--out", str(tmp_path / "x.json")]) == 1
    assert capsys.readouterr().err.startswith("scaling benchmark failed: ")
