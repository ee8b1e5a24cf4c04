"""The comparison with nanoGPT: reading its output, the one-line patch, what its command says, ratios and limits."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import training, training_compare
from benchmarks.systems import SystemFailedError
from benchmarks.training_command import RunFigures
from benchmarks.training_compare import (
    BF16,
    OURS,
    SHIPPED,
    Limits,
    compare,
    make_plan,
    measure_limits,
    our_recipe,
    print_limits,
    summarise,
)
from benchmarks.training_harness import BenchmarkError
from benchmarks.training_models import SHAKESPEARE_CHAR
from benchmarks.training_nanogpt import (
    AUTOCAST_CONTEXT,
    CPU_CONTEXT,
    NanogptPlan,
    copy_clone,
    parse_output,
    replace_once,
    train_command,
)
from training.recipe import build_config

OUTPUT = """Overriding: dataset = shakespeare_char
tokens per iteration will be: 4,096
number of parameters: 10.65M
using fused AdamW: False
step 0: train loss 4.2874, val loss 4.2823
iter 0: loss 4.2652, time 29342.88ms, mfu -100.00%
iter 1: loss 3.9012, time 1500.00ms, mfu -100.00%
iter 2: loss 3.7001, time 1480.50ms, mfu 0.31%
iter 3: loss nan, time 1490.25ms, mfu 0.30%
step 4: train loss 3.1, val loss 3.2
"""

# A stand-in for a clone: prints what nanoGPT's scripts print, and takes options as its configurator does.
TRAIN_PY = f"""import sys
from contextlib import nullcontext
import model, configurator
options = dict(word[2:].split("=") for word in sys.argv[1:])
device_type = options["device"]
if False:
    {CPU_CONTEXT}
print("number of parameters: 0.03M")
for number in range(int(options["max_iters"]) + 1):
    print(f"iter {{number}}: loss 4.1591, time {{50 if number else 900}}.00ms, mfu -100.00%")
