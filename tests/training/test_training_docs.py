"""Every training command that the documents show is one that the real command line accepts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.training.shell import shell_commands, training_command
from training.cli import app
from training.recipe import CONFIGS, build_config, config_to_tree, load_config, recipe_names
from training.recipe_values import field_types

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "training.md"
DOCUMENTS = [GUIDE, ROOT / "README.md"]
COMMANDS = [(path.name, command) for path in DOCUMENTS for command in shell_commands(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("document", "words"), COMMANDS)
def test_a_command_in_the_documents_is_accepted(document: str, words: str) -> None:
    name, options = training_command(words)
    if name in ("train", "info", "recipe") and options.get("recipe", options.get("name")) is not None:
        recipe = Path(str(options.get("recipe") or options["name"]))
        # A reader's own file is taken for one of the package's.
        known = recipe.stem in recipe_names()
        config = load_config(recipe.stem if known else "llama-small", options["overrides"] or ())
        assert build_config(config_to_tree(config)) == config


def test_the_guide_shows_every_command() -> None:
    shown = {training_command(words)[0] for document, words in COMMANDS if document == GUIDE.name}
    assert {command.name for command in app.registered_commands} <= shown


def test_the_guide_lists_every_recipe() -> None:
    rows = set(re.findall(r"^\| `([a-z0-9-]+)` \| ", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {path.stem for path in CONFIGS.glob("*.toml")} <= rows


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_keys_that_the_documents_name_exist(path: Path) -> None:
    named = re.findall(r"`(data|model|train|run)\.(?!bin|safetensors)([a-z_0-9]+)", path.read_text(encoding="utf-8"))
    assert [f"{section}.{key}" for section, key in named if key not in field_types(section)] == []
    assert named


def test_links_of_the_guide_lead_somewhere() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    anchors = {re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-")
               for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}  # fmt: skip
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert (GUIDE.parent / target).exists()
