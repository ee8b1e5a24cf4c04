"""A bit that flips, a file cut short or lost: told in one sentence that names the file, and never trained on."""

from __future__ import annotations

import random
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.checkpoint import load_model
from model.errors import QuillError
from tests.training.conftest import make_text, train
from tests.training.crash_harness import RECIPE, outcome
from training.checkpoint import read_state, step_folders
from training.config import TrainConfig
from training.data.dataset import open_split
from training.data.prepare import PrepareRequest, prepare
from training.errors import ResumeError
from training.recipe import build_config


def config_of(folder: Path, run: str) -> TrainConfig:
    tree = tomllib.loads(RECIPE.format(data=folder / "data"))
    tree["run"]["dir"] = str(folder / run)
    return build_config(tree)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a whole `run`."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "words.txt").write_bytes(make_text(300).encode())
    prepare(PrepareRequest((str(folder / "words.txt"),), folder / "data", "bytes"))
    train(config_of(folder, "run"))
    return folder


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file, and the reading of it that must notice damage."""

    name: str
    pattern: str
    read: Callable[[Path], object]


def open_shard(path: Path) -> object:
    return open_split(path.parent, path.name.partition("-")[0])


KINDS = [
    Kind("shard", "data/*.bin", open_shard),
    Kind("weights", "run/checkpoints/*/model.safetensors", lambda path: load_model(path.parent)),
    Kind("config", "run/checkpoints/best/*config.json", lambda path: load_model(path.parent)),
    Kind("tokenizer", "run/checkpoints/last/tokenizer.json", lambda path: load_model(path.parent)),
    Kind("tensors", "run/state/*/*.safetensors", lambda path: read_state(path.parent)),
    Kind("state", "run/state/*/state.json", lambda path: read_state(path.parent)),
]
KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def files_of(folder: Path, kind: Kind) -> list[Path]:
    found = sorted(folder.glob(kind.pattern))
    assert found
    for path in found:
        kind.read(path)  # whole as it is
    return found


@contextmanager
def damaged(path: Path, content: bytes | None) -> Iterator[None]:
    """The file holds something else, or is not there, for a while. Its hard links are not touched."""
    kept = path.with_name("kept")
    path.rename(kept)
    try:
        if content is not None:
            path.write_bytes(content)
        yield
    finally:
        kept.replace(path)


def flipped(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def assert_told(kind: Kind, path: Path, what: object) -> None:
    with pytest.raises(QuillError) as caught:
        kind.read(path)
    message = str(caught.value)
    assert path.name in message, what
    assert str(path.parent) in message or kind.name == "config", what
    assert "\n" not in message, what


@KIND
def test_every_flipped_bit_is_found(kind: Kind, finished: Path) -> None:
    """170 a kind, a thousand in all."""
    chance, files = random.Random(kind.name), files_of(finished, kind)
    for number in range(170):
        path = chance.choice(files)
        content = path.read_bytes()
        changed = flipped(content, chance)
        with damaged(path, changed):
            if kind.name == "state":
                read_or_refuse(kind, path, content, changed)
            else:
                assert_told(kind, path, f"{path}, flip {number}")


def read_or_refuse(kind: Kind, path: Path, content: bytes, changed: bytes) -> None:
    """Of JSON, spaces may change without harm: whatever is read is what was written."""
    try:
        found = kind.read(path)
    except ResumeError:
        assert_told(kind, path, changed)
        return
    path.write_bytes(content)
    assert kind.read(path) == found, changed


@KIND
@pytest.mark.parametrize("left", ["nothing", "half", "all but a byte", "more", "no file"])
def test_a_file_cut_short_or_lost_is_found(kind: Kind, left: str, finished: Path) -> None:
    for path in files_of(finished, kind):
        content = path.read_bytes()
        size = {"nothing": 0, "half": len(content) // 2, "all but a byte": len(content) - 1}.get(left, len(content))
        if kind.name == "state" and left in ("all but a byte", "more"):
            continue  # that byte is the line's end, and spaces do no harm
        new = content[:size] + (b"\0" if left == "more" else b"")
        with damaged(path, None if left == "no file" else new):
            assert_told(kind, path, path)


@pytest.mark.parametrize(
    ("pattern", "read"),
    [
        ("data/manifest.json", lambda path: open_split(path.parent, "train")),
        ("run/checkpoints/last/manifest.json", lambda path: load_model(path.parent)),
    ],
)
def test_a_damaged_manifest_is_read_or_refused_but_nothing_else(
    pattern: str, read: Callable[[Path], object], finished: Path
) -> None:
    chance = random.Random(0)
    (path,) = finished.glob(pattern)
    content = path.read_bytes()
    messages = []
    for _ in range(150):
        with damaged(path, flipped(content, chance)):
            try:
                read(path)
            except QuillError as error:
                messages.append(str(error))
    assert len(messages) > 75
    assert [message for message in messages if "\n" in message] == []
    with damaged(path, b""), pytest.raises(QuillError, match=r"manifest\.json"):
        read(path)


def cut_tensors(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])


def flip_tensors(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(flipped(path.read_bytes(), random.Random(0)))


def lose_state(folder: Path) -> None:
    (folder / "state.json").unlink()


def lose_everything(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("harm", [cut_tensors, flip_tensors, lose_state, lose_everything])
def test_a_run_goes_on_from_the_older_state(harm: Callable[[Path], None], finished: Path) -> None:
    """The last two steps are taken again, with the same result to the byte."""
    shutil.rmtree(finished / "again", ignore_errors=True)
    shutil.copytree(finished / "run", finished / "again")
    (_, older), (_, newest) = step_folders(finished / "again" / "state")[-2:]
    harm(newest)
    output = train(config_of(finished, "again"))
    assert "damaged" in output
    assert str(newest) in " ".join(output.split()).replace(" ", "") or newest.name in output
    assert outcome(finished / "again") == outcome(finished / "run")
    assert older.is_dir()


def test_a_run_without_a_whole_state_is_refused_and_left_alone(finished: Path) -> None:
    shutil.rmtree(finished / "again", ignore_errors=True)
    shutil.copytree(finished / "run", finished / "again")
    for _, folder in step_folders(finished / "again" / "state"):
        flip_tensors(folder)
    before = {path: path.read_bytes() for path in (finished / "again").rglob("*") if path.is_file()}
    with pytest.raises(ResumeError, match="holds no whole state"):
        train(config_of(finished, "again"))
    assert {path: path.read_bytes() for path in (finished / "again").rglob("*") if path.is_file()} == before
