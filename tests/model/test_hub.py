"""Models by name, from a stand-in for the Hub on this machine, and from the cache without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch

from model.checkpoint import load_model, save_model
from model.config import gpt2_config
from model.errors import CheckpointError, HubError
from model.hub import HubName, pinned_name, resolve_model, wanted_files
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from tests.hub_stand_in import HubStandIn, commit_of, take_for_the_hub

REPO = "tiny-org/tiny"
LOADED = ["config.json", "generation_config.json", "manifest.json", "model.safetensors", "tokenizer.json"]
LOADED += ["tokenizer_config.json"]
SECRET = "hf_not_to_be_seen_anywhere"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, with what repositories hold besides: other formats, code, a card, folders."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    model = Transformer(gpt2_config(1, 2, 32, vocab_size=257, max_seq_len=32))
    model.init_weights(seed=1)
    save_model(folder, model, tokenizer=Tokenizer.bytes(), dtype=torch.float32)
    for name in ("pytorch_model.bin", "tf_model.h5", "modeling_tiny.py", "README.md", "consolidated.safetensors"):
        (folder / name).write_bytes(b"not to be fetched")
    (folder / "onnx").mkdir()
    (folder / "onnx/model.safetensors").write_bytes(b"not to be fetched")
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A stand-in that huggingface_hub takes for the Hub, with an empty cache."""
    with HubStandIn({REPO: {"main": folder, "v1": folder}, "gpt2": {"main": folder}}) as hub:
        take_for_the_hub(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield hub


def test_a_folder_is_itself(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(folder) == resolve_model(str(folder)) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_model("tiny") == Path("tiny")


def test_only_files_that_are_read_are_fetched(hub: HubStandIn, folder: Path) -> None:
    found = resolve_model(REPO)
    assert found.name == commit_of(REPO, "main")
    assert hub.fetched == sorted(path.name for path in found.iterdir()) == LOADED
    for name in LOADED:
        assert (found / name).read_bytes() == (folder / name).read_bytes()


def test_the_second_time_nothing_is_fetched(hub: HubStandIn, capfd: pytest.CaptureFixture[str]) -> None:
    first = resolve_model(REPO)
    assert "Fetching 6 files" in capfd.readouterr().err
    hub.requests.clear()
    assert resolve_model(REPO) == first
    assert hub.requests == [f"GET /api/models/{REPO}"]
    assert capfd.readouterr() == ("", "")


def test_a_branch_that_moves_is_followed(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    first = resolve_model(f"{REPO}@v1")
    shutil.copytree(folder, tmp_path / "newer")
    (tmp_path / "newer/config.json").write_text((folder / "config.json").read_text() + " ")
    hub.commits[REPO, "v1"] = "f" * 40
    hub.repositories[REPO]["v1"] = tmp_path / "newer"
    second = resolve_model(f"{REPO}@v1")
    assert (second.name, (second / "config.json").read_text()[-1]) == ("f" * 40, " ")
    assert (first / "config.json").read_text() == (folder / "config.json").read_text()


def test_a_model_is_loaded_by_name(hub: HubStandIn, folder: Path) -> None:
    by_name, by_path = load_model("gpt2").state_dict(), load_model(folder).state_dict()
    assert by_name.keys() == by_path.keys()
    assert all(torch.equal(by_name[name], by_path[name]) for name in by_path)


def test_a_path_is_never_taken_for_a_name(hub: HubStandIn) -> None:
    with pytest.raises(Exception, match="is not a folder"):
        load_model(Path(REPO))
    assert hub.requests == []


@pytest.mark.parametrize("behind_the_name", [True, False])
def test_revisions_are_pinned(hub: HubStandIn, behind_the_name: bool) -> None:
    found = resolve_model(f"{REPO}@v1") if behind_the_name else resolve_model(REPO, "v1")
    assert found.name == commit_of(REPO, "v1") != commit_of(REPO, "main")
    pinned = pinned_name(HubName(REPO), found)
    assert pinned == f"{REPO}@{commit_of(REPO, 'v1')}"
    assert resolve_model(pinned) == found


@pytest.mark.parametrize("manner", ["offline", "unreachable", "failing"])
def test_the_cache_answers_when_the_hub_does_not(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, manner: str) -> None:
    found = resolve_model(REPO)
    if manner == "offline":
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    elif manner == "unreachable":
        monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    else:
        hub.broken.add(REPO)
    assert resolve_model(REPO) == resolve_model(f"{REPO}@main") == resolve_model(f"{REPO}@{found.name}") == found
    (found / "model.safetensors").unlink()
    with pytest.raises(HubError, match="lies in the cache only in part, and "):
        resolve_model(REPO)
    shutil.rmtree(found)
    reason = {"offline": "HF_HUB_OFFLINE is set", "unreachable": "cannot be reached", "failing": "status 500"}[manner]
    with pytest.raises(HubError, match=rf"neither a folder here nor in the cache, and .*{reason}"):
        resolve_model(REPO)


def test_a_download_that_was_cut_short_goes_on(hub: HubStandIn) -> None:
    found = resolve_model(REPO)
    (found / "tokenizer.json").unlink()
    hub.requests.clear()
    assert resolve_model(REPO) == found
    assert (found / "tokenizer.json").is_file()


def test_a_full_disk_is_told(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> str:
        raise OSError(28, "No space left on device", "a path of the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(HubError, match=r"and the files could not be fetched \(No space left on device\)$"):
        resolve_model(REPO)


def test_shards_are_fetched_with_their_index(hub: HubStandIn, folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    save_model(tmp_path / "sharded", model, tokenizer=Tokenizer.bytes(), max_shard_bytes=20_000)
    hub.repositories["tiny-org/sharded"] = {"main": tmp_path / "sharded"}
    loaded = load_model("tiny-org/sharded").state_dict()
    assert "model.safetensors.index.json" in hub.fetched
    assert len([name for name in hub.fetched if name.startswith("model-0")]) > 1
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_pickled_weights_are_refused_before_anything_is_fetched(hub: HubStandIn, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("{}")
    (tmp_path / "old/pytorch_model.bin").write_bytes(b"\x80\x04")
    hub.repositories["tiny-org/old"] = {"main": tmp_path / "old"}
    with pytest.raises(CheckpointError, match=r"tiny-org/old holds pytorch_model.bin but no model.safetensors; only"):
        resolve_model("tiny-org/old")
    assert hub.fetched == []
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        wanted_files(["model.safetensors"], HubName("a/b"))
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors; only"):
        wanted_files(["config.json", "onnx/model.bin"], HubName("a/b"))


def test_what_the_hub_refuses_is_told(hub: HubStandIn) -> None:
    with pytest.raises(HubError, match="tiny-org/none is no folder here and no model on the Hub; check the name"):
        resolve_model("tiny-org/none")
    with pytest.raises(HubError, match="tiny-org/tiny has no revision v9; name a branch, a tag or a commit"):
        resolve_model(f"{REPO}@v9")
    hub.gated.add(REPO)
    with pytest.raises(HubError, match="asks its users to accept terms first"):
        resolve_model(REPO)


@pytest.mark.parametrize(
    "name",
    [
        "../x", "./x", "/x", "~/x", "a/b/c", "https://hub/a/b", "https:/hub/a", "a@b@c", "@x", "x@", "a/b@../../etc",
        "a/b@x//y", "a/b@-x", "a--b/c", "-a/b", "a/.b", "a..b/c", "a b", "a/b\n", "a\\b", "", "x.git", "ą/b", "x" * 200,
    ],
)  # fmt: skip
def test_hostile_names_never_reach_the_network(hub: HubStandIn, name: str) -> None:
    with pytest.raises(HubError, match="is neither a folder nor a model's name such as"):
        resolve_model(name or " ")
    assert hub.requests == []


def test_a_revision_is_given_once(hub: HubStandIn) -> None:
    with pytest.raises(HubError, match="revision is given twice"):
        resolve_model(f"{REPO}@v1", "main")


def test_without_the_library_names_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        HubError, match=r"tiny-org/tiny is no folder here; .* install the extra hub \(huggingface_hub\)"
    ):
        resolve_model(REPO)


def test_a_token_is_sent_and_never_shown(
    hub: HubStandIn, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    resolve_model(REPO)
    hub.broken.add("gpt2")
    with pytest.raises(HubError) as raised:
        resolve_model("gpt2")
    assert f"Bearer {SECRET}" in hub.tokens
    shown = caplog.text + "".join(capfd.readouterr()) + str(raised.value)
    assert SECRET not in shown
    assert pinned_name(HubName(REPO), Path(commit_of(REPO, "main"))) in caplog.text


def test_the_librarys_environment_variables_decide(folder: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, in a process of its own: first over the network, then without one."""
    program = (
        "import json, sys; from model.hub import resolve_model; folder = resolve_model(sys.argv[1]);"
        "print(json.dumps([str(folder), 'torch' in sys.modules]))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["HF_HOME"] = str(tmp_path / "home")

    def run(**settings: str) -> tuple[list[object], str]:
        done = subprocess.run(
            [sys.executable, "-c", program, REPO],
            env=environment | settings, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return json.loads(done.stdout), done.stderr

    with HubStandIn({REPO: {"main": folder}}) as hub:
        (first, has_torch), progress = run(HF_ENDPOINT=hub.url)
        assert hub.fetched == LOADED
    assert Path(str(first)).is_relative_to(tmp_path / "home")
    assert "Fetching 6 files" in progress
    assert has_torch is False
    assert run(HF_HUB_OFFLINE="1")[0] == [first, False]
