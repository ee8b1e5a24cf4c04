"""The training benchmarks: whole modes at toy size, and the arithmetic of ladder, grid, memory trade and scaling."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from rich.console import Console

from benchmarks import training, training_grid, training_ladder, training_memory
from benchmarks.systems import SystemFailedError
from benchmarks.training_command import RunFigures, read_metrics
from benchmarks.training_grid import add_speedups
from benchmarks.training_harness import Shape, StepSettings, TrainingStep, matmul_peak, median_seconds, padded
from benchmarks.training_ladder import FINAL, RUNGS, add_ratios
from benchmarks.training_memory import kept_bytes, trade
from benchmarks.training_models import GPT2, SHAKESPEARE_CHAR, TINY, write_random_text
from benchmarks.training_scaling import fit_power_law, make_plan, non_embedding_parameters
from model.config import count_parameters
from model.presets import create_config

CPU = torch.device("cpu")
NUMBER = {"type": "number", "exclusiveMinimum": 0}
RESULT_SCHEMA = {
    "type": "object",
    "required": [
        *("date", "command", "commit", "changed", "machine", "versions", "device", "threads", "quick", "modes"),
        "failures",
    ],
    "additionalProperties": False,
    "properties": {
        "date": {"type": "string", "format": "date-time"},
        "command": {"type": "string", "pattern": "^python -m benchmarks.training "},
        "commit": {"type": ["string", "null"]},
        "changed": {"type": ["boolean", "null"]},
        "machine": {"type": "object", "required": ["cpu", "cores", "flags", "load_average_at_start"]},
        "versions": {"type": "object", "required": ["torch"]},
        "device": {"type": "object", "required": ["type"]},
        "threads": {"type": "integer", "minimum": 1},
        "quick": {"const": True},
        "failures": {"type": "object", "additionalProperties": {"type": "string"}},
        "modes": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "ladder": {"type": "object", "required": ["model", "batch", "rungs"]},
                "grid": {"type": "object", "required": ["model", "claim", "forward", "training"]},
                "checkpointing": {"type": "object", "required": ["model", "batch", "claim", "rows"]},
                "scaling": {"type": "object", "required": ["rows", "fit"]},
                "compare": {"type": "object", "required": ["model", "limits", "rows", "tokens_per_step"]},
            },
        },
    },
}

RunMode = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunMode:
    """Runs `python -m benchmarks.training … --quick` in this process; returns status, result file and output."""

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
        out, output = tmp_path / "result.json", io.StringIO()
        args = training.parse_args([*arguments, "--quick", "--device", "cpu", "--threads", "1", "--out", str(out)])
        status = training.run(args, Console(file=output, width=200))
        result = json.loads(out.read_text())
        jsonschema.validate(result, RESULT_SCHEMA)
        return status, result, output.getvalue()

    return run


def no_compiler(*_: object, **__: object) -> None:
    raise RuntimeError("no C++ compiler was found\nmore words")


def fixed_final(*_: object, **__: object) -> RunFigures:
    return RunFigures([0.002, 0.001, 0.004], 2.5)


def test_ladder_reports_a_compiler_that_is_missing_and_goes_on_without_it(
    run_mode: RunMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(training_ladder, "prepare_data", lambda *_: {})
    monkeypatch.setattr(training_ladder, "run_recipe", fixed_final)
    status, result, output = run_mode("ladder")
    rungs = {row["rung"]: row for row in result["modes"]["ladder"]["rungs"]}
    assert list(rungs) == [*(rung.name for rung in RUNGS), FINAL]
    assert rungs["+ TF32"]["skipped"] == "CUDA only"
    assert rungs["+ torch.compile"]["error"] == "RuntimeError: no C++ compiler was found"
    assert rungs["+ fused AdamW"]["note"] == "without the compiler"
    assert rungs["+ padded vocabulary"]["tokens_per_second"] > 0
    assert rungs[FINAL]["tokens_per_second"] == pytest.approx(64 / 0.002)
    assert (status, list(result["failures"])) == (1, ["ladder/+ torch.compile"])
    assert "FAILED" in output
    assert "121K tokens/s" in output


def test_grid_covers_types_and_shapes(run_mode: RunMode) -> None:
    status, result, output = run_mode("grid")
    grid = result["modes"]["grid"]
    cells = [(dtype, batch, length) for dtype in ("float32", "bfloat16") for batch, length in ((1, 16), (4, 64))]
    for rows in (grid["forward"], grid["training"]):
        assert [(row["dtype"], row["batch_size"], row["seq_len"]) for row in rows] == cells
        assert all(
            row["tokens_per_second"] == pytest.approx(1e3 * row["batch_size"] * row["seq_len"] / row["ms"])
            for row in rows
        )
    assert [row["memory"] for row in grid["forward"]] == [1.0, 1.0, 0.5, 0.5]
    assert grid["forward"][0]["bytes"] == 4 * count_parameters(TINY.config())
    assert status == 0
    assert "1.5-2x training speedup" in output


def test_models_fit_the_device() -> None:
    """GPT-2 on a GPU, the 10.65M model on a CPU: with room for the grid's longest shape."""
    for device, model, width in (("cpu", SHAKESPEARE_CHAR, 384), ("cuda", GPT2, 768)):
        grid = training_grid.make_plan(device, quick=False, preset=None, folder=None)
        assert grid.name.startswith(model.name)
        assert grid.config.hidden_size == width
        assert {(shape.batch_size, shape.seq_len) for shape in grid.shapes} == set(training_grid.CLAIMED)
        assert training_memory.MODELS[training_memory.make_plan(device, 2, quick=False).model] is model


