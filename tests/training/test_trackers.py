"""TensorBoard's event files read back by TensorBoard itself; W&B's documented calls on a stand-in module."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.training.conftest import ConfigMaker
from training.errors import RecipeError
from training.recipe import config_to_tree
from training.reporting.trackers import TensorBoard, make_trackers

TRAIN = {"split": "train", "loss": 2.5, "lr": 1e-3, "tokens_per_second": 100.0, "mfu": None, "tokens": 64}
VAL = {"split": "val", "loss": 2.75, "perplexity": math.inf, "bits_per_byte": math.nan, "lr": 1e-3}


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that TensorBoard would show: (step, value), float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_nothing_asked_for_is_nothing_done(make_config: ConfigMaker) -> None:
    trackers = make_trackers(make_config(), "run-1")
    trackers.log({"step": 1, **TRAIN})
    trackers.close()
    assert trackers.trackers == ()
    assert not Path(make_config().run.dir).exists()


def test_tensorboard_shows_each_number_once(make_config: ConfigMaker) -> None:
    config = make_config(run__tensorboard=True)
    trackers = make_trackers(config, "run-1")
    trackers.log({"step": 1, **TRAIN})
    trackers.log({"step": 1, **VAL})
    folder = Path(config.run.dir) / "tensorboard"
    expected = {
        "train/loss": [(1, 2.5)], "train/lr": [(1, pytest.approx(1e-3))], "train/tokens_per_second": [(1, 100.0)],
        "train/tokens": [(1, 64.0)], "val/loss": [(1, 2.75)],
    }  # fmt: skip
    assert events(folder) == expected  # on the disk before the run ends, which a killed run never does
    trackers.close()
    assert events(folder) == expected


def test_tensorboard_without_room_is_named(make_config: ConfigMaker, full_disk: Path) -> None:
    config = make_config(run__tensorboard=True)
    tracker = TensorBoard(Path(config.run.dir) / "tensorboard")
    tracker._open = lambda: full_disk.open("wb")  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(RecipeError, match="run/tensorboard cannot be written: No space left on device"):
            tracker.log(1, {"train/loss": 2.5})
    with pytest.raises(RecipeError, match="run/tensorboard cannot be written: No space left on device"):
        tracker.close()


def test_a_resumed_run_leaves_no_duplicates_in_tensorboard(make_config: ConfigMaker) -> None:
    config = make_config(run__tensorboard=True)
    killed = make_trackers(config, "run-1")
    for step in (1, 2, 3, 4):
        killed.log({"step": step, "split": "train", "loss": float(step)})
    resumed = make_trackers(config, "run-1")  # the first has not been closed
    for step in (3, 4, 5):
        resumed.log({"step": step, "split": "train", "loss": 10.0 + step})
    resumed.close()
    shown = events(Path(config.run.dir) / "tensorboard")
    assert shown == {"train/loss": [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]}
    killed.close()


@pytest.mark.parametrize(
    ("changes", "module", "key", "extra"),
    [
        ({"run__tensorboard": True}, "tensorboard.compat.proto", "run.tensorboard", "quill[tensorboard]"),
        ({"run__wandb": "project"}, "wandb", "run.wandb", "quill[wandb]"),
    ],
)
def test_an_extra_that_is_not_installed_is_named(
    changes: dict[str, Any],
    module: str,
    key: str,
    extra: str,
    make_config: ConfigMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    config = make_config(**changes)
    with pytest.raises(RecipeError, match=rf"^{key} is set but .*'{extra.replace('[', '.').replace(']', '.')}'"):
        make_trackers(config, "run-1")
    assert not Path(config.run.dir).exists()


class FakeRun:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        self.calls.append(("log", data, step))

    def finish(self) -> None:
        self.calls.append(("finish",))


def install_wandb(monkeypatch: pytest.MonkeyPatch, init: Callable[..., FakeRun]) -> None:
    module = ModuleType("wandb")
    module.__dict__.update(init=init, Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_weights_and_biases_is_called_as_documented(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = FakeRun(), {}

    def init(
        *,
        project: str,
        name: str,
        id: str,
        resume: str,
        dir: str,
        config: dict[str, Any],
        allow_val_change: bool,
        save_code: bool,
        settings: dict[str, Any],
    ) -> FakeRun:
        given.update(locals())
        return run

    install_wandb(monkeypatch, init)
    config = make_config(run__wandb="my project")
    trackers = make_trackers(config, "my run/ä:0f3a")
    trackers.log({"step": 3, **TRAIN})
    trackers.log({"step": 3, **VAL})
    trackers.log({"step": 4, "split": "val", "loss": None})
    trackers.close()
    del given["given"], given["run"]
    assert given == {
        "project": "my project", "name": "run", "id": "my-run---0f3a", "resume": "allow", "dir": config.run.dir,
        "config": config_to_tree(config), "allow_val_change": True, "save_code": False,
        "settings": {"disable_code": True, "disable_git": True, "console": "off"},
    }  # fmt: skip
    assert Path(config.run.dir).is_dir()
    assert run.calls == [
        ("log", {"train/loss": 2.5, "train/lr": 1e-3, "train/tokens_per_second": 100.0, "train/tokens": 64}, 3),
        ("log", {"val/loss": 2.75}, 3),
        ("finish",),
    ]


def test_what_weights_and_biases_refuses_is_one_sentence(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> FakeRun:
        raise sys.modules["wandb"].Error("api_key not configured\n(no-tty)")

    install_wandb(monkeypatch, init)
    with pytest.raises(RecipeError, match=r"^run\.wandb: .*api_key not configured \(no-tty\).*WANDB_MODE=offline$"):
        make_trackers(make_config(run__wandb="p"), "run-1")
