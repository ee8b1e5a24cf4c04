"""Labelled texts from files, their split, their batches, and the metrics, by hand-made examples and properties."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import DataError, RecipeError
from training.tasks.classification_batches import report_on, scoring_batches, training_batches
from training.tasks.classification_data import Columns, LabelledTexts, read_labelled, read_texts, split_rows
from training.tasks.classification_metrics import make_report

ROWS = (["Ok lar... \"joking\"", "WINNER!! £900, claim", "नमस्ते", "a, b"], ["ham", "spam", "ham", "ham"])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", 'ham\tOk lar... "joking"\nspam\tWINNER!! £900, claim\n\nham\tनमस्ते\r\nham\ta, b'),
        ("a.tsv", '\ufefflabel\ttext\nham\tOk lar... "joking"\nspam\tWINNER!! £900, claim\nham\tनमस्ते\nham\ta, b\n'),
        ("a.csv", 'ham,"Ok lar... ""joking"""\nspam,"WINNER!! £900, claim"\nham,नमस्ते\nham,"a, b"\n'),
        ("a.csv", 'id,text,label\n1,"Ok lar... ""joking""",ham\n2,"WINNER!! £900, claim",spam\n,नमस्ते,ham\n,"a, b",ham'),
        ("a.jsonl", "\n".join(json.dumps({"text": t, "label": n}) for t, n in zip(*ROWS, strict=True)) + "\n\n"),
    ],
    ids=["tsv", "tsv-header", "csv", "csv-header", "jsonl"],
)  # fmt: skip
def test_formats_say_the_same(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "utf-8", newline="")
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        data = read_labelled(path, Columns())
        assert (data.texts, data.labels) == ROWS


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Category,Message,Extra\nham,hello,1\nspam,win,2\n")
    assert read_labelled(path, Columns("Message", "Category")).labels == ["ham", "spam"]
    assert read_texts(path, Columns("Message")) == (["hello", "win"], None)
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a", "spam": true}\n{"body": "b", "spam": 0}\n')
    assert read_labelled(path, Columns("body", "spam")).labels == ["true", "0"]


def test_plain_text_has_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ttext\n\ntwo\n")
    assert read_texts(path, Columns()) == (["one\ttext", "two"], None)
    with pytest.raises(DataError, match="has no labels; name their column"):
        read_labelled(path, Columns())


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.tsv", b"a\tb\tc\n", Columns(), r"line 1: has the columns a, b, c; name two of them"),
        ("a.tsv", b"ham\ta\nspam\tb\tc\n", Columns(), r"line 2: has 3 columns where the first has 2"),
        ("a.tsv", b"ham\ta\n\tb\n", Columns(), r"line 2: has no label"),
        ("a.tsv", b"x\ty\n1\t2\n", Columns("text", "y"), r"line 1: has no column 'text' \(x, y\)"),
        ("a.tsv", b"x\ty\n1\t2\n", Columns("x", "z"), r"no column 'z' .*--label-column"),
        ("a.tsv", b"", Columns(), "holds no text"),
        ("a.tsv", b"ham\t\xff\n", Columns(), r"not UTF-8 text \(byte 0xff\)"),
        ("a.csv", b'ham,"a\n', Columns(), r"line \d: not a row of a CSV"),
        ("a.jsonl", b"[1]\n", Columns(), "line 1: not a JSON object"),
        ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": 5}\n', Columns(), "line 2: has no text in 'text'"),
        ("a.jsonl", b'{"text": "a", "label": 1.5}\n', Columns(), "line 1: 'label' must be a label"),
        ("a.jsonl", b'{"text": "a", "label": ""}\n', Columns(), "line 1: 'label' must be a label"),
        ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b"}\n', Columns(), "1 of 2 rows have no label"),
        ("a.xlsx", b"PK", Columns(), r"texts are read from \.tsv, \.csv"),
        ("a.tsv.gz", b"no gzip", Columns(), r"damaged or no \.gz file"),
        ("a.txt", b"a\n", Columns("text"), "plain text has no columns"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, columns: Columns, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_labelled(tmp_path / name, columns)
    with pytest.raises(DataError, match="cannot be read"):
        read_labelled(tmp_path / "nowhere.tsv", Columns())


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(8, 60), min_size=2, max_size=4), val=st.sampled_from([0.0, 0.1, 0.25]),
    test=st.sampled_from([0.0, 0.2, 0.33]), seed=st.integers(0, 2**32), repeats=st.integers(0, 2),
)  # fmt: skip
def test_parts_are_disjoint_stratified_and_repeatable(
    counts: list[int], val: float, test: float, seed: int, repeats: int
) -> None:
    texts = [f"{label}-{number}" for label, count in enumerate(counts) for number in range(count)]
    texts += texts[: repeats * 7]  # the same text again
    data = LabelledTexts(texts, [text.partition("-")[0] for text in texts])
    split = split_rows(data, val_fraction=val, test_fraction=test, seed=seed)
    assert sorted(split.train + split.val + split.test) == list(range(len(texts)))
    sets = [{texts[row] for row in rows} for rows in (split.train, split.val, split.test)]
    assert sum(map(len, sets)) == len(set(texts))
    for label, count in enumerate(counts):
        for part, fraction in ((sets[1], val), (sets[2], test)):
            found = sum(text.startswith(f"{label}-") for text in part)
            assert abs(found - count * fraction) <= 1
            assert (found > 0) == (fraction > 0)
    assert split == split_rows(data, val_fraction=val, test_fraction=test, seed=seed)


