"""The systems of a comparison: each can be run once, as processes of its own, and returns plain figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.server_process import ServerError, running_server

ROOT = Path(__file__).parents[1]
CLIENTS = (1, 8, 32)
ENGINE_BATCHES = (1, 8, 32, 64)
# Waves of all clients at once per run: enough for about two seconds each.
WAVES = {1: 4, 8: 3, 32: 2}
TIMEOUT_SECONDS = 300

Figures = dict[str, float]
"""`what/streams` → value, such as `end_to_end/32`; rates in tokens per second, times in milliseconds."""


class SystemFailedError(Exception):
    """A system could not be measured."""


@dataclass(frozen=True)
class System:
    """`kind` is engine, http or peer; `run(round)` measures once. `details` collects what the run said of itself."""

    name: str
    kind: str
    run: Callable[[int], Figures]
    details: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured and how. `threads` holds for every system; `seconds` is spent per batch size."""

    model: Path
    converted: Path
    vocab_size: int
    threads: int
    seconds: float
    prompt_len: int
    output_len: int
    device: str
    peers_python: Path | None
    engine_options: tuple[str, ...]


def run_json(command: Sequence[str]) -> dict[str, Any]:
    """Run a script from the repository root; returns the JSON object on its last line. Raises SystemFailedError."""
    try:
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemFailedError(str(error)) from error
    if result.returncode != 0:
        raise SystemFailedError(f"exit code {result.returncode}: {result.stderr[-1_500:].strip()}")
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def systems(plan: Plan) -> list[System]:
    """Ours first, then every peer that the plan has a place for."""
    found = [engine_system(plan), http_system(plan), transformers_system(plan)]
    if plan.peers_python is not None:
        converted = plan.converted
        found += [
            peer_system(plan, "CTranslate2 int8", "ctranslate2_peer", converted / "ct2", "int8"),
            peer_system(plan, "CTranslate2 float32", "ctranslate2_peer", converted / "ct2", "float32"),
            peer_system(plan, "llama.cpp bf16", "llamacpp_peer", converted / "bf16.gguf", "bf16"),
            peer_system(plan, "llama.cpp Q8_0", "llamacpp_peer", converted / "q8_0.gguf", "q8_0"),
        ]
    return found


def engine_system(plan: Plan) -> System:
    details: dict[str, Any] = {}
    command = [
        sys.executable, "-m", "benchmarks.offline", "--json-only", "--model", str(plan.model),
        "--batches", *map(str, ENGINE_BATCHES), "--threads", str(plan.threads), "--device", plan.device,
        *_workload_options(plan), *plan.engine_options,
    ]  # fmt: skip
    return System("Quill engine", "engine", lambda _: _batch_figures(run_json(command), details), details)


def transformers_system(plan: Plan) -> System:
    device = ("--device", plan.device)
    return peer_system(
        plan, "transformers bf16", "transformers_peer", plan.model, "bf16", python=Path(sys.executable), extra=device
    )


def peer_system(
    plan: Plan, name: str, module: str, model: Path, variant: str,
    *, python: Path | None = None, extra: Sequence[str] = (),
) -> System:  # fmt: skip
    details: dict[str, Any] = {}
    command = [
        str(python or plan.peers_python), "-m", f"benchmarks.peers.{module}", "--model", str(model),
        "--variant", variant, "--threads", str(plan.threads), "--vocab-size", str(plan.vocab_size),
        "--batches", *map(str, CLIENTS), *_workload_options(plan), *extra,
    ]  # fmt: skip
    return System(name, "peer", lambda _: _batch_figures(run_json(command), details), details)


def http_system(plan: Plan) -> System:
    details: dict[str, Any] = {}
    arguments = [
        "--model", str(plan.model), "--num-threads", str(plan.threads), "--device", plan.device,
        *plan.engine_options, "--log-level", "warning",
    ]  # fmt: skip

    def run(round_number: int) -> Figures:
        figures: Figures = {}
        try:
            with running_server(arguments) as url:
                for clients in CLIENTS:
                    result = run_json(_serving_command(plan, url, clients, 1_000 * round_number + clients))
                    if result["cached_tokens"]:
                        raise SystemFailedError("prompts of the run were in the prefix cache")
                    details[str(clients)] = {"requests": result["requests"], "mode": result["mode"]}
                    figures |= _http_figures(result, clients)
        except ServerError as error:
            raise SystemFailedError(str(error)) from error
        return figures

    return System("Quill over HTTP", "http", run, details)


def _serving_command(plan: Plan, url: str, clients: int, seed: int) -> list[str]:
    return [
        sys.executable, "-m", "benchmarks.serving", "--json-only", "--url", f"{url}/generate",
        "--mode", "waves", "--clients", str(clients), "--requests", str(clients * WAVES[clients]),
        "--prompt-len", str(plan.prompt_len), "--output-len", str(plan.output_len),
        "--vocab-size", str(plan.vocab_size), "--seed", str(seed),
    ]  # fmt: skip


def _workload_options(plan: Plan) -> list[str]:
    return [
        "--prompt-len", str(plan.prompt_len), "--output-len", str(plan.output_len), "--seconds", str(plan.seconds),
    ]  # fmt: skip


def _batch_figures(result: dict[str, Any], details: dict[str, Any]) -> Figures:
    batches = result.pop("batches")
    details.update(result)
    return {
        f"{what}/{batch}": row[what] for batch, row in batches.items() for what in ("prefill", "decode", "end_to_end")
    }


def _http_figures(result: dict[str, Any], clients: int) -> Figures:
    figures = {
        f"end_to_end/{clients}": result["output_tokens_per_second"],
        f"client_cpu_share/{clients}": result["client_cpu_seconds"] / result["seconds"],
    }
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        if result[name] is not None:
            figures |= {f"{name}_{key}/{clients}": result[name][key] for key in ("p50", "p99")}
    return figures
