"""What `latency` times is the model's own greedy decoding, and its figures follow from the clock and the sizes."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from model.generate import generate
from model.presets import create_config
from model.sampling_params import SamplingParams
from model.transformer import Transformer
from tests.training.conftest import Command
from tests.training.tiny_models import save_tiny_model
from training.errors import RecipeError
from training.evaluation import latency
from training.evaluation.latency import (
    LatencyPlan,
    Passes,
    fitting_lengths,
    measure_latency,
    median_seconds,
    open_model,
)


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Transformer:
    folder = save_tiny_model(tmp_path / request.param, request.param, context=64)
    return open_model(str(folder), device="cpu", dtype=torch.float32).model


def test_what_is_timed_is_greedy_generation(model: Transformer) -> None:
    passes = Passes(model, batch_size=3, length=20, new_tokens=9)
    with torch.inference_mode():
        runs = [[passes.prefill(), *passes.decode()] for _ in range(2)]
        again = passes.decode()
    tokens = [torch.cat(run, dim=1).tolist() for run in runs]
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    assert tokens[0] == [generate(model, ids, params).token_ids for ids in passes.ids.tolist()]
    assert tokens[1] == tokens[0]
    assert torch.cat(again, dim=1).tolist() == [row[1:] for row in tokens[0]]


class FakeClock:
    """Each timed call takes the next of `durations`, in seconds."""

    def __init__(self, durations: list[float]) -> None:
        self.durations = iter(durations)
        self.now = 0.0
        self.is_start = True

    def __call__(self) -> float:
        if not self.is_start:
            self.now += next(self.durations)
        self.is_start = not self.is_start
        return self.now


def test_the_median_leaves_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "perf_counter", FakeClock([100, 100, 5, 1, 3]))
    calls = []
    seconds = median_seconds(lambda: calls.append(1), torch.device("cpu"), warmup=2, repeats=3)
    assert seconds == pytest.approx(3)
    assert len(calls) == 5


def test_figures_follow_from_times_and_sizes(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "perf_counter", FakeClock([9, 0.2, 0.2, 9, 0.4, 0.4] * 4))
    told: list[tuple[str, int, int | None]] = []
    plan = LatencyPlan((1, 4), (8, 20), new_tokens=5, warmup=1, repeats=2)
    cells = measure_latency(model, plan, lambda *args: told.append(args))
    assert [(cell.batch_size, cell.length) for cell in cells] == list(itertools.product((1, 4), (8, 20)))
    for cell in cells:
        assert cell.prefill_ms == pytest.approx(200)
        assert cell.prefill_tokens_per_second == pytest.approx(cell.batch_size * cell.length / 0.2)
        assert cell.decode_ms_per_token == pytest.approx(400 / 5)
        assert cell.decode_tokens_per_second == pytest.approx(cell.batch_size * 5 / 0.4)
        assert cell.peak_bytes is None
        # Keys and values of each layer in float32, in whole blocks of 16 tokens; heads of 16 values need no padding.
        blocks = -(-(cell.length + 5) // 16) * cell.batch_size
        config = model.config
        assert cell.cache_bytes == 2 * config.num_layers * config.num_kv_heads * config.head_dim * 16 * blocks * 4
    assert told == [("measuring", done, 4) for done in (1, 2, 3, 4)]


def test_lengths_fit_the_context() -> None:
    assert fitting_lengths(None, 32, 1_024) == [128, 512]
    assert fitting_lengths(None, 32, 256) == [128]
    assert fitting_lengths(None, 8, 64) == [56]
    assert fitting_lengths([3, 56], 8, 64) == [3, 56]
    with pytest.raises(RecipeError, match=r"--lengths has 57, which with 8 new tokens exceeds .* of 64"):
        fitting_lengths([57], 8, 64)
    with pytest.raises(RecipeError, match="--new-tokens is 64"):
        fitting_lengths(None, 64, 64)


def test_too_little_memory_names_the_cell(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: Passes) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Passes, "decode", exhausted)
    with pytest.raises(RecipeError, match="2 sequences of 8 tokens do not fit the memory of cpu"):
        measure_latency(model, LatencyPlan([2], [8], new_tokens=2))


def test_a_preset_has_random_weights_of_the_type_asked_for() -> None:
    opened = open_model("tiny", device="cpu", dtype=torch.bfloat16)
    model = opened.model
    assert opened.num_parameters == sum(parameter.numel() for parameter in Transformer(model.config).parameters())
    assert opened.weights_bytes == 2 * opened.num_parameters
    assert model.config == create_config("llama-tiny")
    assert model.dtype == torch.bfloat16
    assert not getattr(model, "training", False)  # a packed model has no such mode
    [cell] = measure_latency(model, LatencyPlan([2], [8], new_tokens=2, warmup=0, repeats=1))
    assert cell.prefill_ms > 0
    assert cell.decode_ms_per_token > 0


@pytest.fixture
def command(command: Command) -> Command:
    return partial(command, "latency")


def test_the_command_prints_the_grid(command: Command, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "gpt2", "gpt2", context=64)
    options = ("--batch-sizes", "1,2", "--lengths", "8, 16", "--new-tokens", 2, "--repeats", 1, "--device", "cpu")
    status, out, err = command(folder, *options, "--out", tmp_path / "grid.json", "--json")
    assert (status, err) == (0, "")
    values = json.loads(out)
    assert json.loads((tmp_path / "grid.json").read_text()) == values
    assert [(cell["batch_size"], cell["length"]) for cell in values["grid"]] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    assert values["grid"][0].keys() == {
        "batch_size", "length", "prefill_ms", "prefill_tokens_per_second", "decode_ms_per_token",
        "decode_tokens_per_second", "cache_bytes", "peak_bytes",
    }  # fmt: skip
    assert values.keys() == {
        "model", "device", "device_name", "dtype", "threads", "parameters", "weights_bytes", "new_tokens", "grid",
    }  # fmt: skip
    assert values["weights_bytes"] == 4 * values["parameters"]
    status, out, _ = command(folder, *options)
    assert status == 0
    lines = out.splitlines()
    assert "float32 on cpu" in lines[0]
    assert lines[1] == "batch  length  prefill ms  tokens/s  decode ms/token  tokens/s  KV cache"
    assert [line.split()[:2] for line in lines[2:]] == [["1", "8"], ["1", "16"], ["2", "8"], ["2", "16"]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["gpt-2"], "error: gpt-2 is neither a checkpoint folder nor a preset; presets are gpt2,"),
        (["gpt2", "--batch-sizes", "1,x"], "error: --batch-sizes is '1,x' but must be positive whole numbers"),
        (["gpt2", "--lengths", "0"], "error: --lengths is '0' but must be positive"),
        (["gpt2", "--out", "absent/grid.json"], "error: --out absent/grid.json: its folder does not exist"),
        (["shakespeare-char", "--lengths", "512"], "error: --lengths has 512, which with 32 new tokens"),
        (["gpt2", "--device", "tpu"], "error: device 'tpu'"),
    ],
)
def test_mistakes_are_one_sentence(
    args: list[str], message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*args)
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
