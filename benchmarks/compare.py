"""Quill and its peers side by side in one run: same weights, same workload, same threads, one after another.

    python -m benchmarks.compare            (or `make bench`)

Every round runs each system once, in turning order; the figures are medians over the rounds, and what counts are
the ratios. Writes a JSON file with all rounds beside the tables. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import available_cores, describe_commit, describe_machine, describe_versions
from benchmarks.peers_environment import PeersError, convert_model, peers_python
from benchmarks.ratios import CLIENTS, HTTP, LLAMA_SERVER, Figures, Ratio, cpu_goals
from benchmarks.ratios import compare as compare_with
from benchmarks.summary import median_of_dicts
from benchmarks.systems import ROOT, Plan, System, SystemFailedError, SystemSkippedError, systems

QUICK = {"num_layers": 2, "num_heads": 2, "hidden_size": 64}
CACHE = ROOT / "benchmarks" / ".cache"


def measure(found: list[System], rounds: int, console: Console) -> tuple[dict[str, list[Figures]], dict[str, str]]:
    """Run every system once per round. Returns the figures by system, and what went wrong by system.

    Rounds run the systems in alternating order, so that a drift of the machine's speed favours nobody. A system that
    failed is not tried again, and neither is one that does not apply here: its details say why it was `skipped`.
    """
    figures: dict[str, list[Figures]] = {}
    failures: dict[str, str] = {}
    for number in range(rounds):
        for system in found if number % 2 == 0 else reversed(found):
            if system.name in failures or "skipped" in system.details:
                continue
            start = perf_counter()
            try:
                measured = system.run(number)
            except SystemSkippedError as error:
                system.details["skipped"] = str(error)
                console.print(f"{system.name} is skipped: {error}", markup=False, style="yellow")
                continue
            except SystemFailedError as error:
                failures[system.name] = str(error)
                console.print(f"round {number + 1}/{rounds}: {system.name} FAILED: {error}", markup=False, style="red")
                continue
            figures.setdefault(system.name, []).append(measured)
            console.print(f"round {number + 1}/{rounds}: {system.name} ({perf_counter() - start:.0f} s)", markup=False)
    return {name: runs for name, runs in figures.items() if name not in failures}, failures


def print_speeds(console: Console, medians: dict[str, Figures]) -> None:
    table = Table(title="Tokens per second (medians)", title_justify="left")
    table.add_column("system")
    columns = [(what, n) for what in ("end_to_end", "decode") for n in CLIENTS] + [("prefill", CLIENTS[-1])]
    for what, streams in columns:
        table.add_column(f"{what.replace('_', ' ')}\n{streams}", justify="right")
    for name, figures in medians.items():
        cells = [figures.get(f"{what}/{streams}") for what, streams in columns]
        table.add_row(name, *("–" if cell is None else f"{cell:,.0f}" for cell in cells))
    console.print(table)


def print_latencies(console: Console, medians: dict[str, Figures]) -> None:
    """Of every server that was measured."""
    servers = {name: medians[name] for name in (HTTP, LLAMA_SERVER) if name in medians}
    table = Table(title="Over HTTP, milliseconds (medians)", title_justify="left")
    table.add_column("system")
    for column in ("clients", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "E2E p50", "client's CPU"):
        table.add_column(column, justify="right")
    for name, figures in servers.items():
        for clients in CLIENTS:
            names = ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "e2e_ms_p50")
            values = [figures.get(f"{key}/{clients}") for key in names]
            cells = ["–" if value is None else f"{value:.1f}" for value in values]
            table.add_row(name, str(clients), *cells, f"{figures[f'client_cpu_share/{clients}']:.1%}")
    if servers:
        console.print(table)


def print_ratios(console: Console, found: Sequence[Ratio]) -> None:
    """The goals; for times the ratio is theirs ÷ ours."""
    table = Table(title="Goals: ours ÷ the best of theirs (of times: theirs ÷ ours)", title_justify="left")
    for column in ("", "ours", "theirs", "of", "ratio", "goal", ""):
        table.add_column(column, justify="left" if column in ("", "of") else "right")
    for ratio in found:
        if ratio.value is None and ratio.goal.least is None:
            continue
        table.add_row(*ratio_cells(ratio))
    console.print(table)


def ratio_cells(ratio: Ratio) -> tuple[str, ...]:
    unit = " ms" if ratio.goal.is_time else ""
    ours, theirs = (
        "–" if value is None else f"{value:,.1f}{unit}" if value < 1_000 else f"{value:,.0f}{unit}"
        for value in (ratio.ours, ratio.theirs)
    )
    value = "–" if ratio.value is None else f"{ratio.value:.2f}"
    goal = "" if ratio.goal.least is None else f"≥ {ratio.goal.least:g}"
    verdict = "" if ratio.met is None else "met" if ratio.met else "MISSED"
    if ratio.value is None:
        verdict = f"not measured: {ratio.missing}"
    return ratio.goal.name, ours, theirs, ratio.against, value, goal, verdict


def prepare(args: argparse.Namespace, console: Console) -> Plan:
    """Make what is missing: the model, the peers' environment, the converted weights. Raises PeersError."""
    model: Path = args.model or CACHE / ("gpt2-random-quick" if args.quick else "gpt2-random")
    if args.model is None and not (model / "config.json").exists():
        console.print("making a GPT-2 with random weights")
        from benchmarks.make_model import make_model

        make_model("gpt2", model, **(QUICK if args.quick else {}))
    config = json.loads((model / "config.json").read_text())
    python = None
    converted = CACHE / f"{model.name}.peers"
    if not args.no_peers and args.device != "cuda":
        python = peers_python(console)
        convert_model(python, model, converted, console)
    return Plan(
        model=model,
        converted=converted,
        vocab_size=config["vocab_size"],
        threads=args.threads,
        seconds=args.seconds,
        prompt_len=args.prompt_len,
        output_len=args.output_len,
        device=args.device,
        peers_python=python,
        engine_options=tuple(shlex.split(args.engine_options)),
        context=config.get("n_positions") or config["max_position_embeddings"],
    )


