"""`python -m training train`: a run by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from training.launch import one_voice, share_cores
from training.recipe import describe_fields, load_config

EPILOG = "Keys, their defaults and meaning:\n\n" + describe_fields()


def train(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe, such as training/configs/shakespeare.toml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    resume: Annotated[
        Literal["auto", "never"], typer.Option(help="auto continues the run in run.dir; never refuses to")
    ] = "auto",
) -> None:
    """Train by a recipe. SIGTERM saves and exits 0; the same command then goes on where it stopped."""
    with one_voice():
        config = load_config(recipe, overrides or ())
    share_cores()
    from training.run import run_training

    run_training(config, resume, Console())
