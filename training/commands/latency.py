"""`python -m training latency`: time and memory of a model over a grid of batch sizes and lengths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.commands.options import DeviceOption, DtypeOption, JsonFlag
from training.errors import RecipeError
from training.evaluation.tables import ResultTable, require_writable, show
from training.reporting.quantities import byte_size

if TYPE_CHECKING:
    from training.evaluation.latency import LatencyCell


def latency_command(
    model: Annotated[str, typer.Argument(help="checkpoint folder, or a preset, whose weights are then random")],
    batch_sizes: Annotated[str, typer.Option(help="sequences at a time, separated by commas")] = "1,8",
    lengths: Annotated[
        str | None, typer.Option(help="tokens of each prompt; default: 128,512, or what the model's context allows")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="tokens to decode behind each prompt")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="measurements that a median is taken of")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="untimed ones before them")] = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    force: Annotated[bool, typer.Option(help="replace --out if it exists")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Time the reading of a prompt (prefill) and each token after it (decode, with the KV cache); tell the memory."""
    sizes = _numbers("--batch-sizes", batch_sizes)
    wanted = None if lengths is None else _numbers("--lengths", lengths)
    require_writable("--out", out, force=force)

    from dataclasses import asdict

    import torch

    from training.build import DTYPES
    from training.evaluation.latency import LatencyPlan, fitting_lengths, measure_latency, open_model
    from training.evaluation.progress import progress_bars

    opened = open_model(model, device=device, dtype=DTYPES[dtype])
    device_used, context = opened.model.device, opened.model.config.max_seq_len
    plan = LatencyPlan(sizes, fitting_lengths(wanted, new_tokens, context), new_tokens, warmup, repeats)
    with progress_bars(enabled=not as_json) as on_progress:
        cells = measure_latency(opened.model, plan, on_progress)
    values: dict[str, Any] = {
        "model": model,
        "device": str(device_used),
        "device_name": torch.cuda.get_device_name(device_used) if device_used.type == "cuda" else None,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "parameters": opened.num_parameters,
        "weights_bytes": opened.weights_bytes,
        "new_tokens": new_tokens,
        "grid": [asdict(cell) for cell in cells],
    }
    show(values, [_table(values, cells)], as_json=as_json, out=out)


def _numbers(option: str, text: str) -> list[int]:
    """Raises RecipeError unless the text is positive whole numbers with commas between them."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(f"{option} is {text!r} but must be positive whole numbers with commas between, such as 1,8")
    return [int(part) for part in parts]


def _table(values: dict[str, Any], cells: list[LatencyCell]) -> ResultTable:
    place = values["device_name"] or f"{values['device']}, {values['threads']} threads"
    title = (
        f"{values['model']}: {values['parameters']:,} parameters, {byte_size(values['weights_bytes'])} of "
        f"{values['dtype']} on {place}; {values['new_tokens']} tokens decoded"
    )
    columns = ["batch", "length", "prefill ms", "tokens/s", "decode ms/token", "tokens/s", "KV cache"]
    rows = [
        [
            str(cell.batch_size), str(cell.length),
            f"{cell.prefill_ms:,.2f}", f"{cell.prefill_tokens_per_second:,.0f}",
            f"{cell.decode_ms_per_token:,.3f}", f"{cell.decode_tokens_per_second:,.0f}", byte_size(cell.cache_bytes),
        ]
        for cell in cells
    ]  # fmt: skip
    if any(cell.peak_bytes is not None for cell in cells):
        columns.append("peak memory")
        rows = [[*row, byte_size(cell.peak_bytes or 0)] for row, cell in zip(rows, cells, strict=True)]
    return ResultTable(title, columns, rows, text_columns=())
