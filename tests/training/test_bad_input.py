"""Every mistake is one line that names the file or the field, exit status 1, and nothing on disk has changed."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.training.conftest import exit_status, make_text
from tests.training.crash_harness import RECIPE

Harm = Callable[[], object]


def tree() -> dict[str, str]:
    """Everything below the working folder: sha256 of files, kinds of the rest."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(Path().rglob("*"))
        if path.name != ".lock"  # held while a run folder is looked at
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """words.txt, data (bytes) and characters prepared from it, recipe.toml and a run of it."""
    folder = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("words.txt").write_text(make_text(300), encoding="utf-8")
        Path("recipe.toml").write_text(RECIPE.format(data="data"), encoding="utf-8")
        assert exit_status("prepare", "--input", "words.txt", "--out", "data", "--tokenizer", "bytes") == 0
        assert exit_status("prepare", "--input", "words.txt", "--out", "characters", "--tokenizer", "char") == 0
        assert exit_status("train", "recipe.toml") == 0
    return folder


@pytest.fixture
def refused(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Calls the command line in a copy of `finished`, after some harm, and checks how it is refused."""
    place = tmp_path / "place"
    shutil.copytree(finished, place)
    monkeypatch.chdir(place)

    def check(command: str, *named: str, harm: Harm = lambda: None) -> None:
        harm()
        before = tree()
        capfd.readouterr()
        status = exit_status(*command.split())
        output = capfd.readouterr()
        assert status == 1, output.out + output.err
        assert output.err.startswith("error: "), output.err
        assert output.err.count("\n") == 1, output.err
        assert "Traceback" not in output.err
        assert not output.err.startswith("error: [Errno"), output.err
        for part in named:
            assert part in output.err, output.err
        assert tree() == before

    return check


def write(name: str, content: str | bytes) -> Harm:
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path(name).write_bytes(data)


def cut(name: str) -> Harm:
    """Loses the second half."""
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[: Path(name).stat().st_size // 2])


def flip(name: str) -> Harm:
    def harm() -> None:
        data = bytearray(Path(name).read_bytes())
        data[random.Random(0).randrange(len(data))] ^= 16
        Path(name).unlink()  # hard links to it stay whole
        Path(name).write_bytes(data)

    return harm


def garble(name: str) -> Harm:
    """JSON with a string that is not UTF-8."""
    return lambda: Path(name).write_bytes(Path(name).read_bytes().replace(b'": "', b'": "\xff', 1))


def lose(name: str) -> Harm:
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def turn_into_folder(name: str) -> Harm:
    def harm() -> None:
        Path(name).unlink(missing_ok=True)
        Path(name).mkdir()

    return harm


def recipe(old: str, new: str) -> Harm:
    def harm() -> None:
        text = Path("recipe.toml").read_text(encoding="utf-8")
        assert old in text
        Path("recipe.toml").write_text(text.replace(old, new, 1), encoding="utf-8")

    return harm


def nothing() -> None:
    pass


PREPARE = [
    ("a missing file", nothing, "--input absent.txt", ["absent.txt"]),
    ("an empty file", write("empty.txt", ""), "--input empty.txt", ["empty.txt", "empty"]),
    ("nothing to validate on", write("one.txt", "a"), "--input one.txt", ["train split"]),
    ("no text at all", write("blob", bytes(range(256))), "--input blob", ["blob", "UTF-8"]),
    ("a text that ends inside a character", write("cut.txt", "naïve".encode()[:3]), "--input cut.txt", ["cut.txt"]),
    ("a folder without text", turn_into_folder("void"), "--input void", ["void"]),
    ("a line that is no JSON", write("a.jsonl", '{"text": "a"}\n{"text\n'), "--input a.jsonl", ["a.jsonl"]),
    ("rows without a text", write("a.jsonl", '{"body": "a"}\n'), "--input a.jsonl", ["a.jsonl", "text"]),
    ("no gzip", write("a.txt.gz", "plain"), "--input a.txt.gz", ["a.txt.gz"]),
    ("gzip cut short", write("a.txt.gz", gzip.compress(b"ink " * 999)[:-9]), "--input a.txt.gz", ["a.txt.gz"]),
    ("no zstandard", write("a.txt.zst", "plain"), "--input a.txt.zst", ["a.txt.zst"]),
    ("no parquet", write("a.parquet", "PAR1"), "--input a.parquet", ["a.parquet"]),
    ("an unknown tokenizer", nothing, "--input words.txt --tokenizer gtp2", ["--tokenizer", "gtp2"]),
    ("a tokenizer that is none", write("t.json", "{}"), "--input words.txt --tokenizer t.json", ["t.json"]),
    ("a share above one", nothing, "--input words.txt --val-fraction 1.5", ["--val-fraction"]),
    ("a share that is no number", nothing, "--input words.txt --val-fraction nan", ["--val-fraction"]),
    ("a negative share", nothing, "--input words.txt --val-fraction -0.1", ["--val-fraction"]),
    ("fewer workers than none", nothing, "--input words.txt --workers -1", ["--workers"]),
    ("a digest without a URL", nothing, "--input words.txt --sha256 00", ["--sha256"]),
    ("a URL without a digest", nothing, "--input http://127.0.0.1:1/a.txt", ["--sha256"]),
    ("a URL that does not answer", nothing, "--input http://127.0.0.1:1/a.txt --sha256 00", ["http://127.0.0.1:1/"]),
]


@pytest.mark.parametrize(
    ("harm", "options", "named"), [case[1:] for case in PREPARE], ids=[case[0] for case in PREPARE]
)
def test_prepare_refuses(harm: Harm, options: str, named: list[str], refused: Callable[..., None]) -> None:
    tokenizer = "" if "--tokenizer" in options else "--tokenizer bytes"
    refused(f"prepare --out new {tokenizer} {options}", *named, harm=harm)


OUT = [
    ("that is a file", "words.txt", ["words.txt"]),
    ("below a file", "words.txt/data", ["words.txt/data"]),
    ("that holds something else", "run", ["run"]),
    ("that holds other data", "data", ["data", "--force"]),
]


@pytest.mark.parametrize(("out", "named"), [case[1:] for case in OUT], ids=[case[0] for case in OUT])
def test_prepare_writes_to_no_folder(out: str, named: list[str], refused: Callable[..., None]) -> None:
    refused(f"prepare --input words.txt --tokenizer char --out {out}", *named)


RECIPES = [
    ("missing", lose("recipe.toml"), ["recipe.toml"]),
    ("a folder", turn_into_folder("recipe.toml"), ["recipe.toml"]),
    ("not TOML", write("recipe.toml", "[data\n"), ["recipe.toml"]),
    ("not UTF-8", write("recipe.toml", b"[data]\ndir = '\xff'"), ["recipe.toml"]),
    ("empty", write("recipe.toml", ""), ["data.dir"]),
    ("with an unknown section", recipe("[run]", "[runs]"), ["recipe.toml", "[runs]", "did you mean run"]),
    ("with a value for a section", write("recipe.toml", "run = 1"), ["recipe.toml", "[run]"]),
    ("with an unknown key", recipe("lr =", "learning_rate ="), ["train.learning_rate"]),
    ("with a key of another section", recipe("lr =", "dropout ="), ["train.dropout", "model.dropout"]),
    ("with text for a number", recipe("1e-2", "'fast'"), ["train.lr", "'fast'", "a number"]),
    ("with a fraction for a count", recipe("= 2", "= 2.5"), ["model.num_heads", "2.5", "integer"]),
    ("with true for a count", recipe("= 2", "= true"), ["model.num_heads", "True", "integer"]),
    ("with an unknown choice", recipe('"llama"', '"lama"'), ["model.architecture", "lama"]),
    ("with no run.dir", recipe('dir = "run"', ""), ["run.dir"]),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "named"), [case[1:] for case in RECIPES], ids=[case[0] for case in RECIPES])
def test_a_recipe_is_refused(harm: Harm, named: list[str], refused: Callable[..., None]) -> None:
    refused("train recipe.toml", *named, harm=harm)


# Each begins a new run, if it is not refused.
OVERRIDES = [
    ("lr=1", ["lr=1", "section.key=value"]),
    ("train.lr", ["train.lr", "section.key=value"]),
    ("=", ["section.key=value"]),
    ("trian.lr=1", ["trian", "did you mean train"]),
    ("train.lrs=1", ["train.lrs", "did you mean train.lr"]),
    ("train.lr=", ["train.lr"]),
    ("train.lr=nan", ["train.lr"]),
    ("train.lr=inf", ["train.lr"]),
    ("train.lr=-1", ["train.lr", "-1"]),
    ("train.grad_clip=-1", ["train.grad_clip"]),
    ("train.batch_size=0", ["train.batch_size"]),
    ("train.max_steps=-5", ["train.max_steps"]),
    ("train.seed=-1", ["train.seed"]),
    ("train.dtype=float8", ["train.dtype", "float8"]),
    ("train.device=tpu", ["device", "tpu"]),
    ("train.device=cuda:99", ["device", "cuda:99"]),
    ("train.seq_len=33", ["train.seq_len", "33", "32"]),
    ("model.max_seq_len=1000000 train.seq_len=5000", ["train.seq_len", "5000", "tokens"]),
    ("model.hidden_size=17", ["hidden_size", "17"]),
    ("model.num_heads=0", ["num_heads"]),
    ("model.num_layers=-1", ["num_layers"]),
    ("model.num_kv_heads=3", ["num_kv_heads", "num_heads"]),
    ("model.dropout=1.5", ["dropout"]),
    ("model.dropout=nan", ["dropout"]),
    ("model.vocab_multiple=0", ["model.vocab_multiple"]),
    ("model.preset=gpt5", ["preset", "gpt5"]),
    ("model.init_from=absent", ["absent"]),
    ("data.dir=absent", ["absent"]),
    ("data.dir=run", ["run"]),
    ("data.dir=words.txt", ["words.txt"]),
    ("run.dir=words.txt", ["run.dir", "words.txt"]),
    ("run.dir=words.txt/run", ["words.txt/run"]),
    ("run.sample_tokens=4 run.sample_prompt=" + "a" * 99, ["run.sample_prompt"]),
]


@pytest.mark.parametrize(("override", "named"), OVERRIDES, ids=[case[0][:40] for case in OVERRIDES])
def test_an_override_is_refused(override: str, named: list[str], refused: Callable[..., None]) -> None:
    refused(f"train recipe.toml run.dir=new {override}", *named)


def beyond_the_vocabulary() -> None:
    """Token 300 of 257, with the sha256 of what the shard holds."""
    shard = Path("data/train-00000.bin")
    tokens = np.fromfile(shard, dtype="<u2")
    tokens[7] = 300
    tokens.tofile(shard)
    manifest = json.loads(Path("data/manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    Path("data/manifest.json").write_text(json.dumps(manifest))


DATA = [
    ("a shard cut short", cut("data/train-00000.bin"), ["data/train-00000.bin"]),
    ("a flipped bit", flip("data/val-00000.bin"), ["data/val-00000.bin", "sha256"]),
    ("a shard lost", lose("data/val-00000.bin"), ["data/val-00000.bin"]),
    ("a token beyond the vocabulary", beyond_the_vocabulary, ["data/train-00000.bin", "300", "257"]),
    ("a manifest cut short", cut("data/manifest.json"), ["data/manifest.json"]),
    ("a manifest that is no text", garble("data/manifest.json"), ["data/manifest.json"]),
    ("no manifest", lose("data/manifest.json"), ["data"]),
    ("no tokenizer", lose("data/tokenizer"), ["data/tokenizer"]),
    (
        "another tokenizer",
        lambda: shutil.copytree("characters/tokenizer", "data/tokenizer", dirs_exist_ok=True),
        ["data/tokenizer"],
    ),
]


@pytest.mark.parametrize("run", ["new", "run"])
@pytest.mark.parametrize(("harm", "named"), [case[1:] for case in DATA], ids=[case[0] for case in DATA])
def test_damaged_data_is_refused(harm: Harm, named: list[str], run: str, refused: Callable[..., None]) -> None:
    refused(f"train recipe.toml train.max_steps=6 run.dir={run}", *named, harm=harm)


RAW = [
    ("of an odd length", b"\0\1\2", ["raw/train.bin"]),
    ("of no tokens", b"", ["raw/train.bin"]),
    ("with a token beyond the vocabulary", b"\x2c\1" * 99, ["raw/train.bin", "300"]),
    ("without another to validate on", b"a\0" * 99, ["raw", "val"]),
]


@pytest.mark.parametrize(("content", "named"), [case[1:] for case in RAW], ids=[case[0] for case in RAW])
def test_a_raw_token_file_is_refused(content: bytes, named: list[str], refused: Callable[..., None]) -> None:
    Path("raw").mkdir()
    refused(
        "train recipe.toml run.dir=new data.tokenizer=bytes data.dir=raw", *named, harm=write("raw/train.bin", content)
    )


def every_state(harm: Callable[[str], Harm], name: str) -> Harm:
    return lambda: [harm(str(path))() for path in Path("run/state").glob(f"*/{name}")]


# Each would continue the finished run, or replace it.
RESUMED = [
    ("by a word not to", nothing, "--resume never", ["run", "--resume auto"]),
    ("with another rate", nothing, "train.lr=0.5", ["train.lr", "0.5", "0.01"]),
    ("with another model", nothing, "model.hidden_size=32", ["model.hidden_size", "32", "16"]),
    ("with another sequence length", nothing, "train.seq_len=8", ["train.seq_len"]),
    ("with another seed", nothing, "train.seed=1", ["train.seed", "1337"]),
    ("with other data", nothing, "data.dir=characters", ["data"]),
    ("from flipped tensors", every_state(flip, "*.safetensors"), "", ["run/state", "safetensors"]),
    ("from tensors cut short", every_state(cut, "*.safetensors"), "", ["run/state", "safetensors"]),
    ("without tensors", every_state(lose, "*.safetensors"), "", ["run/state"]),
    ("from descriptions cut short", every_state(cut, "state.json"), "", ["run/state", "state.json"]),
    ("from descriptions with bytes that are no text", every_state(garble, "state.json"), "", ["state.json"]),
    ("without descriptions", every_state(lose, "state.json"), "", ["state.json"]),
    ("without states", lose("run/state"), "", ["run", "state"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("harm", "options", "named"), [case[1:] for case in RESUMED], ids=[case[0] for case in RESUMED]
)
def test_a_run_is_not_resumed(harm: Harm, options: str, named: list[str], refused: Callable[..., None]) -> None:
    refused(f"train recipe.toml train.max_steps=6 {options}", *named, harm=harm)


def test_two_trainers_do_not_share_a_folder(refused: Callable[..., None]) -> None:
    with open("run/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused("train recipe.toml train.max_steps=6", "run", "another process")


@pytest.mark.parametrize("value", ["two", "-1", "0", "", "1.5"])
def test_a_world_of_no_size_is_refused(
    value: str, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    refused("train recipe.toml run.dir=new", "WORLD_SIZE")


BEST = "run/checkpoints/best"
CHECKPOINTS = [
    ("missing", lose(BEST), f"--text words.txt {BEST}", [BEST]),
    ("a file", nothing, "--text words.txt words.txt", ["words.txt"]),
    ("with a flipped weight", flip(f"{BEST}/model.safetensors"), f"--text words.txt {BEST}", ["model.safetensors"]),
    ("with weights cut short", cut(f"{BEST}/model.safetensors"), f"--text words.txt {BEST}", ["model.safetensors"]),
    ("without weights", lose(f"{BEST}/model.safetensors"), f"--text words.txt {BEST}", ["model.safetensors"]),
    ("with a changed configuration", flip(f"{BEST}/config.json"), f"--text words.txt {BEST}", ["config.json"]),
    ("without its tokenizer", lose(f"{BEST}/tokenizer.json"), f"--text words.txt {BEST}", ["tokenizer.json"]),
    ("on a missing text", nothing, f"--text absent.txt {BEST}", ["absent.txt"]),
    ("on an empty text", write("empty.txt", ""), f"--text empty.txt {BEST}", ["empty.txt", "empty"]),
    ("on one byte", write("one.txt", "a"), f"--text one.txt {BEST}", ["two tokens"]),
    ("on no text", write("blob", b"\xff"), f"--text blob {BEST}", ["blob", "UTF-8"]),
    ("on a folder", nothing, f"--text data {BEST}", ["data"]),
    ("on data of another tokenizer", nothing, f"--data characters {BEST}", ["characters", "tokenizer"]),
    ("on an unknown split", nothing, f"--data data --split dev {BEST}", ["data", "dev"]),
    ("on nothing", nothing, BEST, ["--data", "--text"]),
    ("beyond its context", nothing, f"--text words.txt --seq-len 33 {BEST}", ["--seq-len", "33", "32"]),
    ("with a stride of none", nothing, f"--text words.txt --stride 0 {BEST}", ["--stride"]),
    ("on a device that is not there", nothing, f"--text words.txt --device tpu {BEST}", ["tpu"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("harm", "options", "named"), [case[1:] for case in CHECKPOINTS], ids=[case[0] for case in CHECKPOINTS]
)
def test_a_checkpoint_is_not_evaluated(
    harm: Harm, options: str, named: list[str], refused: Callable[..., None]
) -> None:
    refused(f"evaluate {options}", *named, harm=harm)


@pytest.mark.parametrize("harmed", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_checkpoint_generates_nothing(harmed: str, refused: Callable[..., None]) -> None:
    refused(f"generate {BEST} --prompt ink --max-tokens 2", harmed, harm=flip(f"{BEST}/{harmed}"))


@pytest.mark.parametrize(
    "command",
    ["train", "train recipe.toml --resume maybe", "prepare --input words.txt", "evaluate", "dance", "train --fast r"],
)
def test_wrong_usage_has_a_status_of_its_own(
    command: str, finished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    before = tree()
    assert exit_status(*command.split()) == 2
    output = capfd.readouterr()
    assert "Traceback" not in output.err
    assert output.err
    assert tree() == before


def test_a_byte_order_mark_before_a_recipe_does_no_harm(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    marked = tmp_path / "marked.toml"
    marked.write_bytes(b"\xef\xbb\xbf" + Path("recipe.toml").read_bytes())
    assert exit_status("train", marked, f"run.dir={tmp_path / 'run'}", "train.max_steps=1") == 0