def run(args: argparse.Namespace, console: Console) -> int:
    machine = describe_machine()
    plan = prepare(args, console)
    found = systems(plan)
    if args.no_peers:
        found = [system for system in found if system.kind != "peer"]
    started = datetime.now(UTC)
    figures, failures = measure(found, args.rounds, console)
    medians = {system.name: median_of_dicts(figures[system.name]) for system in found if system.name in figures}
    comparison = compare_with(cpu_goals(), medians)
    print_speeds(console, medians)
    print_latencies(console, medians)
    print_ratios(console, comparison)
    result: dict[str, Any] = {
        "date": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        **describe_commit(ROOT),
        "machine": machine,
        "versions": describe_versions(),
        "workload": {
            name: getattr(plan, name) for name in ("prompt_len", "output_len", "threads", "seconds", "device")
        },
        "systems": {system.name: system.details for system in found},
        "medians": medians,
        "ratios": [ratio.as_dict() for ratio in comparison],
        "rounds": figures,
        "failures": failures,
    }
    out: Path = args.out or ROOT / "benchmarks" / "results" / f"{started:%Y-%m-%d-%H%M}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written to {os.path.relpath(out)}", markup=False)
    return 1 if failures else 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="a GPT-2 folder; default: 124M with random weights, made once")
    parser.add_argument("--out", type=Path, help="the JSON file; default: benchmarks/results/DATE.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="time per system, round and batch size")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the CPU-only peers are left out"
    )
    parser.add_argument("--no-peers", action="store_true", help="Quill alone")
    parser.add_argument(
        "--engine-options", default="", metavar="OPTIONS",
        help="further options for the engine alone and the server alike, such as '--quantization int8'",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="does it all run? a tiny model, figures that say nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.seconds, args.prompt_len, args.output_len = 1, 0.0, 8, 6
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        return run(args, console)
    except (PeersError, FileNotFoundError) as error:
        console.print(f"benchmark failed: {error}", markup=False, style="red")
        return 2


if __name__ == "__main__":
    sys.exit(main())
