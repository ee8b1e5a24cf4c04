"""The peers' own virtual environment, and the model in their formats."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "benchmarks" / "peers" / "requirements.txt"
DEFAULT_VENV = ROOT / ".venv-peers"
VARIABLE = "PEERS_VENV"


class PeersError(Exception):
    """The peers cannot be set up; `--no-peers` measures Quill alone."""


def peers_python(console: Console) -> Path:
    """The interpreter of the peers' environment: that of PEERS_VENV as it is, else one made in `.venv-peers`.

    Raises PeersError.
    """
    given = os.environ.get(VARIABLE)
    if given:
        python = Path(given) / "bin" / "python"
        if not python.exists():
            raise PeersError(f"{VARIABLE} names a folder without bin/python: unset it to have one made")
        return python
    python = DEFAULT_VENV / "bin" / "python"
    stamp = DEFAULT_VENV / ".installed"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        console.print("installing the peers into .venv-peers (compiling llama.cpp takes some minutes)")
        _run([sys.executable, "-m", "venv", str(DEFAULT_VENV)])
        _run([str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)])
        stamp.write_text(wanted)
    return python


def convert_model(python: Path, model: Path, out: Path, console: Console) -> None:
    """Write the peers' formats of `model` into `out`, again if the weights changed. Raises PeersError."""
    stamp = out / "source.txt"
    weights = model / "model.safetensors"
    if not weights.exists():
        raise PeersError(f"{model.name} has no single model.safetensors: the peers' conversion needs one")
    source = f"{weights.stat().st_size} {weights.stat().st_mtime_ns}"
    if stamp.exists() and stamp.read_text() == source:
        return
    console.print("converting the model for the peers")
    shutil.rmtree(out, ignore_errors=True)
    _run([str(python), "-m", "benchmarks.peers.convert", "--model", str(model), "--out", str(out)])
    stamp.write_text(source)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        step = " ".join(command[1:4])
        raise PeersError(f"{step} failed (or run with --no-peers):\n{result.stderr[-2_000:].strip()}")
