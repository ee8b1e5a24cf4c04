"""The comparison's own conduct: turning order, failures that stay visible, one JSON line per script."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.compare import measure, print_latencies, print_ratios, print_speeds
from benchmarks.machine import available_cores, describe_commit, describe_machine
from benchmarks.peers_environment import PeersError, convert_model, peers_python
from benchmarks.ratios import ratios
from benchmarks.systems import CLIENTS, Figures, System, SystemFailedError, run_json


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
    with pytest.raises(SystemFailedError, match="exit code 3: no such weights"):
        run_json([sys.executable, "-c", "import sys; sys.stderr.write('no such weights'); sys.exit(3)"])
    with pytest.raises(SystemFailedError, match="No such file"):
        run_json(["./no-such-program"])


def test_tables_show_speeds_latencies_and_missed_goals(console: Console) -> None:
    engine = {f"{what}/{n}": 1_000.0 for what in ("end_to_end", "decode", "prefill") for n in CLIENTS}
    names = ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "e2e_ms_p50")
    http = {f"{name}/{n}": 12.5 for name in names for n in CLIENTS}
    http |= {f"end_to_end/{n}": 800.0 for n in CLIENTS} | {f"client_cpu_share/{n}": 0.02 for n in CLIENTS}
    print_speeds(console, {"Quill engine": engine, "Quill over HTTP": http})
    print_latencies(console, http)
    print_ratios(console, ratios(engine, http, {"other": engine}))
    text = output(console)
    assert "1,000" in text
    assert "12.5" in text
    assert "0.80 (other, goal 1.0 MISSED)" in text


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
