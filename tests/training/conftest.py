"""A small text, prepared data and recipes small enough that a run takes a fraction of a second."""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from training import cli
from training.config import TrainConfig
from training.data.prepare import PrepareRequest, prepare
from training.recipe import build_config
from training.run import run_training

WORDS = [
    *("the", "quill", "writes", "what", "a", "hand", "has", "thought", "and", "ink", "remembers"),
    *("naïve", "स्याही", "🖋", "so,", "on;", "it", "went."),
]


def make_text(num_words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice((" ", " ", " ", "\n", "\n\n")) for _ in range(num_words))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")  # as the train command sets it, which then changes nothing


@pytest.fixture
def report_page() -> None:
    """Asked for by a test whose runs shall write report.html, which takes longer than they do."""


@pytest.fixture(autouse=True)
def no_report_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "report_page" not in request.fixturenames:
        monkeypatch.setattr("training.reporting.run_log.write_page", lambda run_dir: None)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_bytes(make_text(1_500).encode())
    return path


@pytest.fixture(scope="session")
def data_dir(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "bytes"
    prepare(PrepareRequest((str(text_file),), out, "bytes"))
    return out


@pytest.fixture
def full_disk() -> Path:
    """A file that cannot grow."""
    path = Path("/dev/full")
    if not path.exists():
        pytest.skip("needs /dev/full")
    return path


def config_of(tree: dict[str, dict[str, object]], changes: Mapping[str, object]) -> TrainConfig:
    """The recipe with some keys replaced: `section__key=value`."""
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section][key] = value
    return build_config(tree)


ConfigMaker = Callable[..., TrainConfig]


@pytest.fixture
def make_config(data_dir: Path, tmp_path: Path) -> ConfigMaker:
    """A tiny Llama's recipe; keyword `section__key=value` replaces a key."""

    def make(**changes: object) -> TrainConfig:
        tree: dict[str, dict[str, object]] = {
            "data": {"dir": str(data_dir)},
            "model": {"architecture": "llama", "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
                      "hidden_size": 16, "max_seq_len": 32, "dropout": 0.1},
            "train": {"max_steps": 8, "batch_size": 4, "seq_len": 16, "lr": 1e-2, "warmup_steps": 2,
                      "dtype": "float32", "device": "cpu", "log_interval": 1, "eval_interval": 4,
                      "eval_tokens": 200, "save_interval": 4},
            "run": {"dir": str(tmp_path / "run")},
        }  # fmt: skip
        return config_of(tree, changes)

    return make


def exit_status(*args: object) -> int:
    """Of `python -m training ARGS…`, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["training", *map(str, args)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `python -m training ARGS…` in this process; gives exit status, stdout and stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        status = exit_status(*args)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def printed(command: Command) -> Callable[..., str]:
    """stdout of a command that succeeds and says nothing on stderr."""

    def run(*args: object) -> str:
        status, out, err = command(*args)
        assert (status, err) == (0, "")
        return out

    return run


def train(config: TrainConfig, resume: str = "auto") -> str:
    """Runs the recipe and returns what was printed."""
    output = io.StringIO()
    run_training(config, resume, Console(file=output, width=200))  # type: ignore[arg-type]
    return output.getvalue()
