"""Checkpoints by name, in commands and as the start of a run, from a stand-in for the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_model, read_manifest, save_model
from model.config import gpt2_config
from model.manifest import weights_digest
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from tests.hub_stand_in import HubStandIn, commit_of, take_for_the_hub
from tests.training.conftest import Command, ConfigMaker
from training.build import make_model_config
from training.errors import RecipeError
from training.init_from import start_folder

REPO = "tiny-org/tiny"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = Transformer(gpt2_config(1, 2, 32, vocab_size=257, max_seq_len=64))
    model.init_weights(seed=1)
    save_model(tmp_path / "tiny", model, tokenizer=Tokenizer.bytes(), dtype=torch.float32)
    return tmp_path / "tiny"


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn({REPO: {"main": checkpoint}}) as hub:
        take_for_the_hub(hub, tmp_path / "cache", monkeypatch)
        yield hub
    start_folder.cache_clear()


def test_a_run_starts_from_a_name(
    hub: HubStandIn, checkpoint: Path, make_config: ConfigMaker, tmp_path: Path, command: Command
) -> None:
    # Of the recipe, only what the folder does not decide.
    config = make_config()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[data]\ndir = "{config.data.dir}"\n[model]\ninit_from = "{REPO}"\n')
    run_dir = tmp_path / "from-name"
    keys = [f"run.dir={run_dir}", "train.max_steps=2", "train.seq_len=16", "train.batch_size=2", "train.device=cpu"]
    keys += ["train.eval_interval=2", "train.save_interval=2", "train.warmup_steps=0", "train.eval_tokens=100"]
    status, told, _ = command("train", recipe, *keys)
    assert status == 0
    assert commit_of(REPO, "main") in told
    assert weights_digest(checkpoint) in told
    manifest = read_manifest(run_dir / "checkpoints" / "best")
    assert manifest is not None
    assert manifest.provenance.parent == weights_digest(checkpoint)
    assert f'init_from = "{REPO}"' in (run_dir / "config.toml").read_text()
    assert load_model(run_dir / "checkpoints" / "last").config.hidden_size == 32
    asked = [line for line in hub.requests if line.startswith("GET /api/models/") and "/tree/" not in line]
    assert len(asked) == 2  # for the list of files and by the download: one commit for the whole run


def test_commands_take_names(
    hub: HubStandIn, checkpoint: Path, text_file: Path, tmp_path: Path, command: Command
) -> None:
    for words in (
        ["generate", "MODEL", "--prompt", "a", "--max-tokens", 5, "--greedy", "--device", "cpu"],
        ["evaluate", "MODEL", "--text", text_file, "--device", "cpu", "--json"],
        ["export", "MODEL", "--out", "OUT", "--json"],
    ):
        told = []
        for number, model in enumerate((REPO, checkpoint)):
            values = {"MODEL": model, "OUT": tmp_path / f"out-{words[0]}-{number}"}
            status, out, err = command(*(values.get(str(word), word) for word in words))
            assert status == 0, err
            told.append(out)
        if words[0] in ("generate", "evaluate"):
            assert told[0] == told[1]


def test_what_cannot_be_fetched_is_one_line(hub: HubStandIn, make_config: ConfigMaker, command: Command) -> None:
    for words in (["generate", "tiny-org/none", "--prompt", "a"], ["latency", "tiny-org/none"]):
        assert command(*words) == (
            1, "",
            "error: tiny-org/none is no folder here and no model on the Hub; check the name, and set HF_TOKEN for a "
            "private one\n",
        )  # fmt: skip
    config = make_config(model__init_from="../tiny")
    with pytest.raises(RecipeError, match=r"^model.init_from: \.\./tiny is neither a folder nor a model's name"):
        make_model_config(config, Tokenizer.bytes())
