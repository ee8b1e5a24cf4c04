"""The command line as its users call it. In-process where possible: every new process imports torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.conftest import Command, ConfigMaker
from training.recipe import config_to_toml
from training.step import StepResult
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]


def test_from_text_to_generated_text(
    text_file: Path,
    make_config: ConfigMaker,
    tmp_path: Path,
    printed: Callable[..., str],
) -> None:
    data, recipe = tmp_path / "data", tmp_path / "recipe.toml"
    prepared = json.loads(printed("prepare", "--input", text_file, "--out", data, "--tokenizer", "char", "--json"))
    assert prepared["written"] is True
    assert prepared["train"]["characters"] + prepared["val"]["characters"] == len(text_file.read_text("utf-8"))
    recipe.write_text(config_to_toml(make_config()))
    trained = printed("train", recipe, "--resume", "never", f"data.dir={data}", "train.max_steps=4", "train.lr=5e-3")
    assert "finished at step 4" in trained
    best = Path(make_config().run.dir) / "checkpoints" / "best"
    values = json.loads(printed("evaluate", best, "--data", data, "--device", "cpu", "--json"))
    assert {"loss", "perplexity", "bits_per_byte", "tokens"} == values.keys()
    assert "bits per byte" in printed("evaluate", best, "--text", text_file)
    generated = json.loads(
        printed("generate", best, "--prompt", "ink", "--max-tokens", 5, "--num-samples", 2, "--json")
    )
    assert [sample["seed"] for sample in generated["samples"]] == [0, 1]
    assert (
        printed("generate", best, "--prompt", "ink", "--max-tokens", 5)
        == "ink" + generated["samples"][0]["text"] + "\n"
    )


@pytest.mark.parametrize("between", [[], ["--input"]])
def test_several_inputs_follow_one_option_or_several(
    between: list[str],
    text_file: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    options = ["--out", tmp_path / "data", "--tokenizer", "bytes", "--json"]
    _, out, _ = command("prepare", "--input", text_file, *between, text_file, *options)
    prepared = json.loads(out)
    assert prepared["train"]["bytes"] + prepared["val"]["bytes"] == 2 * text_file.stat().st_size


def test_sigterm_ends_training_with_status_0(
    make_config: ConfigMaker, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.train_step

    def signalling(self: Trainer) -> StepResult:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", signalling)
    (tmp_path / "recipe.toml").write_text(config_to_toml(make_config()))
    status, out, err = command("train", tmp_path / "recipe.toml")
    assert (status, err) == (0, "")
    assert "stopped and saved at step 1" in out
    monkeypatch.setattr(Trainer, "train_step", original)
    status, out, err = command("train", tmp_path / "recipe.toml", "train.max_steps=0")
    assert (status, out) == (1, "")
    assert err == "error: train.max_steps is 0 but must lie between 1 and 1000000000000\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("prepare", "--input", "absent.txt", "--out", "data"), "error: absent.txt: no such file"),
        (("train", "absent.toml"), "error: absent.toml: no such recipe"),
        (("evaluate", "absent", "--text", "absent.txt"), "error: absent is neither a folder"),
        (("generate", "absent"), "error: absent is neither a folder"),
        (("generate", "absent", "--temperature", "3"), "error: temperature must lie in"),
    ],
)
def test_a_mistake_is_one_line_and_a_failing_exit_status(
    args: tuple[str, ...], message: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*args)
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_finds_no_room_is_told(unbuffered: str, full_disk: Path) -> None:
    command, environment = [sys.executable, "-m", "training"], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with full_disk.open("w") as output:
        result = subprocess.run(
            [*command, "recipe", "--json"], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.PIPE,
            text=True, timeout=60, check=False,
        )  # fmt: skip
    expected = "error: standard output cannot be written: No space left on device\n"
    assert (result.returncode, result.stderr) == (1, expected)


def test_a_reader_that_has_had_enough_is_left_in_peace() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        result = subprocess.run(
            [sys.executable, "-m", "training", "recipe", "--json"], cwd=ROOT, stdout=output, stderr=subprocess.PIPE,
            text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (result.returncode, result.stderr) == (1, "")


def test_help_needs_no_torch_and_explains_the_recipe() -> None:
    code = (
        "import sys; sys.argv = ['training', 'train', '--help']\n"
        "from training.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "train.grad_accum_steps" in result.stdout


def test_the_module_runs_and_fails_with_a_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training", "prepare", "--input", str(tmp_path), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
