"""The comparison's own conduct: turning order, failures that stay visible, one JSON line per script."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.compare import main, measure, print_latencies, print_ratios, print_speeds
from benchmarks.machine import available_cores, describe_commit, describe_machine
from benchmarks.peers_environment import PeersError, convert_model, peers_python
from benchmarks.ratios import CLIENTS, ENGINE, ENGINE_INT8, HTTP, Figures, compare, cpu_goals
from benchmarks.systems import Plan, System, SystemFailedError, SystemSkippedError, llama_server_system, run_json


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rounds_turn_the_order_and_drop_what_failed(console: Console) -> None:
    calls: list[tuple[str, int]] = []

    def system(name: str, fails_in: int | None = None) -> System:
        def run(number: int) -> Figures:
            calls.append((name, number))
            if number == fails_in:
                raise SystemFailedError("it broke")
            return {"decode/1": float(number)}

        return System(name, "peer", run, {})

    figures, failures = measure([system("a"), system("b", fails_in=1), system("c")], 3, console)
    assert calls == [("a", 0), ("b", 0), ("c", 0), ("c", 1), ("b", 1), ("a", 1), ("a", 2), ("c", 2)]
    assert figures == {name: [{"decode/1": 0.0}, {"decode/1": 1.0}, {"decode/1": 2.0}] for name in ("a", "c")}
    assert failures == {"b": "it broke"}
    assert "b FAILED: it broke" in output(console)


def test_a_script_is_read_by_its_last_line_and_its_failure_is_quoted() -> None:
    script = "print('noise'); print('{\"a\": 1}')"
    assert run_json([sys.executable, "-c", script]) == {"a": 1}
    with pytest.raises(SystemFailedError, match="exit code 4: no such weights"):
        run_json([sys.executable, "-c", "import sys; sys.stderr.write('no such weights'); sys.exit(4)"])
    with pytest.raises(SystemFailedError, match="No such file"):
        run_json(["./no-such-program"])


def test_what_does_not_apply_is_skipped_once_and_is_no_failure(console: Console) -> None:
    calls: list[int] = []

    def run(number: int) -> Figures:
        calls.append(number)
        raise SystemSkippedError("int8 is not offered here")

    system = System(ENGINE_INT8, "engine", run, {})
    assert measure([system], 3, console) == ({}, {})
    assert calls == [0]
    assert system.details == {"skipped": "int8 is not offered here"}
    assert f"{ENGINE_INT8} is skipped: int8 is not offered here" in output(console)


def test_a_script_that_refuses_its_options_is_skipped() -> None:
    script = "import sys; sys.stderr.write('quantization int8 is not available'); sys.exit(3)"
    with pytest.raises(SystemSkippedError, match=r"^quantization int8 is not available$"):
        run_json([sys.executable, "-c", script])


def test_without_its_program_llama_server_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_SERVER", raising=False)
    plan = Plan(tmp_path, tmp_path, 50, 1, 0.0, 8, 8, "cpu", None, ())
    with pytest.raises(SystemSkippedError, match="set LLAMA_SERVER"):
        llama_server_system(plan).run(0)
    monkeypatch.setenv("LLAMA_SERVER", str(tmp_path / "absent"))
    with pytest.raises(SystemFailedError, match="absent"):
        llama_server_system(plan).run(0)


def test_tables_show_speeds_latencies_and_missed_goals(console: Console) -> None:
    rates = {f"{what}/{n}": 1_000.0 for what in ("end_to_end", "decode", "prefill") for n in CLIENTS}
    engine = rates | {"prefix_on_ms/32": 20.0, "prefix_off_ms/32": 120.0}
    names = ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "e2e_ms_p50")
    http = {f"{name}/{n}": 12.5 for name in names for n in CLIENTS}
    http |= {f"end_to_end/{n}": 800.0 for n in CLIENTS} | {f"client_cpu_share/{n}": 0.02 for n in CLIENTS}
    medians = {ENGINE: engine, HTTP: http, "llama.cpp bf16": rates | {f"ttft_ms_p50/{n}": 50.0 for n in CLIENTS}}
    print_speeds(console, medians)
    print_latencies(console, medians)
    print_ratios(console, compare(cpu_goals(), medians))
    text = output(console)
    assert "1,000" in text
    assert "12.5" in text
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") == 8}
    assert "0.80" in rows["HTTP ÷ engine alone, 8 clients"]
    assert "MISSED" in rows["HTTP ÷ engine alone, 8 clients"]
    assert "not measured: Quill engine int8" in rows["prefill, int8"]
    prefix = rows["first token p50 with a shared prefix of 512 tokens, cache off ÷ on"]
    assert ("6.00" in prefix, "met" in prefix) == (True, True)
    first = rows["HTTP, first token p50, 8 clients"]
    assert ("4.00" in first, "met" in first) == (True, True)


def test_peers_venv_must_be_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    monkeypatch.setenv("PEERS_VENV", str(tmp_path))
    with pytest.raises(PeersError, match="PEERS_VENV names a folder without bin/python"):
        peers_python(console)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert peers_python(console) == tmp_path / "bin" / "python"


def test_weights_are_converted_again_only_when_they_changed(tmp_path: Path, console: Console) -> None:
    model, out, calls = tmp_path / "m", tmp_path / "out", tmp_path / "calls"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    # Stands for the peers' interpreter: makes the folder, counts its calls.
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nmkdir {out}\necho converted >> {calls}\n")
    python.chmod(0o755)
    convert_model(python, model, out, console)
    convert_model(python, model, out, console)
    assert calls.read_text().count("converted") == 1
    (model / "model.safetensors").write_bytes(b"other")
    os.utime(model / "model.safetensors", (time.time() + 5, time.time() + 5))
    convert_model(python, model, out, console)
    assert calls.read_text().count("converted") == 2
    with pytest.raises(PeersError, match=r"no single model\.safetensors"):
        convert_model(python, tmp_path, out, console)


def test_a_result_says_where_it_was_measured(tmp_path: Path) -> None:
    machine = describe_machine()
    assert machine["cores"] == available_cores() >= 1
    assert set(machine["flags"]) <= {
        "avx2",
        "avx512f",
        "avx512_bf16",
        "avx512_vnni",
        "amx_tile",
        "amx_bf16",
        "amx_int8",
    }
    assert describe_commit(tmp_path) == {"commit": None, "changed": None}


@pytest.mark.slow
def test_the_whole_comparison_runs_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.compare.CACHE", tmp_path)
    assert main(["--quick", "--no-peers", "--threads", "1", "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["medians"]) == {ENGINE, ENGINE_INT8, HTTP}
    assert all(value > 0 for figures in result["medians"].values() for value in figures.values())
    measured = {ratio["goal"]["name"] for ratio in result["ratios"] if ratio["value"] is not None}
    assert measured == {
        *(f"HTTP ÷ engine alone, {clients}" for clients in ("1 client", "8 clients", "32 clients")),
        "first token p50 with a shared prefix of 512 tokens, cache off ÷ on",
    }
