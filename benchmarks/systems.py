"""The systems of a comparison: each can be run once, as processes of its own, and returns plain figures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ratios import (
    CLIENTS,
    CT2_FLOAT32,
    CT2_INT8,
    ENGINE,
    ENGINE_INT8,
    HTTP,
    LLAMA_BF16,
    LLAMA_Q8,
    LLAMA_SERVER,
    TRANSFORMERS,
    Figures,
)
from benchmarks.server_process import ServerError, running_command, running_server
from benchmarks.workload import EXIT_REFUSED

ROOT = Path(__file__).parents[1]
ENGINE_BATCHES = (1, 8, 32, 64)
# Waves of all clients at once per run: enough for about two seconds each.
WAVES = {1: 4, 8: 3, 32: 2}
TIMEOUT_SECONDS = 300

# Streams that decode around the end of GPT-2's context of 1,024 tokens: 868 to 932 of them, 900 on average.
LONG_PROMPT, LONG_OUTPUT, LONG_BATCH = 868, 64, 8


class SystemFailedError(Exception):
    """A system could not be measured."""


class SystemSkippedError(SystemFailedError):
    """A system that does not apply here, which is no fault."""


@dataclass(frozen=True)
class System:
    """`kind` is engine, http, server or peer; `run(round)` measures once. `details` collects what the run told."""

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
    context: int = 1024

    @property
    def measures_long(self) -> bool:
        return self.context >= LONG_PROMPT + LONG_OUTPUT


def run_json(command: Sequence[str]) -> dict[str, Any]:
    """Run a script from the repository root; returns the JSON object on its last line. Raises SystemFailedError."""
    try:
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemFailedError(str(error)) from error
    if result.returncode == EXIT_REFUSED:
        raise SystemSkippedError(result.stderr.strip().rpartition("\n")[2])
    if result.returncode != 0:
        raise SystemFailedError(f"exit code {result.returncode}: {result.stderr[-1_500:].strip()}")
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def systems(plan: Plan) -> list[System]:
    """Ours first, then every peer that the plan has a place for."""
    found = [
        engine_system(plan, ENGINE, ("--dtype", "bfloat16")),
        engine_system(plan, ENGINE_INT8, ("--dtype", "bfloat16", "--quantization", "int8")),
        http_system(plan),
        transformers_system(plan),
    ]
    if plan.peers_python is not None:
        converted = plan.converted
        found += [
            peer_system(plan, CT2_INT8, "ctranslate2_peer", converted / "ct2", "int8"),
            peer_system(plan, CT2_FLOAT32, "ctranslate2_peer", converted / "ct2", "float32"),
            peer_system(plan, LLAMA_BF16, "llamacpp_peer", converted / "bf16.gguf", "bf16", long=True),
            peer_system(plan, LLAMA_Q8, "llamacpp_peer", converted / "q8_0.gguf", "q8_0", long=True),
            llama_server_system(plan),
        ]
    return found


def engine_system(plan: Plan, name: str, options: Sequence[str]) -> System:
    """The engine in a process of its own: the workload, long contexts, and a prefix that requests share."""
    details: dict[str, Any] = {}
    engine = ["--model", str(plan.model), "--threads", str(plan.threads), "--device", plan.device]
    engine += [*options, *plan.engine_options]
    command = [sys.executable, "-m", "benchmarks.offline", "--json-only", *engine]
    prefix = [sys.executable, "-m", "benchmarks.prefix", *engine]

    def run(_: int) -> Figures:
        figures = _batch_figures(plan, run_json([*command, *_batch_options(plan, ENGINE_BATCHES)]), details)
        if plan.measures_long:
            figures |= _long_figures(run_json([*command, *_long_options(plan)]))
            shared = run_json(prefix)
            for key in ("on", "off"):
                figures[f"prefix_{key}_ms/{shared['requests']}"] = shared[key]["first_token_ms_p50"]
        return figures

    return System(name, "engine", run, details)


def transformers_system(plan: Plan) -> System:
    device = ("--device", plan.device)
    return peer_system(
        plan, TRANSFORMERS, "transformers_peer", plan.model, "bf16", python=Path(sys.executable), extra=device
    )


def peer_system(
    plan: Plan, name: str, module: str, model: Path, variant: str,
    *, python: Path | None = None, extra: Sequence[str] = (), long: bool = False,
) -> System:  # fmt: skip
    details: dict[str, Any] = {}
    command = [
        str(python or plan.peers_python), "-m", f"benchmarks.peers.{module}", "--model", str(model),
        "--variant", variant, "--threads", str(plan.threads), "--vocab-size", str(plan.vocab_size), *extra,
    ]  # fmt: skip

    def run(_: int) -> Figures:
        figures = _batch_figures(plan, run_json([*command, *_batch_options(plan, CLIENTS)]), details)
        if long and plan.measures_long:
            figures |= _long_figures(run_json([*command, *_long_options(plan)]))
        return figures

    return System(name, "peer", run, details)


def http_system(plan: Plan) -> System:
    details: dict[str, Any] = {}
    arguments = [
        "--model", str(plan.model), "--num-threads", str(plan.threads), "--device", plan.device, "--dtype", "bfloat16",
        "--no-speculation", *plan.engine_options, "--log-level", "warning",
    ]  # fmt: skip

    def run(round_number: int) -> Figures:
        try:
            with running_server(arguments) as url:
                return _drive(plan, f"{url}/generate", round_number, details)
        except ServerError as error:
            raise SystemFailedError(str(error)) from error

    return System(HTTP, "http", run, details)


def llama_server_system(plan: Plan) -> System:
    """llama.cpp's own server, where LLAMA_SERVER names its program or the path has it; skipped elsewhere."""
    details: dict[str, Any] = {}

    def run(round_number: int) -> Figures:
        program = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
        if program is None:
            raise SystemSkippedError("no llama-server here: set LLAMA_SERVER to its path")
        most = max(CLIENTS)
        command = [
            program, "-m", str(plan.converted / "bf16.gguf"), "-np", str(most), "-fa", "on", "-t", str(plan.threads),
            "-c", str(most * 256 * -(-(plan.prompt_len + plan.output_len) // 256)), "--host", "127.0.0.1",
        ]  # fmt: skip
        extra = ("--extra-body", '{"cache_prompt": false}')
        try:
            with running_command(command, "/health") as url:
                return _drive(plan, f"{url}/v1/completions", round_number, details, extra)
        except (ServerError, OSError) as error:
            raise SystemFailedError(str(error)) from error

    return System(LLAMA_SERVER, "server", run, details)


def _drive(plan: Plan, url: str, round_number: int, details: dict[str, Any], extra: Sequence[str] = ()) -> Figures:
    figures: Figures = {}
    for clients in CLIENTS:
        result = run_json([*_serving_command(plan, url, clients, 1_000 * round_number + clients), *extra])
        if result["cached_tokens"]:
            raise SystemFailedError("prompts of the run were in the prefix cache")
        details[str(clients)] = {"requests": result["requests"], "mode": result["mode"]}
        figures |= _http_figures(result, clients)
    return figures


def _serving_command(plan: Plan, url: str, clients: int, seed: int) -> list[str]:
    return [
        sys.executable, "-m", "benchmarks.serving", "--json-only", "--url", url,
        "--mode", "waves", "--clients", str(clients), "--requests", str(clients * WAVES[clients]),
        "--prompt-len", str(plan.prompt_len), "--output-len", str(plan.output_len),
        "--vocab-size", str(plan.vocab_size), "--seed", str(seed),
    ]  # fmt: skip


def _batch_options(plan: Plan, batches: Sequence[int]) -> list[str]:
    return [
        "--batches", *map(str, batches), "--prompt-len", str(plan.prompt_len), "--output-len", str(plan.output_len),
        "--seconds", str(plan.seconds),
    ]  # fmt: skip


def _long_options(plan: Plan) -> list[str]:
    return [
        "--batches", str(LONG_BATCH), "--prompt-len", str(LONG_PROMPT), "--output-len", str(LONG_OUTPUT),
        "--seconds", str(plan.seconds),
    ]  # fmt: skip


def _long_figures(result: dict[str, Any]) -> Figures:
    return {f"long_{what}/{LONG_BATCH}": result["batches"][str(LONG_BATCH)][what] for what in ("prefill", "decode")}


def _batch_figures(plan: Plan, result: dict[str, Any], details: dict[str, Any]) -> Figures:
    """Rates by streams; in a batch all first tokens come together, so their time follows from the prefill's rate."""
    batches = result.pop("batches")
    details.update(result)
    figures: Figures = {}
    for batch, row in batches.items():
        figures |= {f"{what}/{batch}": row[what] for what in ("prefill", "decode", "end_to_end")}
        figures[f"ttft_ms_p50/{batch}"] = 1e3 * int(batch) * plan.prompt_len / row["prefill"]
    return figures


def _http_figures(result: dict[str, Any], clients: int) -> Figures:
    figures = {
        f"end_to_end/{clients}": result["output_tokens_per_second"],
        f"client_cpu_share/{clients}": result["client_cpu_seconds"] / result["seconds"],
    }
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        if result[name] is not None:
            figures |= {f"{name}_{key}/{clients}": result[name][key] for key in ("p50", "p99")}
    return figures