def test_the_seed_decides_the_split() -> None:
    data = LabelledTexts([str(n) for n in range(100)], ["a", "b"] * 50)
    splits = [split_rows(data, val_fraction=0.1, test_fraction=0.2, seed=seed).test for seed in range(3)]
    assert len({tuple(rows) for rows in splits}) == 3


def test_splits_that_cannot_be_made() -> None:
    data = LabelledTexts(["a", "a", "b", "c"], ["x", "x", "y", "y"])
    with pytest.raises(DataError, match="label 'x' has 1 different texts, too few"):
        split_rows(data, val_fraction=0.1, test_fraction=0.0, seed=0)
    with pytest.raises(RecipeError, match=r"--val-fraction is 1\.5"):
        split_rows(data, val_fraction=1.5, test_fraction=0.0, seed=0)
    with pytest.raises(RecipeError, match="leave no text to train on"):
        split_rows(data, val_fraction=0.5, test_fraction=0.5, seed=0)


def test_batches_hold_every_text_once_and_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (1_000,), generator=generator).tolist()
    batches = training_batches(lengths, 16, seed=1, epoch=1)
    assert sorted(index for batch in batches for index in batch) == list(range(1_000))
    assert {len(batch) for batch in batches} <= {16, 8}
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)  # in an order without buckets it is 1.8 times
    assert batches == training_batches(lengths, 16, seed=1, epoch=1)
    assert batches != training_batches(lengths, 16, seed=1, epoch=2)
    assert batches != training_batches(lengths, 16, seed=2, epoch=1)
    scored = list(scoring_batches(lengths, 64))
    assert sorted(index for batch in scored for index in batch) == list(range(1_000))


def test_metrics_of_a_hand_made_confusion() -> None:
    """40 of a, 10 of b, 50 of c; rows are true labels:  [[30, 0, 10], [5, 5, 0], [0, 0, 50]]."""
    true = [0] * 40 + [1] * 10 + [2] * 50
    given_labels = [0] * 30 + [2] * 10 + [0] * 5 + [1] * 5 + [2] * 50
    report = make_report(("a", "b", "c"), true, given_labels)
    assert report.confusion == ((30, 0, 10), (5, 5, 0), (0, 0, 50))
    assert report.accuracy == pytest.approx(85 / 100)
    assert report.majority == pytest.approx(50 / 100)
    a, b, c = report.scores.values()
    assert (a.precision, a.recall, a.f1, a.support) == pytest.approx((30 / 35, 30 / 40, 60 / 75, 40))
    assert (b.precision, b.recall, b.f1, b.support) == pytest.approx((5 / 5, 5 / 10, 10 / 15, 10))
    assert (c.precision, c.recall, c.f1, c.support) == pytest.approx((50 / 60, 50 / 50, 100 / 110, 50))
    assert report.macro.f1 == pytest.approx((60 / 75 + 10 / 15 + 100 / 110) / 3)
    assert report.macro.precision == pytest.approx((30 / 35 + 1 + 50 / 60) / 3)
    assert report.macro.recall == pytest.approx((30 / 40 + 5 / 10 + 1) / 3)
    assert json.loads(json.dumps(report.describe()))["confusion"] == [[30, 0, 10], [5, 5, 0], [0, 0, 50]]
    lines = report.lines()
    assert lines[1].split() == ["a", "0.8571", "0.7500", "0.8000", "40"]
    assert lines[-3].split() == ["a", "30", "0", "10"]


def test_a_label_that_is_never_given_or_never_true_scores_zero() -> None:
    report = make_report(("a", "b", "c"), [0, 0, 1], [0, 0, 0])
    assert report.scores["b"].precision == report.scores["b"].recall == report.scores["b"].f1 == 0.0
    assert report.scores["c"].f1 == 0.0
    assert report.scores["a"].f1 == pytest.approx(4 / 5)


def test_the_loss_is_the_cross_entropy() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0]])
    report = report_on(("a", "b"), logits.log_softmax(-1), [0, 1, 1])
    assert report.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 1])).item())
    assert report.confusion == ((1, 0), (1, 1))