@pytest.mark.parametrize(("preset", "shown"), [("gpt2", True), ("shakespeare-char", False)])
def test_published_times_stand_beside_the_model_that_they_are_of(preset: str, shown: bool) -> None:
    plan = training_grid.make_plan("cpu", quick=True, preset=preset, folder=None)
    row = {"dtype": "float32", "batch_size": 1, "seq_len": 128, "ms": 1.0, "tokens_per_second": 1.0, "speedup": 1.0,
           "bytes": 1, "memory": 1.0}  # fmt: skip
    output = io.StringIO()
    training_grid.print_grid(Console(file=output, width=200), plan, "forward", [row])
    assert ("12.3 ms, 10,406/s" in output.getvalue()) is shown


def test_checkpointing_trades_time_for_memory(run_mode: RunMode) -> None:
    status, result, output = run_mode("checkpointing")
    (row,) = result["modes"]["checkpointing"]["rows"]
    assert 0.2 < row["kept_reduction"] < 1.0
    assert row["checkpointing"]["kept_bytes"] < row["plain"]["kept_bytes"]
    assert status == 0
    assert "30% slower but 40% memory reduction" in output


def test_modes_without_their_inputs_say_what_to_name(run_mode: RunMode) -> None:
    assert run_mode("compare")[1]["failures"] == {
        "compare": "name your clone of nanoGPT with --nanogpt DIR (github.com/karpathy/nanoGPT)"
    }
    status, result, _ = run_mode("scaling")
    assert status == 1
    assert "--text FILE" in result["failures"]["scaling"]
    status, result, _ = run_mode("grid", "--preset", "no-such-model")
    assert status == 1
    assert "no-such-model" in result["failures"]["grid"]


def test_all_leaves_out_what_has_no_input_and_says_so(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output)
    modes = training.chosen_modes(training.parse_args(["all"]), tmp_path, console)
    assert list(modes) == ["ladder", "checkpointing", "grid"]
    assert "left out" in output.getvalue()
    everything = training.parse_args(["all", "--nanogpt", "somewhere", "--scaling"])
    assert list(training.chosen_modes(everything, tmp_path, console)) == list(training.MODES)


@pytest.mark.parametrize(
    "words", [["ladder", "--rounds", "0"], ["compare", "--steps", "0"], ["ladder", "--text", "/no/such"], ["no-mode"]]
)
def test_wrong_usage_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        training.parse_args(words)
    assert "error:" in capsys.readouterr().err


def test_a_step_lowers_the_loss_of_its_batch_in_either_type() -> None:
    for settings in (StepSettings(), StepSettings("bfloat16", fused=False)):
        step = TrainingStep(TINY.config(), Shape(2, 32), settings, CPU)
        before = step.loss().item()
        assert before == pytest.approx(math.log(65), abs=0.2)
        for _ in range(60):
            step()
        assert step.loss().item() < before - 0.1


def test_checkpointed_layers_compute_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        step = TrainingStep(TINY.config(), Shape(2, 32), StepSettings(recompute=recompute), CPU)
        torch.autograd.backward(step.loss())
        gradients.append([parameter.grad for parameter in step.model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))  # type: ignore[arg-type]


def test_kept_bytes_count_shared_storage_once_and_no_parameters() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    inputs = torch.ones(4, 8, requires_grad=True)

    def loss() -> torch.Tensor:
        hidden = layer(inputs)  # keeps inputs [4, 8] and the weight, which is a parameter
        return (hidden * hidden).sum()  # keeps hidden [4, 8], twice the same

    assert kept_bytes(layer, loss) == 2 * 4 * 8 * 4


def test_padding_changes_the_vocabulary_alone() -> None:
    assert padded(GPT2.config()).vocab_size == 50_304
    assert padded(padded(GPT2.config())) == padded(GPT2.config())


def test_models_are_nanogpts() -> None:
    """nanoGPT counts without the position table and pads GPT-2's vocabulary: 10.65M and 123.59M."""
    for config, millions in ((SHAKESPEARE_CHAR.config(), "10.65"), (padded(GPT2.config()), "123.59")):
        assert f"{(count_parameters(config) - config.max_seq_len * config.hidden_size) / 1e6:.2f}" == millions
        assert [config.qkv_bias, config.o_bias, config.mlp_bias, config.norm_bias] == [False] * 4


def test_random_text_has_the_alphabet_of_the_character_model(tmp_path: Path) -> None:
    write_random_text(tmp_path / "text", 1_000)
    assert len(set((tmp_path / "text").read_text())) == SHAKESPEARE_CHAR.vocab_size


