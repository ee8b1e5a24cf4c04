"""How soon the server is ready, beside bare `import torch`, and how much memory its engine keeps.

    python -m benchmarks.startup            (or `make bench-startup`)

For the bundled checkpoint and for a GPT-2 124M with random weights, from the page cache: seconds from starting the
process to the first 200 of /ready, and the engine's resident set, when ready and after some requests, against what the
weights and the KV cache's budget explain. Prints tables, then one JSON object, which it also writes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_commit, describe_machine, describe_versions
from benchmarks.make_model import make_model
from benchmarks.server_process import ServerError, running_process
from benchmarks.summary import median
from benchmarks.systems import ROOT, SystemFailedError, run_json
from server.engine.environment import engine_environment

MIB = 1 << 20
# Seconds to /ready beyond bare `import torch`, and MiB beyond weights and the cache's budget, that the project allows.
SECONDS_ALLOWED = {"bundled": 1.0, "gpt2": 2.0}
MEMORY_ALLOWED = 600.0
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BARE_TORCH = (
    "import time; start = time.perf_counter(); import torch; seconds = time.perf_counter() - start;"
    "import json, psutil; print(json.dumps({'seconds': seconds, 'rss': psutil.Process().memory_info().rss}))"
)


def bare_torch(repeats: int) -> dict[str, float]:
    """Seconds of a process that only imports torch, start and end of Python included; its resident MiB."""
    seconds, resident = [], []
    for _ in range(repeats + 1):
        start = perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _BARE_TORCH], capture_output=True, check=True, env=engine_environment(os.environ)
        )
        seconds.append(perf_counter() - start)
        resident.append(json.loads(done.stdout)["rss"] / MIB)
    return {"seconds": median(seconds[1:]), "resident_mib": median(resident[1:])}


def start_server(arguments: Sequence[str], load: Sequence[str]) -> dict[str, float]:
    """One start: seconds to /ready, and the engine's memory then and after the load. Raises ServerError."""
    start = perf_counter()
    command = [sys.executable, "-m", "server", "--log-level", "warning", *arguments]
    with running_process(command, "/ready", poll_seconds=0.005) as (process, url):
        seconds = perf_counter() - start
        engine = engine_process(process.pid)
        figures = {"seconds": seconds, "resident_mib": engine.memory_info().rss / MIB}
        info = httpx.get(f"{url}/info", timeout=10).json()
        run_json([sys.executable, "-m", "benchmarks.serving", "--json-only", "--url", f"{url}/generate", *load])
        figures["resident_after_load_mib"] = engine.memory_info().rss / MIB
        if (peak := peak_mib(engine.pid)) is not None:
            figures["peak_mib"] = peak
    return figures | expected_memory(info)


def engine_process(server_pid: int) -> psutil.Process:
    """The server's child that runs the model. Raises ServerError."""
    for child in psutil.Process(server_pid).children():
        if "server.engine.process" in child.cmdline():
            return child
    raise ServerError("the server has no engine process")


