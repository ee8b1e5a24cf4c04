"""Several runs on one page, and the command that writes pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.manifest import Provenance
from tests.training.conftest import Command, ConfigMaker
from tests.training.test_report import LINES, Page, make_run, train_line, val_line
from training.recipe import config_to_toml
from training.reporting.comparison import compare
from training.reporting.report_page import write_comparison
from training.reporting.run_record import RunRecord, read_run


@pytest.fixture
def two_runs(make_config: ConfigMaker, tmp_path: Path) -> list[Path]:
    """The second has another rate and more dropout, and was better."""
    changed = make_config(train__lr=2e-2, model__dropout=0.2, run__dir="elsewhere", train__log_interval=2)
    better = [*LINES[:-1], val_line(8, 2.25)]
    return [
        make_run(tmp_path / "base", config_to_toml(make_config()), LINES),
        make_run(tmp_path / "higher rate", config_to_toml(changed), better),
    ]


def test_runs_are_compared_by_their_settings_and_results(two_runs: list[Path], tmp_path: Path) -> None:
    page = Page(write_comparison(two_runs, tmp_path / "page.html").read_text())
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["base"][1:5] == ["8", "2.5000", "12.18", "3.6067"]
    assert rows["higher rate"][1:5] == ["8", "2.2500", "9.49", "3.2461"]
    assert rows["Setting"] == ["base", "higher rate"]
    assert rows["model.dropout"] == ["0.1", "0.2"]
    assert rows["train.lr"] == ["0.01", "0.02"]
    assert not [name for name in rows if name in ("run.dir", "train.log_interval", "train.seed")]
    assert page.tags.count("svg") == 2
    assert [value for name, value in page.attributes if name == "class"].count("words-first best") == 1


def records(two_runs: list[Path]) -> list[RunRecord]:
    return [read_run(folder) for folder in two_runs]


def test_curves_are_over_steps_where_steps_are_alike(two_runs: list[Path]) -> None:
    comparison = compare(records(two_runs))
    validation, training = comparison.charts
    assert (validation.x_label, validation.y_label) == ("step", "nats per token")
    assert [(curve.x, curve.y) for curve in validation.curves] == [([4, 8], [3.25, 2.5]), ([4, 8], [3.25, 2.25])]
    assert [list(curve.y) for curve in training.curves] == [[4.0, 3.0, 2.0, 1.5]] * 2
    assert comparison.winner is comparison.runs[1]
    assert comparison.note == ""


def test_curves_are_over_tokens_where_steps_differ(two_runs: list[Path]) -> None:
    text = (two_runs[1] / "metrics.jsonl").read_text().replace('"tokens": 256', '"tokens": 512')
    text = text.replace('"tokens": 512,', '"tokens": 1024,')
    (two_runs[1] / "metrics.jsonl").write_text(text)
    assert compare(records(two_runs)).charts[0].x_label == "tokens"


def test_runs_on_other_data_are_compared_by_bits_per_byte(
    two_runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has the lower loss per token, but its tokens stand for fewer bytes."""
    lines = [train_line(8, 1.0), val_line(8, 1.5, bits_per_byte=4.0)]
    (two_runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = {folder / "checkpoints": (Provenance(data=f"sha256:{folder.name}"), None) for folder in two_runs}
    monkeypatch.setattr("training.reporting.run_record._from_checkpoints", known.__getitem__)
    comparison = compare(records(two_runs))
    assert comparison.charts[0].y_label == "bits per byte"
    assert comparison.winner is comparison.runs[0]
    assert "bits per byte" in comparison.note


def test_runs_of_one_name_are_told_apart_and_young_ones_shown(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = config_to_toml(make_config())
    folders = [make_run(tmp_path / parent / "run", config, []) for parent in ("a", "b")]
    comparison = compare(records(folders))
    assert comparison.labels == [str(folder) for folder in folders]
    assert (comparison.winner, list(comparison.charts), list(comparison.differences)) == (None, [], [])
    text = Page(write_comparison(folders, tmp_path / "page.html").read_text()).text
    assert "Nothing is logged yet" in text
    assert "not begun, step 0 of 8" in text


def test_many_runs_differ_in_colour_or_dashes(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = config_to_toml(make_config())
    folders = [make_run(tmp_path / f"run-{number}", config, LINES) for number in range(12)]
    chart = compare(records(folders)).charts[0]
    assert len({(curve.colour, curve.dashed) for curve in chart.curves}) == 12


def test_the_command_writes_pages(two_runs: list[Path], tmp_path: Path, printed: Callable[..., str]) -> None:
    assert (
        printed("report", two_runs[0])
        == f"{two_runs[0] / 'report.html'}\nbase: finished, step 8 of 8, best 2.5000 at 8\n"
    )
    assert (two_runs[0] / "report.html").is_file()
    answer: dict[str, Any] = json.loads(printed("report", *two_runs, "--json"))
    assert answer["report"] == str(tmp_path / "comparison.html")
    assert [(each["run_id"], each["best_loss"], each["best_step"], each["step"]) for each in answer["runs"]] == [
        ("base", 2.5, 8, 8), ("higher rate", 2.25, 8, 8),
    ]  # fmt: skip
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text()
    printed("report", two_runs[1], "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()
    assert not (two_runs[1] / "report.html").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("absent",), "error: absent: not a run folder, it has no config.toml; name the run.dir of a training\n"),
        (
            ("base", "absent"),
            "error: absent: not a run folder, it has no config.toml; name the run.dir of a training\n",
        ),
        (
            ("base", "--out", "absent/page.html"),
            "error: absent/page.html cannot be written: No such file or directory;",
        ),
        (("base", "--out", "base"), "error: base cannot be written: Is a directory;"),
    ],
)
def test_a_mistake_is_one_sentence(
    args: tuple[str, ...], message: str, two_runs: list[Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two_runs[0].parent)
    before = sorted(two_runs[0].parent.rglob("*"))
    status, out, err = command("report", *args)
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert sorted(two_runs[0].parent.rglob("*")) == before
