"""HellaSwag's two accuracies against transformers, one ending at a time without padding."""

from __future__ import annotations

import gzip
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from model.tokenizer import Tokenizer
from tests.training.tiny_models import save_tiny_model
from training import loss as loss_module
from training.errors import DataError
from training.evaluate import open_checkpoint
from training.evaluation import hellaswag
from training.evaluation.hellaswag import ending_losses, multiple_choice
from training.evaluation.hellaswag_rows import Item, read_items

ROWS: list[dict[str, Any]] = [
    {"ind": 0, "activity_label": "Writing", "ctx_a": "A hand takes a quill.", "ctx_b": "it",
     "ctx": "A hand takes a quill. it", "split": "val", "label": 0,
     "endings": ["dips the quill into the ink.", "eats.", "flies over the sea to an island far off.", "is a fish."]},
    {"ind": 1, "ctx": "The cook cuts an onion. She", "label": 2,
     "endings": ["sails.", "sings to the moon and the sun.", "puts it into the pan.", "cuts the river."]},
    {"ind": 2, "ctx": "स्याही सूख गई", "label": 1, "endings": ["।", "और पत्र पूरा हुआ।", "?", "पानी"]},
    {"ind": 3, "ctx": "Two boys throw a ball. One of them", "label": 3,
     "endings": ["is rain.", "reads it.", "melts in the sun, slowly and without a word.", "catches it."]},
    {"ind": 4, "ctx": "x", "label": 0, "endings": ["y", "yy", "yyy", "yyyy"]},
    {"ind": 5, "ctx": "How to mend a shirt: [header] Thread a needle. [title] Take", "label": 1,
     "endings": ["a boat.", "thread of the shirt's colour.", "off your roof tiles.", "the ball, and run with it."]},
    {"ind": 6, "ctx": "Snow fell. The dog", "label": 2, "endings": ["wrote.", "paid.", "ran out.", "thawed the lake."]},
]  # fmt: skip


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / request.param, request.param, context=160)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "val.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), "utf-8")
    return path


@cache
def transformers_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def transformers_losses(folder: Path, row: dict[str, Any]) -> list[tuple[float, float]]:
    """Sum and mean, in nats, of each ending's cross-entropies. The tokens are the bytes of the text."""
    model = transformers_model(folder)
    losses = []
    for ending in row["endings"]:
        context, behind = list(row["ctx"].encode()), list((" " + ending).encode())
        ids = torch.tensor([context + behind])
        with torch.no_grad():
            logits = model(ids).logits[0, len(context) - 1 : -1]
        each = F.cross_entropy(logits, ids[0, len(context) :], reduction="none")
        losses.append((each.sum().item(), each.mean().item()))
    return losses


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_both_accuracies_equal_those_of_transformers(checkpoint: Path, rows_file: Path, batch_size: int) -> None:
    loaded = open_checkpoint(checkpoint, device="cpu")
    result = multiple_choice(loaded.model, loaded.tokenizer, read_items(str(rows_file)), batch_size=batch_size)
    losses = [transformers_losses(checkpoint, row) for row in ROWS]
    choices = [[min(range(4), key=lambda n: of[n][kind]) for of in losses] for kind in (0, 1)]
    assert choices[0] != choices[1]  # or the two would not be told apart
    right = [sum(choice == row["label"] for choice, row in zip(own, ROWS, strict=True)) for own in choices]
    assert (result.acc, result.acc_norm) == (right[0] / 7, right[1] / 7)
    assert (result.items, result.cut) == (7, 0)
    assert result.acc_norm_stderr == pytest.approx(math.sqrt(right[1] / 7 * (1 - right[1] / 7) / 7))


def test_the_labelled_ending_is_what_counts(checkpoint: Path) -> None:
    """Labelled by transformers' choices every item is right, labelled otherwise none."""
    loaded = open_checkpoint(checkpoint, device="cpu")
    choices = [min(range(4), key=lambda n: transformers_losses(checkpoint, row)[n][0]) for row in ROWS[:3]]
    for offset, expected in ((0, 1.0), (1, 0.0)):
        items = [
            Item(row["ctx"], row["endings"], (choice + offset) % 4) for row, choice in zip(ROWS, choices, strict=False)
        ]
        assert multiple_choice(loaded.model, loaded.tokenizer, items).acc == expected