"""
PREPARE_PY = "open('train.bin', 'wb').close() if open('input.txt').read() else exit('empty')\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "nanoGPT"
    (folder / "data/shakespeare_char").mkdir(parents=True)
    (folder / "train.py").write_text(TRAIN_PY)
    (folder / "model.py").touch()
    (folder / "configurator.py").touch()
    (folder / "data/shakespeare_char/prepare.py").write_text(PREPARE_PY)
    return folder


def limits(**changes: Any) -> Limits:
    values: dict[str, Any] = {
        "matmul": {"float32": 400e9, "bfloat16": 900e9}, "flops_per_token": 6e7, "flops_per_step": 400e9,
        "least_flops_per_step": 360e9,
        "data_sheet": None,
    }  # fmt: skip
    return Limits(**(values | changes))


def test_iterations_are_read_without_the_first_ones() -> None:
    found = parse_output(OUTPUT, dropped=2)
    assert found.seconds == pytest.approx([1.4805, 1.49025])
    assert found.parameters == 10.65
    assert parse_output(OUTPUT, dropped=0).seconds[0] == pytest.approx(29.34288)


@pytest.mark.parametrize("output", ["", "iter 9: loss 1.0, time 5.00ms, mfu 0.1%\n", OUTPUT.replace("ms,", " ms,")])
def test_another_format_is_an_error_and_not_a_figure(output: str) -> None:
    with pytest.raises(SystemFailedError, match="printed no iteration"):
        parse_output(output, dropped=0)


def test_the_patch_changes_one_line(clone: Path, tmp_path: Path) -> None:
    copy_clone(clone, tmp_path / "copy")
    shipped = (clone / "train.py").read_text().splitlines()
    assert (tmp_path / "copy/train.py").read_text().splitlines() == shipped
    patched = (tmp_path / "copy/train_bf16.py").read_text().splitlines()
    changed = [(a, b) for a, b in zip(shipped, patched, strict=True) if a != b]
    assert changed == [(f"    {CPU_CONTEXT}", f"    {AUTOCAST_CONTEXT}")]


@pytest.mark.parametrize("text", ["no such line", f"{CPU_CONTEXT}\n{CPU_CONTEXT}\n"])
def test_another_train_py_is_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match=r"train\.py holds the line .* needs another patch"):
        replace_once(text, CPU_CONTEXT, AUTOCAST_CONTEXT, "train.py")


def test_a_folder_that_is_no_clone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"has no train\.py; name one with --nanogpt"):
        copy_clone(tmp_path, tmp_path / "copy")


def test_train_py_is_told_the_sizes_and_keeps_its_own_precision() -> None:
    plan = NanogptPlan(SHAKESPEARE_CHAR.config(), 16, 256, 1, 12, 4, 0.2, "cpu", 2)
    words = train_command("train.py", plan)
    options = dict(word[2:].split("=") for word in words[2:])
    assert words[:2] == [sys.executable, "train.py"]
    assert {name: options[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "batch_size")} == {
        "n_layer": "6", "n_head": "6", "n_embd": "384", "block_size": "256", "batch_size": "16",
    }  # fmt: skip
    assert (options["dropout"], options["max_iters"], options["compile"]) == ("0.2", "11", "False")
    assert "dtype" not in options
    cuda = NanogptPlan(SHAKESPEARE_CHAR.config(), 16, 256, 1, 12, 4, 0.0, "cuda", 2)
    assert not any(word.startswith(("--compile", "--dtype")) for word in train_command("train.py", cuda))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_our_recipe_is_the_same_workload_and_leaves_the_rest_to_its_defaults(device: str, tmp_path: Path) -> None:
    plan = make_plan(device, 2, quick=False, rounds=3, steps=12, overrides=())
    tree = our_recipe(plan, 0.2, tmp_path)
    config = build_config(tree | {"run": {"dir": "r"}})
    assert config.tokens_per_step == plan.tokens_per_step
    assert config.model.dropout == 0.2
    assert not {"dtype", "compile", "tf32", "optimizer"} & set(tree["train"])
    assert plan.tokens_per_step == (4_096 if device == "cpu" else 524_288)


def test_figures_are_medians_over_rounds_and_the_fastest_step() -> None:
    rounds = {OURS: [{"step_ms": ms, "step_ms_min": ms - 50.0} for ms in (500.0, 400.0, 900.0)]}
    assert summarise(rounds, 4_096)[OURS] == {"step_ms": 500.0, "step_ms_min": 350.0, "tokens_per_second": 8_192.0}


def figures(step_ms: float) -> dict[str, float]:
    return {"step_ms": step_ms, "step_ms_min": step_ms, "tokens_per_second": 4_096 / step_ms * 1e3}


def test_ratios_stand_beside_goals_and_limits() -> None:
    medians = {OURS: figures(500.0), SHIPPED: figures(1_600.0), BF16: figures(600.0)}
    shipped, bf16 = compare("cpu", medians, limits())
    assert (shipped.value, shipped.goal, shipped.met) == (3.2, 3.0, True)
    assert (bf16.value, bf16.goal, bf16.met) == (1.2, 1.3, False)
    # A step of 0.36 TFLOP at 900 GFLOP/s takes 400 ms: four times as fast as 1,600.
    assert (shipped.limit, bf16.limit) == pytest.approx((4.0, 1.5))
    assert bf16.as_dict()["met"] is False
    assert compare("cpu", {SHIPPED: figures(1.0)}, limits()) == []


def test_the_least_work_counts_attention_over_the_past_alone() -> None:
    """6 per weight and 12·L·D·T for attention, of which a causal model computes (T + 1) / 2T."""
    found = measure_limits(make_plan("cpu", 1, quick=True, rounds=1, steps=1, overrides=()), 65)
    weights = 2 * 12 * 32**2 + 5 * 32 + 65 * 32
    assert found.flops_per_token == 6 * weights + 12 * 2 * 32 * 32
    assert found.flops_per_step == 64 * found.flops_per_token
    assert found.least_flops_per_step == 64 * (6 * weights + 12 * 2 * 32 * (32 + 1) / 2)
    assert found.step_seconds("float32") == found.least_flops_per_step / found.matmul["float32"]


def test_on_cuda_utilisation_is_measured_against_the_data_sheet() -> None:
    card = limits(matmul={"float32": 50e12, "bfloat16": 790e12}, flops_per_token=8.6e8, data_sheet=989e12)
    ours = {"step_ms": 1_000.0, "step_ms_min": 1_000.0, "tokens_per_second": 518_000.0}
    ratio, mfu = compare("cuda", {OURS: ours, SHIPPED: figures(1_400.0)}, card)
    assert (ratio.goal, ratio.value, ratio.met) == (1.3, 1.4, True)
    assert (mfu.name, mfu.goal, mfu.met) == ("MFU", 0.45, True)
    assert mfu.value == pytest.approx(0.4504, abs=1e-4)
    assert mfu.limit == pytest.approx(0.799, abs=1e-3)


@pytest.mark.parametrize(
    ("bfloat16", "words"),
    [
        (900e9, "4.00 times as fast: a ratio of 3.0 is within reach"),
        (600e9, "2.67 times as fast: a ratio of 3.0 is OUT OF reach"),
    ],
)
def test_the_reader_is_told_what_is_attainable(bfloat16: float, words: str) -> None:
    output = io.StringIO()
    plan = make_plan("cpu", 2, quick=False, rounds=1, steps=12, overrides=())
    found = limits(matmul={"float32": 400e9, "bfloat16": bfloat16})
    print_limits(Console(file=output, width=500), plan, found, [{SHIPPED: figures(1_600.0)}])
    assert words in output.getvalue()
    assert "runs at 56% of the float32 product's peak" in output.getvalue()


def run_quick(clone: Path, tmp_path: Path) -> tuple[int, dict[str, Any], str]:
    (clone / "data/shakespeare_char/input.txt").write_text("so much ink and so little paper\n" * 100)
    words = ["compare", "--quick", "--device", "cpu", "--threads", "1", "--nanogpt", str(clone)]
    args = training.parse_args([*words, "--out", str(tmp_path / "result.json")])
    output = io.StringIO()
    status = training.run(args, Console(file=output, width=200))
    return status, json.loads((tmp_path / "result.json").read_text()), output.getvalue()


def test_the_whole_comparison_with_a_stand_in(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_compare, "prepare_data", lambda *_: {"vocab_size": 20})
    monkeypatch.setattr(training_compare, "run_recipe", lambda *_, **__: RunFigures([0.02, 0.01, 0.04], 3.0))
    status, result, output = run_quick(clone, tmp_path)
    (row,) = result["modes"]["compare"]["rows"]
    assert (status, result["failures"]) == (0, {})
    assert {name: found["step_ms"] for name, found in row["medians"].items()} == {OURS: 20.0, SHIPPED: 50.0, BF16: 50.0}
    assert [(item["value"], item["goal"], item["met"]) for item in row["ratios"]] == [
        (2.5, 3.0, False),
        (2.5, 1.3, True),
    ]
    assert row["systems"][BF16] == {"script": "train_bf16.py", "dtype": "bfloat16", "parameters_in_millions": 0.03}
    assert "goal 3.00 MISSED" in output
    assert "goal 1.30 met" in output


def test_a_system_that_fails_is_named_and_the_others_are_compared(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> RunFigures:
        raise SystemFailedError("exit code 1: error: no such recipe")

    monkeypatch.setattr(training_compare, "prepare_data", lambda *_: {"vocab_size": 20})
    monkeypatch.setattr(training_compare, "run_recipe", fails)
    status, result, _ = run_quick(clone, tmp_path)
    assert status == 1
    assert result["failures"] == {f"compare/dropout 0/{OURS}": "exit code 1: error: no such recipe"}
    assert set(result["modes"]["compare"]["rows"][0]["medians"]) == {SHIPPED, BF16}


def test_a_clone_without_its_text_asks_for_one(clone: Path, tmp_path: Path) -> None:
    (clone / "data/shakespeare_char/prepare.py").unlink()
    with pytest.raises(BenchmarkError, match="name a text with --text"):
        training_compare.default_text(clone)


@pytest.mark.slow
def test_our_side_runs_through_the_public_command(clone: Path, tmp_path: Path) -> None:
    status, result, _ = run_quick(clone, tmp_path)
    assert (status, result["failures"]) == (0, {})
    assert result["modes"]["compare"]["rows"][0]["medians"][OURS]["tokens_per_second"] > 0
