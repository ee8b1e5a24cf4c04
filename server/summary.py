"""What the server says of itself when it is ready: a table on a terminal, one log line elsewhere.

`rich` is imported for a terminal alone: elsewhere nobody waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from server.engine.messages import CLASSIFICATION, NO, YES, EngineInfo, ModelInfo
from server.settings import Settings

logger = logging.getLogger("server")

_DETERMINISM = {
    YES: "yes: tokens do not depend on what else runs",
    NO: "no: tokens may depend on what else runs",
}
_NOT_CHECKED = "checked in the first idle moment, and told by /info"


def summary_rows(info: EngineInfo, settings: Settings, url: str) -> list[tuple[str, str]]:
    """Names and values, in the order in which they are shown. `url` is the server's address for a browser."""
    rows = [("model" if index == 0 else "", _model(model)) for index, model in enumerate(info.models)]
    rows += [
        ("weights", _weights(info, settings)),
        ("device", f"{_device(info)}, attention by {info.attention_backend}"),
    ]
    if any(model.task != CLASSIFICATION for model in info.models):
        rows += [
            ("KV cache", _cache(info)),
            ("at once", f"{info.max_num_seqs:,} sequences, {info.max_num_batched_tokens:,} tokens in a step"),
            ("deterministic", _DETERMINISM.get(info.deterministic, _NOT_CHECKED)),
        ]
    return [
        *rows,
        ("ready", f"{info.load_seconds:.1f} s to load"),
        ("page", f"{url}/"),
        ("API", f"{url}/docs, {url}/metrics"),
    ]


def _model(model: ModelInfo) -> str:
    origin = [f"{name} {model.provenance[name]}" for name in ("run", "step") if model.provenance.get(name) is not None]
    return ", ".join([f"{model.name}: {format_count(model.num_parameters)} parameters", *origin])


def _device(info: EngineInfo) -> str:
    known = info.device_name.startswith(info.device)
    return info.device_name if known else f"{info.device_name} ({info.device})"


def _weights(info: EngineInfo, settings: Settings) -> str:
    return info.dtype if settings.quantization == "none" else f"{settings.quantization}, computed in {info.dtype}"


def _cache(info: EngineInfo) -> str:
    tokens = info.num_blocks * info.block_size
    contexts = tokens // info.max_model_len
    whole = "context" if contexts == 1 else "contexts"
    return (
        f"{info.num_blocks:,} blocks of {info.block_size}: {tokens:,} tokens, {contexts:,} {whole} of"
        f" {info.max_model_len:,}"
    )


def format_count(number: int) -> str:
    """Three digits and a unit: 124M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return str(number)


def show_summary(info: EngineInfo, settings: Settings, url: str) -> None:
    rows = summary_rows(info, settings, url)
    if not sys.stderr.isatty():
        logger.info("ready: %s", "; ".join(f"{name} {value}".strip() for name, value in rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(value))
    Console(stderr=True).print(table)


@contextlib.contextmanager
def loading_shown(names: list[str]) -> Iterator[None]:
    """On a terminal, a line that tells that the models are being loaded, and for how long."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(f"loading {', '.join(names)}", total=None)
        yield
