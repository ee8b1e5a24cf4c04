"""Runs to break off, and what must hold of a run folder afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint import load_model
from tests.training.conftest import make_text
from training.data.prepare import PrepareRequest, prepare

ROOT = Path(__file__).parents[2]
# Fields of metrics.jsonl that depend on the clock or on the machine's memory.
CLOCK_FIELDS = frozenset({"tokens_per_second", "mfu", "seconds", "time", "elapsed", "memory", "peak_memory"})

RECIPE = """
[data]
dir = "{data}"

[model]
architecture = "llama"
num_layers = 1
num_heads = 2
num_kv_heads = 1
hidden_size = 16
max_seq_len = 32
dropout = 0.1

[train]
max_steps = 4
batch_size = 2
seq_len = 16
grad_accum_steps = 2
lr = 1e-2
warmup_steps = 1
dtype = "float32"
device = "cpu"
log_interval = 1
eval_interval = 2
eval_tokens = 100
save_interval = 2

[run]
dir = "run"
keep = 1
async_save = false
"""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended: exit status, or minus the signal. `operations` are (name, digest of the folder before it)."""

    status: int
    stderr: str
    seconds: float
    operations: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Launcher:
    """Runs commands of `python -m training` in children of a process that has imported everything."""

    process: subprocess.Popen[str]

    def run(self, cwd: Path, *args: object, here: bool = False, page: bool = False, **fault: Any) -> Result:
        """`here`: in the launcher itself. `page`: with report.html."""
        command = {"args": [*map(str, args)], "cwd": str(cwd), "fault": fault, "here": here, "page": page}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return Result(**json.loads(self.process.stdout.readline()))


@contextmanager
def launched() -> Iterator[Launcher]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.crash_launcher"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Launcher(process)
        assert process.stdin is not None
        process.stdin.close()


@dataclass(frozen=True, slots=True)
class Workshop:
    """A folder with data and a recipe, whose runs go to `run` in folders of their own."""

    folder: Path
    launcher: Launcher

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"

    def new(self, name: str, start: Path | None = None) -> Path:
        """An empty working folder, or a copy of another with its run."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        if start is None:
            place.mkdir()
        else:
            shutil.copytree(start, place)
        return place

    def train(self, place: Path, *overrides: str, page: bool = False, **fault: Any) -> Result:
        return self.launcher.run(place, "train", self.recipe, "--resume", "auto", *overrides, page=page, **fault)


def make_workshop(folder: Path, launcher: Launcher) -> Workshop:
    (folder / "words.txt").write_bytes(make_text(300).encode())
    prepare(PrepareRequest((str(folder / "words.txt"),), folder / "data", "bytes"))
    workshop = Workshop(folder, launcher)
    workshop.recipe.write_text(RECIPE.format(data=folder / "data"))
    warm = launcher.run(workshop.new("warm"), "train", workshop.recipe, here=True)
    assert warm.status == 0
    return workshop


def outcome(run: Path) -> dict[str, Any]:
    """What a finished run leaves that does not depend on the clock: files' contents and the metrics."""
    result: dict[str, Any] = {}
    newest = max((run / "state").glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))
    for path in sorted([*(run / "checkpoints").rglob("*"), *newest.rglob("*")]):
        name = str(path.relative_to(run))
        # Both files hold the run's random id, the manifest also the time.
        described = path.name in ("manifest.json", "state.json")
        result[name] = path.read_bytes() if path.is_file() and not described else None
    result["metrics"] = metrics(run)
    return result


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in CLOCK_FIELDS} for line in lines]


def leftovers(run: Path) -> list[str]:
    """What only an interrupted writer would leave."""
    endings = (".tmp", ".partial", ".part", ".previous")
    found = [path for path in run.rglob("*") if path.name.endswith(endings)]
    found += [path for name in ("checkpoints", "state") for path in (run / name).rglob(".*")]
    return sorted(str(path.relative_to(run)) for path in found)


def check_whole(run: Path) -> None:
    """`last` and `best` are there and every byte of them is what their manifest says."""
    for name in ("last", "best"):
        load_model(run / "checkpoints" / name)
