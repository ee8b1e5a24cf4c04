"""Recipes, overrides, and the errors a typing mistake gives."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tomli_w

from training.config import TrainConfig
from training.errors import RecipeError
from training.recipe import build_config, config_to_toml, describe_fields, load_config
from training.schedule import learning_rate

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
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


def test_the_resolved_recipe_reads_back_as_itself(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["model.preset=gpt2", "train.lr=3.3e-4"])
    (tmp_path / "resolved.toml").write_text(config_to_toml(config))
    assert load_config(tmp_path / "resolved.toml") == config


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


def test_help_explains_every_key() -> None:
    text = describe_fields()
    for key in ("data.dir", "model.preset", "model.dropout", "train.grad_accum_steps", "train.device", "run.keep"):
        assert f"{key}" in text


def test_learning_rate_follows_warm_up_and_cosine() -> None:
    def at(step: int) -> float:
        return learning_rate(step, peak=2.0, min_ratio=0.1, warmup_steps=10, max_steps=111)

    assert [at(0), at(4), at(9)] == pytest.approx([0.2, 1.0, 2.0])
    for step in range(10, 111):
        expected = 0.2 + 1.8 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert at(step) == pytest.approx(expected)
    assert at(10) == pytest.approx(2.0)
    assert at(110) == pytest.approx(0.2)
    assert at(500) == pytest.approx(0.2)
    assert learning_rate(0, peak=1.0, min_ratio=0.5, warmup_steps=0, max_steps=1) == 1.0