def peak_mib(pid: int) -> float | None:
    """The largest resident set of a process until now, where the system tells."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def expected_memory(info: dict[str, Any]) -> dict[str, float]:
    """MiB of the weights and of the cache's budget, from what /info says."""
    model, limits = info["models"][0], info["limits"]
    config, size = model["config"], _ITEM_BYTES[info["dtype"]]
    per_token = 2 * config["num_layers"] * config["num_kv_heads"] * config["head_dim"] * size
    weight_bytes = 1.03125 if info["quantization"] == "int8" else size  # int8 has a float32 scale for 128 weights
    return {
        "weights_mib": model["num_parameters"] * weight_bytes / MIB,
        "kv_budget_mib": per_token * limits["kv_block_size"] * limits["kv_blocks"] / MIB,
    }


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ServerError or SystemFailedError."""
    torch_alone = bare_torch(args.repeats)
    console.print(f"import torch: {torch_alone['seconds']:.2f} s, {torch_alone['resident_mib']:.0f} MiB")
    rows = {}
    for name, folder in models(args).items():
        arguments = [*(("--model", str(folder)) if folder else ()), "--device", "cpu", *args.server_options.split()]
        vocab_size = 50_257 if folder else 200
        load = ["--clients", "4", "--requests", "8", "--prompt-len", "32", "--output-len", "16"]
        load += ["--vocab-size", str(vocab_size)]
        # The first start reads the files into the page cache, and is not counted.
        runs = [start_server(arguments, load) for _ in range(args.repeats + 1)][1:]
        row = {key: median([run[key] for run in runs]) for key in runs[0]}
        rows[name] = row | judge(name, row, torch_alone)
    return {"import_torch": torch_alone, "models": rows}


def models(args: argparse.Namespace) -> dict[str, Path | None]:
    """The folders by name; None is the bundled one."""
    if args.quick:
        return {"bundled": None}
    folder: Path = args.model or ROOT / "benchmarks" / ".cache" / "gpt2-random"
    if not (folder / "config.json").exists():
        make_model("gpt2", folder)
    return {"bundled": None, "gpt2": folder}


def judge(name: str, row: dict[str, float], torch_alone: dict[str, float]) -> dict[str, Any]:
    """The goals. Memory counts after the load: a cache takes its pages when they are first written."""
    beyond = row["seconds"] - torch_alone["seconds"]
    excess = row["resident_after_load_mib"] - row["weights_mib"] - row["kv_budget_mib"]
    return {
        "seconds_beyond_torch": beyond,
        "seconds_met": beyond <= SECONDS_ALLOWED[name],
        "mib_beyond_torch": row["resident_mib"] - torch_alone["resident_mib"],
        "mib_beyond_weights_and_budget": excess,
        "memory_met": excess <= MEMORY_ALLOWED,
    }


def print_tables(console: Console, figures: dict[str, Any]) -> None:
    times = Table(title="Seconds from start to /ready", title_justify="left")
    for column in ("model", "ready", "import torch", "beyond it", "goal", ""):
        times.add_column(column, justify="left" if column in ("model", "") else "right")
    memory = Table(title="The engine's memory, MiB", title_justify="left")
    columns = ("model", "ready", "beyond torch", "after load", "peak", "weights", "KV budget", "rest", "goal", "")
    for column in columns:
        memory.add_column(column, justify="left" if column in ("model", "") else "right")
    for name, row in figures["models"].items():
        bare = figures["import_torch"]["seconds"]
        seconds = (row["seconds"], bare, row["seconds_beyond_torch"], SECONDS_ALLOWED[name])
        times.add_row(name, *(f"{value:.2f}" for value in seconds), "met" if row["seconds_met"] else "MISSED")
        keys = ("resident_mib", "mib_beyond_torch", "resident_after_load_mib", "peak_mib", "weights_mib")
        cells = (*(row.get(key) for key in keys), row["kv_budget_mib"], row["mib_beyond_weights_and_budget"])
        shown = ("–" if value is None else f"{value:,.0f}" for value in cells)
        memory.add_row(name, *shown, f"≤ {MEMORY_ALLOWED:.0f}", "met" if row["memory_met"] else "MISSED")
    console.print(times)
    console.print(memory)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="a GPT-2 124M folder; default: random weights, made once")
    parser.add_argument("--repeats", type=int, default=3, help="counted starts of each")
    parser.add_argument("--server-options", default="", help="further options for the server")
    parser.add_argument("--out", type=Path, help="the JSON file; default: benchmarks/results/DATE-startup.json")
    parser.add_argument("--quick", action="store_true", help="the bundled model only, one start")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = 1
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    started = datetime.now(UTC)
    try:
        figures = measure(args, console)
    except (ServerError, SystemFailedError, httpx.HTTPError) as error:
        print(f"startup benchmark failed: {error}", file=sys.stderr)
        return 1
    print_tables(console, figures)
    result = {"date": started.isoformat(timespec="seconds"), **describe_commit(ROOT), "machine": describe_machine()}
    result |= {"versions": describe_versions(), **figures}
    out: Path = args.out or ROOT / "benchmarks" / "results" / f"{started:%Y-%m-%d-%H%M}-startup.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
