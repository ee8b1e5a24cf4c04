"""Runs killed at any moment, or met by a full disk, go on as if nothing had happened, to the byte."""

from __future__ import annotations

import functools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.crash_harness import (
    ROOT,
    Launcher,
    Result,
    Workshop,
    check_whole,
    launched,
    leftovers,
    make_workshop,
    outcome,
)

KILLED = -signal.SIGKILL
HALF = {"float32": (), "bfloat16": ("train.dtype=bfloat16",)}
ASYNC = "run.async_save=true"
ALLOCATING = ("mkdir", "link", "rename", "replace", "fsync", "serialize_file")


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with launched() as running:
        yield running


@pytest.fixture(scope="module")
def workshop(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("crash"), launcher)


class Broken:
    """A run and the same run broken off, from its start or from half way, under some overrides."""

    def __init__(self, workshop: Workshop, overrides: tuple[str, ...], fresh: bool) -> None:
        self.workshop, self.overrides = workshop, overrides
        self.start = None if fresh else workshop.new(" ".join(("half-way", *overrides)))
        if self.start is not None:
            result = workshop.train(self.start, *overrides, kill_when="run/state/step-2")
            assert result.status == KILLED
            check_whole(self.start / "run")
        whole = workshop.new("whole")
        assert workshop.train(whole, *overrides).status == 0
        self.expected = outcome(whole / "run")
        place = workshop.new("survey", self.start)
        survey = workshop.train(place, *overrides, survey="run")
        assert survey.status == 0
        assert outcome(place / "run") == self.expected
        self.operations = survey.operations

    def distinct(self) -> list[int]:
        """The operations before which the folder is not what it was before the last one."""
        changes = zip(self.operations, [("", ""), *self.operations], strict=False)
        return [number for number, ((_, now), (_, before)) in enumerate(changes) if now != before]

    def refusable(self) -> list[int]:
        """The operations that can find no room although they write no content."""
        return [number for number, (name, _) in enumerate(self.operations) if name in ALLOCATING]

    def hit(self, **fault: Any) -> tuple[Path, Result]:
        place = self.workshop.new("broken", self.start)
        result = self.workshop.train(place, *self.overrides, **fault)
        if self.start is not None:
            check_whole(place / "run")
        return place, result

    def resume(self, place: Path, what: str) -> None:
        resumed = self.workshop.train(place, *self.overrides)
        assert (resumed.status, resumed.stderr) == (0, ""), what
        assert leftovers(place / "run") == [], what
        assert outcome(place / "run") == self.expected, what

    def kill(self, number: int) -> None:
        place, result = self.hit(kill_at=number)
        assert result.status in (KILLED, 0)  # saved beside the steps, a run's operations are not always as many
        self.resume(place, f"killed before operation {number}")

    def fill_disk(self, **fault: Any) -> bool:
        """Whether the fault was met: a run may be done writing when the disk becomes full."""
        place, result = self.hit(**fault)
        if result.status:
            assert_clear_error(result, place)
            assert leftovers(place / "run") == [], fault
        self.resume(place, str(fault))
        return bool(result.status)


BrokenRuns = Callable[..., Broken]


@pytest.fixture(scope="module")
def runs(workshop: Workshop) -> BrokenRuns:
    @functools.cache
    def prepared(*overrides: str, fresh: bool = False) -> Broken:
        return Broken(workshop, overrides, fresh)

    return prepared


def assert_clear_error(result: Result, place: Path) -> None:
    assert result.status == 1, result.stderr
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "run/" in result.stderr or str(place) in result.stderr, f"names no file: {result.stderr}"
    assert "No space left" in result.stderr or "File too large" in result.stderr, result.stderr


def some(numbers: list[int], count: int, seed: int = 0) -> list[int]:
    """So many of them by chance, the same every time: all of them are for the slow tests."""
    return sorted(random.Random(seed).sample(numbers, count))


@pytest.mark.parametrize("dtype", HALF)
def test_killed_inside_a_save_and_resumed(dtype: str, runs: BrokenRuns) -> None:
    """Anywhere from the resumption of a run to its end."""
    broken = runs(*HALF[dtype])
    points = broken.distinct()
    assert len(points) > 40  # the hook has met the save's operations
    for number in some(points, 5, seed=len(dtype)):
        broken.kill(number)


def test_killed_at_its_start_and_resumed(runs: BrokenRuns) -> None:
    broken = runs(fresh=True)
    for number in some(broken.distinct(), 3):
        broken.kill(number)


def test_killed_while_saving_beside_the_steps(runs: BrokenRuns) -> None:
    broken = runs(ASYNC)
    for number in some(broken.distinct(), 3):
        broken.kill(number)


def random_kills(workshop: Workshop, count: int, *overrides: str) -> None:
    """One run that `count` SIGKILLs break off, each at a moment within what is left of it, then resumed to its end."""
    longer = ("train.max_steps=40", "train.save_interval=4", "train.eval_interval=8", ASYNC, *overrides)
    whole = workshop.new("whole")
    seconds = workshop.train(whole, *longer).seconds
    place, chance, killed = workshop.new("broken"), random.Random(1), 0
    for _ in range(20 * count):
        result = workshop.train(place, *longer, kill_after=chance.random() * seconds / 2)
        if (place / "run" / "state" / "step-8").exists():
            check_whole(place / "run")
        if result.status == 0:  # it came to its end: begin another
            assert outcome(place / "run") == outcome(whole / "run")
            place = workshop.new("broken")
        killed += result.status == KILLED
        if killed == count:
            break
    assert killed == count
    assert workshop.train(place, *longer).status == 0
    assert leftovers(place / "run") == []
    assert outcome(place / "run") == outcome(whole / "run")


