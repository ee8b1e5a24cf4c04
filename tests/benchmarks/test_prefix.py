"""The prefix benchmark on a real, tiny engine: with the cache on, less is computed and the first tokens come sooner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import prefix
from benchmarks.make_model import make_model
from benchmarks.workload import EXIT_REFUSED


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("llama-tiny", folder, hidden_size=64, max_seq_len=512)
    return folder


def test_a_shared_prefix_is_computed_once(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(model_folder), "--device", "cpu", "--threads", "1", "--prefix-len", "256"]
    assert prefix.main([*arguments, "--requests", "16", "--repeats", "1"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["off"]["cached_tokens"] == 0
    # In each of two rounds all but the first request find the prefix.
    assert figures["on"]["cached_tokens"] == 2 * 15 * 256
    for row in (figures["on"], figures["off"]):
        assert 0 < row["first_token_ms_p50"] <= row["first_token_ms_last"]


def test_what_the_engine_refuses_has_an_exit_code_of_its_own(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model_folder), "--device", "cpu", "--threads", "1", "--quantization", "int3"]
    assert prefix.main(arguments) == EXIT_REFUSED
    assert "none or int8" in capsys.readouterr().err
