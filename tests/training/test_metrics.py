"""FLOPs against the closed forms of the papers, peaks against data sheets, metrics.jsonl through crashes."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from model.config import ModelConfig
from model.presets import PRESETS
from model.transformer import Transformer
from training.device_peaks import gpu_peak_flops, measured_cpu_peak
from training.metrics import MetricsLog, flops_per_token, peak_flops, peak_memory, read_metrics


def meta_model(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def test_flops_of_gpt2_are_those_of_the_closed_form() -> None:
    """6·(weights without positions) + 12·L·H·d·T, the weights from GPT-2's published shapes."""
    layers, width, vocab, context = 12, 768, 50_257, 1_024
    block = 12 * width**2 + 13 * width  # qkv 3D²+3D, output D²+D, MLP 8D²+5D, two norms 4D
    weights = vocab * width + layers * block + 2 * width
    config = PRESETS["gpt2"]
    assert weights == 123_653_376
    assert flops_per_token(meta_model(config), config, context) == 6 * weights + 12 * layers * width * context


def test_an_untied_embedding_costs_no_flops() -> None:
    tied, untied = PRESETS["gpt2"], PRESETS["gpt2-untied"]
    assert flops_per_token(meta_model(tied), tied, 64) == flops_per_token(meta_model(untied), untied, 64)


@pytest.mark.parametrize(("window", "span"), [(None, 128), (32, 32), (128, 128), (4_096, 128)])
def test_a_sliding_window_counts_no_more_than_its_keys(window: int | None, span: int) -> None:
    config = replace(PRESETS["llama-tiny"], sliding_window=window)
    model = meta_model(config)
    products = sum(p.numel() for name, p in model.named_parameters() if name != "embed_tokens.weight")
    head = config.vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * span
    assert (
        flops_per_token(model, config, 128) == 6 * (products + (head if config.tie_word_embeddings else 0)) + attention
    )


@pytest.mark.parametrize(
    ("name", "bfloat16", "tf32", "float32"),
    [
        ("NVIDIA H200", 989, 494, 67),
        ("NVIDIA H100 80GB HBM3", 989, 494, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A10", 125, 62.5, 31.2),
        ("NVIDIA A10G", 70, 35, 31.5),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("NVIDIA RTX 6000 Ada Generation", 364, 182, 91.1),
        ("NVIDIA GeForce RTX 3090 Ti", 80, 40, 40),
        ("NVIDIA B300 SXM6 AC", 2250, 1125, 75),
        ("NVIDIA H20", 148, 74, 44),
        ("Tesla T4", 65, 8.1, 8.1),
        ("Tesla V100-PCIE-16GB", 112, 14, 14),
        ("AMD Instinct MI300X", 1307, 654, 163),
        ("AMD Instinct MI250X", 191.5, 47.9, 47.9),
    ],
)
def test_a_card_is_known_by_the_words_of_its_name(name: str, bfloat16: float, tf32: float, float32: float) -> None:
    assert gpu_peak_flops(name, torch.bfloat16) == gpu_peak_flops(name, torch.float16) == bfloat16 * 1e12
    assert gpu_peak_flops(name, torch.float32) == tf32 * 1e12
    assert gpu_peak_flops(name, torch.float32, tf32=False) == float32 * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000", "NVIDIA T400", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Some Other Card", "",
    ],
)  # fmt: skip
def test_no_figure_is_better_than_that_of_another_card(name: str) -> None:
    assert gpu_peak_flops(name, torch.bfloat16) is None


def test_the_cpus_peak_is_real_and_measured_once() -> None:
    device, size = torch.device("cpu"), 512
    peak = peak_flops(device, torch.float32)
    matrix = torch.ones(size, size)
    start = time.perf_counter()
    _ = matrix @ matrix
    rate = 2 * size**3 / (time.perf_counter() - start)
    assert peak is not None
    assert peak > 0.5 * rate  # a single cold product does not beat the best of many by much
    start = time.perf_counter()
    assert peak_flops(device, torch.float32) == peak
    assert time.perf_counter() - start < 0.01
    assert measured_cpu_peak(torch.float16) == measured_cpu_peak(torch.bfloat16)


def test_other_devices_have_no_known_peak() -> None:
    assert peak_flops(torch.device("meta"), torch.float32) is None


def test_peak_memory_of_the_cpu_holds_what_is_resident_now() -> None:
    held = torch.ones(1 << 26, dtype=torch.uint8)
    resident = psutil.Process().memory_info().rss
    assert resident > held.numel()
    peak = peak_memory(torch.device("cpu"))
    assert 0.95 * resident < peak < psutil.virtual_memory().total
    del held
    assert peak_memory(torch.device("cpu")) >= peak


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write(step=1, split="train", loss=math.nan, lr=1e-3, mfu=math.inf, note=None)
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    values = json.loads(text, parse_constant=refuse)
    assert values == {"step": 1, "split": "train", "loss": None, "lr": 1e-3, "mfu": None, "note": None}


@pytest.mark.parametrize(
    "ending",
    [
        '{"step": 3, "loss": 1.0}',
        '{"step": 3, "lo',
        '{"step": 9, "loss": 1.0}\n',
        "\0\0\0\0",
        '{"loss": 2}\n[1]\n7\n"a"\n',
    ],
)
def test_a_resumed_log_goes_on_behind_whole_lines(ending: str, tmp_path: Path) -> None:
    """Cut anywhere, even just before the end of a line, the file stays one object a line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.30000000000000004}\n' + ending)
    log = MetricsLog(path, resume_step=3)
    log.write(step=4, loss=0.5)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    third = [{"step": 3, "loss": 1.0}] if ending.endswith("1.0}") else []
    assert lines == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.1 + 0.2}, *third, {"step": 4, "loss": 0.5}]
    assert read_metrics(path) == lines
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
