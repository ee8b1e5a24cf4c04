"""`python -m training recipe`: the recipes there are, and a file of one's own with every key explained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from training.commands.options import JsonFlag, print_result
from training.errors import RecipeError
from training.recipe import (
    config_to_commented_toml,
    config_to_tree,
    find_recipe,
    leading_comment,
    load_config,
    recipe_names,
    recipe_summary,
)


def recipe_command(
    name: Annotated[
        str | None, typer.Argument(help="a recipe's name or file; without one, all names are listed")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    out: Annotated[Path | None, typer.Option(help="TOML file to write, in place of printing")] = None,
    force: Annotated[bool, typer.Option(help="replace the file in --out")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the recipes, or write one out with every key, its meaning and its value."""
    if name is None:
        _list(as_json)
        return
    config = load_config(name, overrides or ())
    text = config_to_commented_toml(config, leading_comment(find_recipe(name)))
    if out is not None:
        _write(out, text, force)
    shown = text.rstrip("\n") if out is None else f"{out}: written; start it with `python -m training train {out}`"
    print_result(as_json, {"out": None if out is None else str(out), "config": config_to_tree(config)}, lines=[shown])


def _list(as_json: bool) -> None:
    summaries = {name: recipe_summary(name) for name in recipe_names()}
    if as_json:
        print_result(as_json, {"recipes": summaries}, lines=[])
        return
    table = Table.grid(padding=(0, 2))
    for name, summary in summaries.items():
        table.add_row(name, summary)
    Console(highlight=False, markup=False).print(table)


def _write(path: Path, text: str, force: bool) -> None:
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{path}: already exists; choose another --out or pass --force to replace it") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
