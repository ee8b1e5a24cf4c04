"""Examples in rows: which tokens are read, which count, what their loss is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from model.checkpoint import load_model
from tests.training.conftest import config_of, train
from tests.training.instructions import make_rows, save_tiny_llama, write_rows
from training.config import TrainConfig
from training.data.dataset import open_split
from training.data.examples import IGNORED, ExampleRows, ExampleSplit
from training.data.examples_loader import ExampleLoader
from training.data.shards import data_digest, read_manifest
from training.data.token_split import TokenSplit
from training.distributed import Distributed
from training.errors import DataError, RecipeError
from training.evaluate_examples import evaluate_answers, evaluate_examples
from training.run import open_inputs
from training.tasks.instruct_data import InstructDataRequest, prepare_instructions

LENGTH = 100  # no example is longer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = write_rows(folder / "rows.json", make_rows(60))
    prepare_instructions(InstructDataRequest((str(rows),), folder / "examples", str(base), "chat", 0.3))
    return folder / "examples"


def make_split(examples: list[tuple[int, int]]) -> ExampleSplit:
    """Of pairs (tokens of the prompt, tokens of the answer); every token is a number of its own."""
    counted = np.concatenate([[0] * prompt + [1] * answer for prompt, answer in examples]).astype(np.uint8)
    ends = np.cumsum([prompt + answer for prompt, answer in examples])
    tokens = TokenSplit("train", [np.arange(len(counted), dtype=np.uint16)], lambda: len(counted))
    return ExampleSplit(tokens, counted, ends.astype(np.int64), answer_bytes=int(counted.sum()))


EXAMPLES = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=30)


@settings(deadline=None)
@given(examples=EXAMPLES, seq_len=st.integers(2, 24), packing=st.booleans(), seed=st.integers(0, 2**40))
def test_each_example_is_whole_in_one_row_and_its_answer_alone_counts(
    examples: list[tuple[int, int]], seq_len: int, packing: bool, seed: int
) -> None:
    split = make_split(examples)
    if not any(prompt <= seq_len for prompt, _ in examples):
        with pytest.raises(DataError, match=rf"within train\.seq_len, {seq_len}"):
            ExampleRows(split, seq_len, packing=packing, seed=seed)
        return
    rows = ExampleRows(split, seq_len, packing=packing, seed=seed)
    inputs, targets = rows.stack(range(len(rows)))
    found: dict[int, int] = {}
    for line_inputs, line_targets in zip(inputs.tolist(), targets.tolist(), strict=True):
        for token, target in zip(line_inputs, line_targets, strict=True):
            if target != IGNORED:
                assert target == token + 1  # the next of the same example
                assert target not in found
                found[target] = token
    starts = [end - sum(pair) for end, pair in zip(split.ends.tolist(), examples, strict=True)]
    wanted = {
        token
        for start, (prompt, answer) in zip(starts, examples, strict=True)
        for token in range(start + prompt, min(start + prompt + answer, start + seq_len + 1))
    }
    assert set(found) == wanted
    assert rows.left_out == sum(prompt > seq_len for prompt, _ in examples)
    assert rows.truncated == sum(prompt <= seq_len and prompt + answer > seq_len + 1 for prompt, answer in examples)
    assert rows.targets.sum() == len(wanted)
    if not packing:
        assert len(rows) == rows.num_examples


def test_packed_rows_are_as_full_as_neighbours_allow() -> None:
    rows = ExampleRows(make_split([(2, 3)] * 11), 16, packing=True)
    assert sorted(rows.lengths.tolist()) == [10, 15, 15, 15]
    assert rows.stack([0])[0].shape == (1, 16)


@settings(deadline=None)
@given(examples=EXAMPLES, first=st.integers(0, 100), count=st.integers(0, 100), packing=st.booleans())
def test_sizes_are_those_of_the_batches(examples: list[tuple[int, int]], first: int, count: int, packing: bool) -> None:
    loader = ExampleLoader(ExampleRows(make_split(examples), 16, packing=packing), seed=5)
    size = loader.size(first, count)
    tokens = targets = 0
    for number in range(first, first + count):
        tokens += int(loader.rows.lengths[loader.row(number)])
        targets += int((loader.batch(number, 1)[1] != IGNORED).sum())
    assert size == (tokens, targets)


def test_an_epoch_reads_each_row_once_in_an_order_of_its_own() -> None:
    loader = ExampleLoader(ExampleRows(make_split([(1, 2)] * 40), 8, packing=False), seed=1)
    epochs = [tuple(loader.row(40 * epoch + index) for index in range(40)) for epoch in range(3)]
    assert all(sorted(order) == list(range(40)) for order in epochs)
    assert len(set(epochs)) == 3
    again = ExampleLoader(ExampleRows(make_split([(1, 2)] * 40), 8, packing=False), seed=1)
    assert tuple(again.row(40 + index) for index in range(40)) == epochs[1]


def test_the_loss_is_that_of_transformers_with_the_same_labels(base: Path, data: Path) -> None:
    split = open_split(data, "val")
    assert isinstance(split, ExampleSplit)
    theirs = AutoModelForCausalLM.from_pretrained(base).eval()
    total, counted = 0.0, 0
    for start, end in zip(split.starts.tolist(), split.ends.tolist(), strict=True):
        ids = torch.from_numpy(split.read(start, end - start))[None]
        labels = ids.where(torch.from_numpy(split.counted[start:end].copy()).bool(), torch.tensor(IGNORED))
        count = int((labels[:, 1:] != IGNORED).sum())
        with torch.no_grad():
            total += float(theirs(input_ids=ids, labels=labels).loss) * count
        counted += count
    ours = evaluate_answers(load_model(base), split, seq_len=LENGTH, batch_size=4)
    assert ours.tokens == counted == split.num_targets
    assert ours.loss == pytest.approx(total / counted, rel=1e-5)


def test_packing_counts_the_same_targets(data: Path) -> None:
    split = open_split(data, "train")
    assert isinstance(split, ExampleSplit)
    packed, padded = (ExampleRows(split, 3 * LENGTH, packing=packing) for packing in (True, False))
    assert packed.targets.sum() == padded.targets.sum() == split.num_targets
    assert len(packed) < len(padded) / 2


def recipe(data: Path, base: Path, run: Path, **changes: object) -> TrainConfig:
    tree: dict[str, dict[str, object]] = {
        "data": {"dir": str(data), "loader": "padded"},
        "model": {"init_from": str(base)},
        "train": {"max_steps": 4, "batch_size": 4, "seq_len": LENGTH, "lr": 1e-3, "warmup_steps": 0, "dtype": "float32",
                  "device": "cpu", "log_interval": 1, "eval_interval": 2, "save_interval": 2},
        "run": {"dir": str(run)},
    }  # fmt: skip
    return config_of(tree, changes)


def losses(config: TrainConfig, split: str = "train") -> list[float]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["split"] == split]


def test_a_step_is_the_mean_over_all_its_answers_whatever_the_micro_batches(
    base: Path, data: Path, tmp_path: Path
) -> None:
    changes = {"whole": (4, 1), "halves": (2, 2), "ones": (1, 4)}
    configs = [
        recipe(data, base, tmp_path / name, train__batch_size=size, train__grad_accum_steps=accumulation)
        for name, (size, accumulation) in changes.items()
    ]
    for config in configs:
        train(config)
    assert losses(configs[1]) == pytest.approx(losses(configs[0]), rel=1e-5)
    assert losses(configs[2]) == pytest.approx(losses(configs[0]), rel=1e-5)
    # The first step's loss, by hand, from the untouched weights.
    inputs = open_inputs(configs[0], Distributed(torch.device("cpu")))
    block, labels = map(torch.from_numpy, inputs.loader.batch(0, 4))
    model = load_model(base)
    with torch.no_grad():
        logits = model.compute_logits(model(block))
    assert len({int(row.sum()) for row in labels != IGNORED}) > 1  # of different lengths, or all means were one
    assert losses(configs[0])[0] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())


def test_tokens_of_the_log_are_those_that_were_read(base: Path, data: Path, tmp_path: Path) -> None:
    config = recipe(data, base, tmp_path / "run")
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loader = open_inputs(config, Distributed(torch.device("cpu"))).loader
    assert lines[-1]["tokens"] == loader.size(0, 16).tokens < 16 * LENGTH


def test_validation_reads_as_much_as_it_is_told(base: Path, data: Path) -> None:
    split = open_split(data, "val")
    assert isinstance(split, ExampleSplit)
    widths = []

    def summed_loss(inputs: torch.Tensor, targets: torch.Tensor, skip: int) -> torch.Tensor:
        widths.append(len(inputs))
        return (targets != IGNORED).sum().float()

    alone = Distributed(torch.device("cpu"))
    part = evaluate_examples(summed_loss, split, alone, seq_len=LENGTH, batch_size=2, max_tokens=40)
    whole = evaluate_examples(summed_loss, split, alone, seq_len=LENGTH, batch_size=2)
    assert part.loss == whole.loss == 1.0  # every counted target once
    assert 40 <= part.tokens < 70 < whole.tokens == split.num_targets


def test_examples_and_texts_have_their_own_loaders(base: Path, data: Path, data_dir: Path, tmp_path: Path) -> None:
    alone = Distributed(torch.device("cpu"))
    with pytest.raises(RecipeError, match=r"data\.loader is sliding but the data are examples"):
        open_inputs(recipe(data, base, tmp_path, data__loader="sliding"), alone)
    with pytest.raises(RecipeError, match=r"data\.loader is padded but the data are no examples"):
        open_inputs(recipe(data_dir, base, tmp_path), alone)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("val-counted.bin", lambda data: bytes([data[0] ^ 1]) + data[1:], "does not match the manifest's sha256"),
        ("val-ends.bin", lambda data: data[:-8], "does not match the manifest's sha256"),
        ("val-ends.bin", None, "cannot be read"),
    ],
)
def test_damaged_examples_are_refused(name: str, change: object, message: str, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    path = copy / name
    if callable(change):
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(DataError, match=message):
        open_split(copy, "val")


def test_marks_that_do_not_fit_the_tokens_are_refused(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    val, train = manifest["splits"]["val"], manifest["splits"]["train"]
    val["examples"], train["examples"] = train["examples"], val["examples"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="the val examples do not fit their tokens"):
        open_split(copy, "val")


def test_the_identity_of_the_data_includes_what_counts(data: Path) -> None:
    manifest = read_manifest(data)
    info = manifest.splits["val"]
    assert info.examples is not None
    changed = msgspec.structs.replace(
        info.examples, counted=msgspec.structs.replace(info.examples.counted, sha256="0" * 64)
    )
    splits = manifest.splits | {"val": msgspec.structs.replace(info, examples=changed)}
    assert data_digest(msgspec.structs.replace(manifest, splits=splits)) != data_digest(manifest)