def test_killed_at_random_moments(workshop: Workshop) -> None:
    random_kills(workshop, 3)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_afterwards(runs: BrokenRuns) -> None:
    """No file can grow any more from one operation on; one operation alone finds no room."""
    broken = runs()
    numbers = range(0, len(broken.operations), len(broken.operations) // 5)
    assert sum(broken.fill_disk(disk_full_at=number) for number in numbers) >= 3
    for number in some(broken.refusable(), 3):
        assert broken.fill_disk(refuse_at=number)


def test_a_full_disk_while_saving_beside_the_steps(runs: BrokenRuns) -> None:
    broken = runs(ASYNC)
    for number in some(broken.distinct(), 3):
        broken.fill_disk(disk_full_at=number)


def test_a_full_disk_at_the_very_start(runs: BrokenRuns) -> None:
    broken = runs(fresh=True)
    for number in (0, 5, 20):
        broken.fill_disk(disk_full_at=number)


PREPARE = ("prepare", "--input", "../words.txt", "--out", "run", "--tokenizer", "bytes")


def test_prepare_killed_or_without_room_leaves_nothing_half_written(workshop: Workshop, launcher: Launcher) -> None:
    place = workshop.new("prepare")
    survey = launcher.run(place, *PREPARE, survey="run")
    expected = {path.name: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    assert survey.status == 0
    assert len(expected) >= 4
    for number in range(0, len(survey.operations), 12):
        place = workshop.new("prepare")
        full = launcher.run(place, *PREPARE, disk_full_at=number)
        if full.status:
            assert_clear_error(full, place)
            assert list(place.iterdir()) == []
        else:
            workshop.new("prepare")
        assert launcher.run(place, *PREPARE, kill_at=number).status == KILLED
        assert launcher.run(place, *PREPARE).status == 0
        assert {path.name: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()} == expected
        assert [path.name for path in place.iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fresh", "overrides"),
    [(True, ()), (False, ()), (False, HALF["bfloat16"]), (False, (ASYNC,)), (True, (ASYNC, *HALF["bfloat16"]))],
)
def test_killed_before_every_single_operation(fresh: bool, overrides: tuple[str, ...], runs: BrokenRuns) -> None:
    broken = runs(*overrides, fresh=fresh)
    for number in range(len(broken.operations)):
        broken.kill(number)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_killed_at_twenty_random_moments(dtype: str, workshop: Workshop) -> None:
    random_kills(workshop, 20, *HALF[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), (ASYNC,)], ids=["saving first", "saving beside"])
def test_a_disk_full_at_every_single_operation(overrides: tuple[str, ...], runs: BrokenRuns) -> None:
    broken = runs(*overrides)
    for number in range(len(broken.operations)):
        broken.fill_disk(disk_full_at=number)
    for number in broken.refusable():
        broken.fill_disk(refuse_at=number)


@pytest.mark.slow
def test_killed_while_the_report_is_written(workshop: Workshop) -> None:
    place = workshop.new("broken")
    assert workshop.train(place, page=True, kill_when="run/.report*").status == KILLED
    assert workshop.train(place, page=True).status == 0
    assert (place / "run" / "report.html").is_file()
    assert leftovers(place / "run") == []


@pytest.mark.slow
def test_the_module_itself_killed_and_resumed(workshop: Workshop) -> None:
    """No hooks, no forks: `python -m training train` of a shell."""
    longer = ("train.max_steps=400", "train.save_interval=20", "train.eval_interval=40", ASYNC)
    whole, place, chance = workshop.new("whole"), workshop.new("broken"), random.Random(2)
    assert workshop.train(whole, *longer).status == 0
    command = [sys.executable, "-m", "training", "train", str(workshop.recipe), f"run.dir={place / 'run'}", *longer]
    for _ in range(4):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while not (place / "run" / "metrics.jsonl").exists() or process.poll() is not None:
            time.sleep(0.01)
        time.sleep(chance.random())
        process.kill()
        process.wait()
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=120).returncode == 0
    assert leftovers(place / "run") == []
    assert outcome(place / "run") == outcome(whole / "run")


@pytest.mark.slow
def test_a_file_system_that_is_really_full(runs: BrokenRuns, workshop: Workshop, tmp_path: Path) -> None:
    """Sizes of a tmpfs from one that holds no state to one that holds most of a run."""
    broken = runs()
    for kilobytes in (16, 64, 128, 256, 320):
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(tmp_path)], capture_output=True, text=True
        )
        if mounted.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
        try:
            result = workshop.train(tmp_path)
            assert_clear_error(result, tmp_path)
            assert leftovers(tmp_path / "run") == []
            remount = ["mount", "-o", "remount,size=8m", str(tmp_path)]
            subprocess.run(remount, check=True)
            broken.resume(tmp_path, f"{kilobytes} KB")
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)
