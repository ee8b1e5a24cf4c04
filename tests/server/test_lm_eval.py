"""lm-evaluation-harness over a real server: its `local-completions` model scores local task files, and finds what
training's `evaluate` finds."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from model.tokenizer import Tokenizer
from tests.server.real import EOS, RealServer, random_config, running, save_random
from training.evaluate import LoadedCheckpoint, evaluate_loss, open_checkpoint
from training.evaluation.text import TextTokens

LM_EVAL = shutil.which("lm_eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        LM_EVAL is None, reason="lm_eval is not on the PATH: it comes with pip install 'lm_eval[api]' transformers"
    ),
]
CONTEXT = random_config().max_seq_len
# lm-eval keeps a token for the completion that it must ask for, and one for what precedes a window.
WINDOW = CONTEXT - 2
TEXT = "The quill writes, and having writ — स्याही 🖋 — moves on; "
# Within a window, almost a window, and two whole ones: a shorter last window has more context there than here.
TEXTS = [TEXT, (TEXT * 30).encode()[:WINDOW].decode(errors="ignore"), ("ink and paper, " * 90)[: 2 * WINDOW]]
QUESTIONS = [
    {"question": "The quill", "choices": ["writes", "reads", "sleeps, and dreams"], "answer": 0},
    {"question": "स्याही", "choices": ["dries", "is ink"], "answer": 1},
    {"question": "1 + 1 =", "choices": ["3", "2", "two", "11"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("lm-eval") / "random")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RealServer]:
    with running(folder, "--num-threads", "1") as server:
        server.wait_ready()
        yield server


def run_task(folder: Path, server: RealServer, out: Path, rows: list[dict[str, Any]], **task: Any) -> dict[str, Any]:
    """lm-eval's results and samples for one task over `rows`."""
    data = out / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {"task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (out / "local.yaml").write_text(yaml.safe_dump({**common, "test_split": "test", **task}), encoding="utf-8")
    model = (
        f"base_url={server.url}/v1/completions,model={folder.name},tokenizer={folder},tokenizer_backend=huggingface,"
        f"max_length={CONTEXT},max_retries=1"
    )
    assert LM_EVAL is not None
    command = [LM_EVAL, "run", "--model", "local-completions", "--model_args", model, "--tasks", "local",
               "--batch_size", "2", "--include_path", str(out), "--output_path", str(out / "results"),
               "--log_samples"]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "cache")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    [results] = (out / "results").rglob("results_*.json")
    [samples] = (out / "results").rglob("samples_*.jsonl")
    found: dict[str, Any] = json.loads(results.read_text())["results"]["local"]
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return {**found, "samples": sorted(lines, key=lambda line: int(line["doc_id"]))}


def log_likelihood(checkpoint: LoadedCheckpoint, ids: list[int], seq_len: int = WINDOW) -> float:
    evaluation = evaluate_loss(checkpoint.model, TextTokens(np.array(ids), len(ids)), seq_len=seq_len)
    return -evaluation.loss * evaluation.tokens


def test_rolling_log_likelihood_is_evaluates(folder: Path, server: RealServer, tmp_path: Path) -> None:
    metrics = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte"}]
    found = run_task(
        folder, server, tmp_path, [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}", metric_list=metrics,
    )  # fmt: skip
    checkpoint = open_checkpoint(folder, device="cpu")
    # It predicts the first token as well, from the end-of-text token.
    expected = [log_likelihood(checkpoint, [EOS, *Tokenizer.bytes().encode(text)]) for text in TEXTS]
    assert [float(line["resps"][0][0]) for line in found["samples"]] == pytest.approx(expected, rel=1e-5)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found["bits_per_byte,none"] == pytest.approx(-sum(expected) / num_bytes / math.log(2), rel=1e-5)


def test_choices_have_the_log_likelihoods_of_evaluate(folder: Path, server: RealServer, tmp_path: Path) -> None:
    found = run_task(
        folder, server, tmp_path, QUESTIONS,
        output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}",
        doc_to_target="answer", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    checkpoint, tokenizer = open_checkpoint(folder, device="cpu"), Tokenizer.bytes()
    right = 0
    for row, sample in zip(QUESTIONS, found["samples"], strict=True):
        context = tokenizer.encode(str(row["question"]))
        before = log_likelihood(checkpoint, context)
        wholes = [log_likelihood(checkpoint, context + tokenizer.encode(f" {choice}")) for choice in row["choices"]]
        expected = [whole - before for whole in wholes]
        assert [float(each[0][0]) for each in sample["resps"]] == pytest.approx(expected, rel=1e-4)
        right += expected.index(max(expected)) == row["answer"]
    assert found["acc,none"] == pytest.approx(right / len(QUESTIONS))
