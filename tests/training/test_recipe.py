"""Recipes, overrides, and the errors a typing mistake gives."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.training.conftest import Command
from training.config import SECTIONS, TrainConfig
from training.errors import RecipeError
from training.recipe import (
    CONFIGS,
    build_config,
    config_to_commented_toml,
    config_to_toml,
    config_to_tree,
    describe_fields,
    find_recipe,
    load_config,
    recipe_names,
)
from training.recipe_values import choices, field_types, is_optional

MINIMAL = {"data": {"dir": "d"}, "run": {"dir": "r"}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(MINIMAL | {"train": {"lr": 1e-3}}))
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_package_loads(path: Path) -> None:
    assert isinstance(load_config(path), TrainConfig)


def test_overrides_replace_the_recipe_and_keep_types(recipe: Path) -> None:
    config = load_config(
        recipe,
        ["train.lr=2", "train.compile=true", "data.dir=a b", "model.preset=gpt2", "train.max_steps=1_000",
         'run.sample_prompt="\\n"', "train.dtype=float32", "model.num_layers=3"],
    )  # fmt: skip
    assert config.train.lr == 2.0
    assert isinstance(config.train.lr, float)
    assert config.train.compile is True
    assert (config.data.dir, config.model.preset, config.train.max_steps) == ("a b", "gpt2", 1_000)
    assert (config.run.sample_prompt, config.train.dtype, config.model.num_layers) == ("\n", "float32", 3)


def test_an_empty_value_unsets_a_key_that_need_not_be_set(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(MINIMAL | {"model": {"preset": "gpt2", "dropout": 0.1}, "train": {"compile": True}}))
    config = load_config(path, ["model.preset=", "model.dropout=", "train.compile=", "run.wandb="])
    assert (config.model.preset, config.model.dropout, config.train.compile, config.run.wandb) == (None, None, None, "")


def _values(section: str, item: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    """Any value that the field may hold."""
    hint = field_types(section)[item.name]
    low, high = item.metadata["between"] or (None, None)
    kind = next(t for t in (typing.get_args(hint) or (hint,)) if t is not type(None))
    if allowed := choices(hint):
        values: st.SearchStrategy[Any] = st.sampled_from(allowed)
    elif kind is bool:
        values = st.booleans()
    elif kind is int:
        values = st.integers(1 if low is None else low, 10**6 if high is None else int(high))
    elif kind is float:
        values = st.floats(low, high, allow_nan=False, allow_infinity=False)
    else:
        values = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    return st.none() | values if is_optional(hint) else values


def _sections() -> st.SearchStrategy[dict[str, dict[str, Any]]]:
    return st.fixed_dictionaries({
        section: st.fixed_dictionaries({item.name: _values(section, item) for item in dataclasses.fields(cls)})
        for section, cls in SECTIONS.items()
    })  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_sections())
def test_every_recipe_reads_back_as_itself(tree: dict[str, dict[str, Any]]) -> None:
    tree["data"]["stride"] = tree["train"]["lora_rank"] = 0  # bound to other keys
    tree["model"]["max_seq_len"] = None
    config = build_config(tree)
    assert build_config(config_to_tree(config)) == config
    assert build_config(tomllib.loads(config_to_toml(config))) == config
    commented = config_to_commented_toml(config, "A heading\nof two lines")
    assert build_config(tomllib.loads(commented)) == config
    assert commented.startswith("# A heading\n# of two lines\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1", "unknown key train.learning_rate"),
        ("train.warmup_step=1", "did you mean train.warmup_steps?"),
        ("train.dropout=0.1", "did you mean model.dropout?"),
        ("trian.lr=1", r"unknown section trian; did you mean train\?"),
        ("train.lr", "not of the form"),
        ("lr=1", "not of the form"),
        ("train.lr=fast", "train.lr is 'fast' but must be a number"),
        ("train.lr=nan", "train.lr is nan"),
        ("train.lr=inf", "train.lr is inf"),
        ("train.max_steps=1.5", "train.max_steps is 1.5 but must be an integer"),
        ("train.max_steps=true", "train.max_steps is True but must be an integer"),
        ("train.max_steps=0", "train.max_steps is 0 but must lie between 1"),
        ("train.compile=1", "train.compile is 1 but must be true or false"),
        ("train.dtype=int8", "train.dtype is 'int8' but must be one of float32, bfloat16, float16"),
        ("train.min_lr_ratio=2", "train.min_lr_ratio is 2.0 but must lie between"),
        ("run.keep=-1", "run.keep is -1 but must lie between"),
        ("data.dir=", "data.dir is not set"),
        ("run.dir=", "run.dir is not set"),
        ("model.max_seq_len=8", "train.seq_len is 256 but model.max_seq_len is only 8"),
        ("data.stride=8", "data.stride is 8 but data.loader is packed; set data.loader=sliding"),
        ("train.label_smoothing=1", "train.label_smoothing is 1.0 but must lie between 0.0 and 0.999999999"),
        ("train.z_loss=-0.1", "train.z_loss is -0.1 but must lie between"),
        ("train.muon_momentum=1", "train.muon_momentum is 1.0 but must lie between"),
        ("train.decay_fraction=1.01", "train.decay_fraction is 1.01 but must lie between"),
        ("train.early_stopping=-1", "train.early_stopping is -1 but must lie between"),
        ("train.grad_accum_steps=0", "train.grad_accum_steps is 0 but must lie between 1"),
        ("train.seed=-1", "train.seed is -1 but must lie between 0"),
        ("train.optimizer=sgd", "train.optimizer is 'sgd' but must be one of adamw, muon"),
        ("train.parallel=tp", "train.parallel is 'tp' but must be one of ddp, fsdp"),
        ("model.dropout=nan", "model.dropout is nan but must be a number"),
        ("model.rope_theta=inf", "model.rope_theta is inf but must be a number"),
        ("model.num_layers=2.0", "model.num_layers is 2.0 but must be an integer"),
        ("model.architecture=bert", "model.architecture is 'bert' but must be one of gpt2, openai-gpt"),
        ("train.lr=1" + "0" * 400, "train.lr is inf but must be a number"),
        ("train.max_steps=", "train.max_steps is '' but must be an integer"),
    ],
)
def test_a_mistake_names_the_key(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_config(recipe, [override])


def test_mistakes_in_the_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    with pytest.raises(RecipeError, match=r"recipe\.toml: no such recipe"):
        load_config(path)
    path.write_text("[train\n")
    with pytest.raises(RecipeError, match=r"recipe\.toml: not a readable TOML file"):
        load_config(path)
    path.write_text("[trains]\nlr = 1\n")
    with pytest.raises(RecipeError, match=r"recipe\.toml: unknown section \[trains\]; did you mean train\?"):
        load_config(path)
    with pytest.raises(RecipeError, match="train must be a section"):
        build_config(MINIMAL | {"train": 3})
    path.write_text("train = 3\n")
    with pytest.raises(RecipeError, match="train must be a section"):
        load_config(path, ["train.lr=1"])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"recipe\.toml: not a readable TOML file"):
        load_config(path)
    with pytest.raises(RecipeError, match="not a readable TOML file"):
        load_config(tmp_path)


def test_sliding_sequences_may_not_leave_tokens_out(recipe: Path) -> None:
    assert load_config(recipe, ["data.loader=sliding", "data.stride=256"]).data.stride == 256
    with pytest.raises(RecipeError, match=r"data\.stride is 257 but train\.seq_len only 256"):
        load_config(recipe, ["data.loader=sliding", "data.stride=257"])


def test_a_recipe_of_the_package_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("shakespeare") == find_recipe("shakespeare.toml") == CONFIGS / "shakespeare.toml"
    own = tmp_path / "shakespeare.toml"
    own.write_text(tomli_w.dumps(MINIMAL))
    assert load_config(Path("shakespeare.toml")).data.dir == "d"  # a file comes first
    (tmp_path / "shakespeare").mkdir()  # of a run, or of data
    assert load_config(Path("shakespeare")).data.dir == "data/shakespeare"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shakespear", r"^shakespear: no such recipe; did you mean shakespeare\?$"),
        ("zzz", r"^zzz: no such recipe; known are continue, .*shakespeare-char$"),
        ("configs/shakespeare.toml", r"^configs/shakespeare\.toml: no such recipe; known by name are continue,"),
        ("shakespeare.yaml", r"^shakespeare\.yaml: no such recipe; known by name are"),
    ],
)
def test_a_misspelt_name_is_told_what_there_is(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_config(name)


def test_help_explains_every_key_with_its_default() -> None:
    text = describe_fields()
    words = " ".join(text.split())
    for section, cls in SECTIONS.items():
        for item in dataclasses.fields(cls):
            assert f" {section}.{item.name}" in words
            assert " ".join(item.metadata["help"].split()) in words
            for choice in choices(field_types(section)[item.name]):
                assert choice in words
    assert " train.lr = 0.001 " in words
    assert max(map(len, text.splitlines())) <= 78


# --- the command that lists recipes and writes them ---


def test_the_command_lists_recipes(command: Command) -> None:
    status, out, _ = command("recipe")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines() if not line.startswith(" ")] == recipe_names()
    _, out, _ = command("recipe", "--json")
    assert list(json.loads(out)["recipes"]) == recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_the_command_writes_a_recipe_with_every_key(name: str, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "own.toml"
    status, out, err = command("recipe", name, "train.lr=0.25", "--out", path)
    assert (status, err) == (0, "")
    assert f"python -m training train {path}" in out
    assert load_config(path) == load_config(name, ["train.lr=0.25"])
    text = path.read_text(encoding="utf-8")
    original = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8")
    assert text.startswith(original[: original.index("\n\n")])
    for cls in SECTIONS.values():
        for item in dataclasses.fields(cls):
            assert f"\n{item.name} = " in text or f"\n# {item.name} =\n" in text
    assert command("recipe", name, "train.lr=0.25")[1] == text


def test_the_command_replaces_a_file_only_when_told_to(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "own.toml"
    path.write_text("mine")
    status, _, err = command("recipe", "names", "--out", path)
    assert (status, err) == (1, f"error: {path}: already exists; choose another --out or pass --force to replace it\n")
    assert path.read_text() == "mine"
    assert command("recipe", "names", "--out", path, "--force")[0] == 0
    status, _, err = command("recipe", "names", "--out", tmp_path / "absent" / "own.toml")
    assert (status, err.count("\n")) == (1, 1)
    assert "cannot be written" in err
    status, out, _ = command("recipe", "names", "train.lr=0.5", "--json")
    assert json.loads(out)["config"]["train"]["lr"] == 0.5
