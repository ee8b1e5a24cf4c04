"""Options that several commands share, and the way all of them print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from model.hub import resolve_model

JsonFlag = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
DtypeOption = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="type of weights and products")]


def model_folder(argument: Path) -> Path:
    """The folder of a checkpoint that is named by its folder or by its name on the Hub, with or without @revision.

    Raises HubError or CheckpointError.
    """
    return resolve_model(str(argument))


def print_result(as_json: bool, values: dict[str, Any], lines: list[str]) -> None:
    print(json.dumps(values) if as_json else "\n".join(lines))
