"""Every command of docs/seeds.md runs, small, in a folder as the page asks for, and prints what the page says.

The commands are those of the page, word for word; what makes them small is added behind them.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.coverage_workspace import SMALL_MODEL, SMALL_RUN, make_workspace
from training import cli

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "seeds.md"
IDS = [
    *(f"M{n}" for n in range(1, 21)), *(f"T{n}" for n in range(1, 8)), *(f"D{n}" for n in range(1, 7)),
    *(f"R{n}" for n in range(1, 16)), *(f"F{n}" for n in range(1, 5)), *(f"G{n}" for n in range(1, 10)),
    *(f"E{n}" for n in range(1, 5)), *(f"B{n}" for n in range(1, 4)), "Q1", "W",
]  # fmt: skip

SMALL = f"{SMALL_MODEL} {SMALL_RUN}"
SMALL_GPT2 = f"model.num_layers=1 model.hidden_size=32 {SMALL_RUN}"
# Large vocabularies or shapes, or processes of their own: seconds to minutes each.
SLOW = {"M4", "M5", "M6", "M7", "M11", "M13", "M20", "D1", "R8", "R11", "G9", "B1", "B2", "B3", "Q1"}
LATENCY = "--new-tokens 2 --repeats 1 --warmup 0 --device cpu"
# What is added to a row's commands, where it is not what their kind gets (see `small`).
ADDED: dict[str, list[str]] = {
    "M8": ["", SMALL_GPT2, ""],
    "R4": ["", SMALL.replace("train.grad_accum_steps=1", "")],
    "R6": [SMALL.replace("train.dtype=float32", "")],
    "R7": [SMALL.replace("train.dtype=float32", "")],
    "R11": [SMALL.replace("train.batch_size=2", "")],
    "G6": ["--repeats 1 --warmup 0 --device cpu"],
}


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    what: str
    commands: list[str]
    prints: list[str]


def parse_page(text: str) -> list[Row]:
    """The rows of all tables of the page."""
    rows = []
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| id "):
            id, what, commands, prints = (cell.strip() for cell in line.strip("|").split(" | "))
            rows.append(Row(id, what, re.findall(r"`([^`]+)`", commands), re.findall(r"`([^`]+)`", prints)))
    return rows


ROWS = parse_page(PAGE.read_text(encoding="utf-8"))


def small(row: Row) -> list[list[str]]:
    """The words of a row's commands, each with what makes it small."""
    given = ADDED.get(row.id, [_small(command) for command in row.commands])
    assert len(given) == len(row.commands)
    return [shlex.split(f"{command} {added}") for command, added in zip(row.commands, given, strict=True)]


def _small(command: str) -> str:
    match shlex.split(command):
        case ["python", "-m", "training", "train", *_] | ["torchrun", *_]:
            return SMALL
        case ["python", "-m", "training", "latency", *_]:
            return LATENCY
        case ["python", "-m", "training", "finetune", "instruct", *_]:
            return "--epochs 0.1 --max-seq-len 128 --batch-size 2 train.device=cpu train.dtype=float32"
        case ["python", "-m", "training", "finetune", "classify", *_]:
            return "--epochs 1 --max-seq-len 16 --device cpu"
        case ["python", "-m", "benchmarks.training", *_]:
            return "--quick"
    return ""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    make_workspace(folder)
    return folder


def run_in_process(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["training", *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\nthe\n/quit\n"))
    with pytest.raises(SystemExit) as stop:  # the parser's own way to end
        cli.main()
    assert stop.value.code in (0, None), words


def run_apart(words: list[str], cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=1_500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_row(row: Row, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """What the row's commands print, on both streams."""
    printed = ""
    for words in small(row):
        match words:
            case ["python", "-m", "training", *rest] if "train.compile=true" in rest:
                monkeypatch.setenv("PYTHONPATH", str(ROOT))  # inductor's imports warn, and here that is an error
                printed += run_apart([sys.executable, "-m", "training", *rest], folder)
            case ["python", "-m", "training", *rest]:
                run_in_process(rest, monkeypatch)
            case ["python", "-m", "pytest" | "benchmarks.training" as module, *rest]:
                rest = [str(folder / word) if word.endswith((".json", "book.txt")) else word for word in rest]
                printed += run_apart([sys.executable, "-m", module, *rest], ROOT)
            case ["torchrun", *rest]:
                monkeypatch.setenv("PYTHONPATH", str(ROOT))
                printed += run_apart([sys.executable, "-m", "torch.distributed.run", *rest], folder)
            case ["make", target]:
                printed += run_apart(["make", "--dry-run", target], ROOT)
            case _:
                raise AssertionError(words)
    captured = capfd.readouterr()
    return printed + captured.out + captured.err


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id, marks=[pytest.mark.slow] if row.id in SLOW else []) for row in ROWS]
)
def test_a_row_does_what_it_says(
    row: Row, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(workspace, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("training.reporting.run_log.write_page", lambda run_dir: None)  # as long as the run itself
    printed = run_row(row, folder, monkeypatch, capfd)
    assert row.prints
    for fragment in row.prints:
        pattern = ".*?".join(re.escape(part) for part in fragment.split("…"))
        assert re.search(pattern, printed), f"{fragment!r} is not in:\n{printed}"


def test_every_row_is_there_once_and_in_order() -> None:
    assert [row.id for row in ROWS] == IDS
    assert all(row.what and row.commands for row in ROWS)
    assert ADDED.keys() | SLOW <= set(IDS)


def test_the_page_has_a_row_for_every_command() -> None:
    shown = {
        words[3] for row in ROWS for command in row.commands if (words := shlex.split(command))[2:3] == ["training"]
    }
    existing = {command.name for command in cli.app.registered_commands} | {
        group.name for group in cli.app.registered_groups
    }
    assert existing - shown <= {"import"}  # other trainers' checkpoints: the guide shows them
    assert shown <= existing