def test_losses_of_a_padded_batch_are_those_of_each_ending_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_checkpoint(checkpoint, device="cpu").model
    expected = [total for row in ROWS for total, _ in transformers_losses(checkpoint, row)]
    sequences = [
        ([*row["ctx"].encode(), *f" {ending}".encode()], len(f" {ending}".encode()))
        for row in ROWS
        for ending in row["endings"]
    ]
    with torch.no_grad():
        assert ending_losses(model, sequences) == pytest.approx(expected, rel=1e-5)
        monkeypatch.setattr(hellaswag, "max_logits", lambda device: 3 * 257)
        assert ending_losses(model, sequences) == pytest.approx(expected, rel=1e-5)
    assert loss_module.max_logits(model.device) > 3 * 257


def test_what_exceeds_the_context_loses_its_beginning(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "short", "gpt2", context=12)
    loaded = open_checkpoint(folder, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    items = [Item("0123456789", ("abcd", "ef"), 0), Item("01", ("abcd", "an ending longer than all"), 0)]
    result = multiple_choice(loaded.model, loaded.tokenizer, items)
    assert result.cut == 2  # "0123456789 abcd" has 15 tokens: the model sees 12 and predicts the 13th

    def mean_loss(text: str, scored: int) -> float:
        ids = torch.tensor([list(text.encode())[-13:]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0]
        return F.cross_entropy(logits[-scored:], ids[0, -scored:]).item()

    first = mean_loss("0123456789 abcd", 5) < mean_loss("0123456789 ef", 3)
    second = mean_loss("01 abcd", 5) < mean_loss("01 an ending longer than all", 12)
    assert result.acc_norm == (first + second) / 2


def test_rows_come_from_any_copy_of_the_data(rows_file: Path, tmp_path: Path) -> None:
    import datasets

    items = read_items(str(rows_file))
    assert items[0] == Item("A hand takes a quill. it", ROWS[0]["endings"], 0)
    (tmp_path / "val.jsonl.gz").write_bytes(gzip.compress(rows_file.read_bytes()))
    assert read_items(str(tmp_path / "val.jsonl.gz")) == items
    assert read_items(str(rows_file), limit=2) == items[:2]
    columns = {name: [row[name] for row in ROWS] for name in ("ctx", "endings")}
    hub = datasets.Dataset.from_dict({**columns, "label": [str(row["label"]) for row in ROWS]})
    hub.save_to_disk(tmp_path / "saved", num_proc=None)
    assert read_items(f"hf:{tmp_path / 'saved'}") == items


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": ""}, "line 2: has no label; take the validation split"),
        ({"label": 4}, "the label is '4' but must number one of 4 endings"),
        ({"label": "-1"}, "the label is '-1'"),
        ({"endings": ["one"]}, "needs a context in `ctx` and two or more `endings`"),
        ({"ctx": " "}, "needs a context"),
        ({"ctx": 3}, "line 2: Expected `str`, got `int`"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1] | row) + "\n")
    with pytest.raises(DataError) as refusal:
        read_items(str(path))
    assert message in str(refusal.value)


def test_a_file_that_holds_no_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "text.jsonl").write_text("no JSON\n")
    for name, message in (("empty", "holds no row"), ("text", "line 1: JSON is malformed"), ("absent", "cannot be")):
        with pytest.raises(DataError, match=message):
            read_items(str(tmp_path / f"{name}.jsonl"))


def test_the_context_begins_as_the_tokenizer_says(tmp_path: Path) -> None:
    """A tokenizer whose post-processor adds a token before a text adds it before the context and nowhere else."""
    seen: list[Any] = []

    class Recording(Tokenizer):
        def encode(self, text: str, *, add_special: bool = True) -> list[int]:
            seen.append((text, add_special))
            return super().encode(text, add_special=add_special)

    loaded = open_checkpoint(save_tiny_model(tmp_path / "m", "llama"), device="cpu")
    recording = Recording.bytes()
    multiple_choice(loaded.model, recording, [Item("ctx", ("a", "b"), 0)])
    assert seen == [("ctx", True), (" a", False), (" b", False)]