def test_median_seconds_warms_up_and_waits() -> None:
    calls: list[int] = []
    assert median_seconds(lambda: calls.append(1), CPU, warmup=2, repeats=3) >= 0.0
    assert len(calls) == 5


def test_matmul_peak_is_a_rate() -> None:
    assert 1e7 < matmul_peak(CPU, torch.float32, 64, seconds=0.01) < 1e14


def test_ladder_ratios_skip_rungs_without_figures() -> None:
    rows: list[dict[str, Any]] = [
        {"tokens_per_second": 10.0}, {"skipped": "CUDA only"}, {"tokens_per_second": 20.0}, {"error": "x"},
        {"tokens_per_second": 50.0},
    ]  # fmt: skip
    add_ratios(rows)
    assert [row.get("over_first") for row in rows] == [1.0, None, 2.0, None, 5.0]
    assert [row.get("over_previous") for row in rows] == [None, None, 2.0, None, 2.5]
    without_first: list[dict[str, Any]] = [{"error": "x"}, {"tokens_per_second": 20.0}]
    add_ratios(without_first)
    assert without_first[1]["over_first"] is None


def test_grid_speedups_compare_equal_cells() -> None:
    rows: list[dict[str, Any]] = [
        {"dtype": dtype, "batch_size": batch, "seq_len": 8, "ms": ms, "bytes": size}
        for dtype, batch, ms, size in (("float32", 1, 4.0, 100), ("float32", 2, 9.0, 200), ("bfloat16", 2, 3.0, 50))
    ]
    add_speedups(rows)
    assert [(row["speedup"], row["memory"]) for row in rows] == [(1.0, 1.0), (1.0, 1.0), (3.0, 0.25)]


def test_the_trade_is_relative_to_the_plain_step() -> None:
    plain = {"step_ms": 100.0, "kept_bytes": 1_000, "peak_bytes": 2_000}
    found = trade(plain, {"step_ms": 130.0, "kept_bytes": 250, "peak_bytes": 1_200})
    assert found == pytest.approx({"slower": 0.3, "kept_reduction": 0.75, "peak_reduction": 0.4})
    assert trade(plain, {"step_ms": 130.0, "kept_bytes": 250, "peak_bytes": None})["peak_reduction"] is None


def test_the_power_law_is_recovered_with_its_error() -> None:
    sizes = [1e3, 1e4, 1e5, 1e6]
    law = fit_power_law(sizes, [5.0 * size**-0.076 for size in sizes])
    assert law.alpha == pytest.approx(0.076)
    assert law.alpha_error == pytest.approx(0.0, abs=1e-9)
    assert law.loss(1e5) == pytest.approx(5.0 * 1e5**-0.076)
    noisy = fit_power_law(
        sizes, [5.0 * size**-0.076 * factor for size, factor in zip(sizes, (1, 1.1, 0.9, 1), strict=True)]
    )
    assert noisy.alpha_error is not None
    assert noisy.alpha_error > 1e-3
    assert fit_power_law(sizes[:2], [4.0, 2.0]).alpha == pytest.approx(math.log10(2.0))
    assert fit_power_law(sizes[:2], [4.0, 2.0]).alpha_error is None


def test_scaling_counts_parameters_as_kaplan_does() -> None:
    """12 · layers · width² for the products, and the norms."""
    config = create_config("shakespeare-char", num_layers=3, num_heads=2, hidden_size=80, dropout=0.0)
    assert non_embedding_parameters(config) == 12 * 3 * 80**2 + (2 * 3 + 1) * 80


def test_scaling_sizes_grow() -> None:
    plan = make_plan("cpu", 1, quick=False)
    sizes = [12 * layers * width**2 for layers, _, width in plan.sizes]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] > 50 * sizes[0]


def test_metrics_of_a_run_are_read_as_seconds_per_step(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "split": "train", "tokens": 100, "tokens_per_second": 10.0, "loss": 4.0},
        {"step": 2, "split": "train", "tokens": 200, "tokens_per_second": 50.0, "loss": 3.0},
        {"step": 2, "split": "val", "tokens": 200, "tokens_per_second": 50.0, "loss": 3.5},
        {"step": 3, "split": "train", "tokens": 300, "tokens_per_second": None, "loss": 2.0},
        {"step": 3, "split": "train", "tokens": 300, "tokens_per_second": 25.0, "loss": 2.0},
        {"step": 3, "split": "val", "tokens": 300, "tokens_per_second": 25.0, "loss": 2.5},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path, dropped=1) == RunFigures([2.0, 4.0], 2.5)
    with pytest.raises(SystemFailedError, match="no training step after the first 3"):
        read_metrics(path, dropped=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
def test_all_modes_run_through_the_public_command(run_mode: RunMode, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    write_random_text(text, 20_000)
    status, result, output = run_mode("all", "--scaling", "--text", str(text))
    assert result["failures"] == {}
    assert status == 0
    assert list(result["modes"]) == ["ladder", "checkpointing", "grid", "scaling"]
    assert all("error" not in row for row in result["modes"]["ladder"]["rungs"])
    assert "toy" in output
