"""The startup benchmark: what it expects of memory and how it judges; and, slowly, the real server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import startup
from benchmarks.server_process import ServerError
from benchmarks.startup import MIB, engine_process, expected_memory, judge


def info(**changes: object) -> dict[str, object]:
    config = {"num_layers": 2, "num_kv_heads": 4, "head_dim": 16}
    limits = {"kv_block_size": 16, "kv_blocks": 1_024}
    return {
        "models": [{"config": config, "num_parameters": 3 * MIB}],
        "limits": limits,
        "dtype": "bfloat16",
        "quantization": "none",
    } | changes


def test_memory_is_expected_from_what_info_says() -> None:
    # Two bytes a parameter; 2 x 2 layers x 4 heads x 16 dimensions x 2 bytes = 512 bytes a token, 16,384 tokens.
    assert expected_memory(info()) == {"weights_mib": 6.0, "kv_budget_mib": 8.0}
    assert expected_memory(info(dtype="float32")) == {"weights_mib": 12.0, "kv_budget_mib": 16.0}
    assert expected_memory(info(quantization="int8"))["weights_mib"] == pytest.approx(3.09375)


@pytest.mark.parametrize(("ready", "after", "met"), [(2.9, 1_100.0, (True, True)), (3.1, 1_300.0, (False, False))])
def test_goals_are_beyond_torch_and_beyond_weights_and_budget(
    ready: float, after: float, met: tuple[bool, bool]
) -> None:
    row = {"seconds": ready, "resident_mib": 900.0, "resident_after_load_mib": after}
    row |= {"weights_mib": 100.0, "kv_budget_mib": 500.0}
    verdict = judge("bundled", row, {"seconds": 2.0, "resident_mib": 300.0})
    assert (verdict["seconds_met"], verdict["memory_met"]) == met
    assert verdict["mib_beyond_torch"] == 600.0


def test_a_process_without_an_engine_is_told() -> None:
    with pytest.raises(ServerError, match="no engine process"):
        engine_process(os.getpid())


@pytest.mark.slow
def test_the_bundled_model_is_started_and_weighed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert startup.main(["--quick", "--out", str(tmp_path / "out.json")]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    row = figures["models"]["bundled"]
    assert 0 < figures["import_torch"]["seconds"] < row["seconds"]
    assert row["weights_mib"] < row["resident_mib"] <= row["resident_after_load_mib"] * 1.1
    assert json.loads((tmp_path / "out.json").read_text())["models"] == figures["models"]
