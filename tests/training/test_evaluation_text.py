"""Perplexity of texts against transformers' own loss, over windows and strides; large, several and compressed files."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from model.tokenizer import Tokenizer
from tests.training.conftest import make_text
from tests.training.tiny_models import save_tiny_model
from training.data import readers
from training.errors import DataError
from training.evaluate import TextSource, evaluate_checkpoint, open_checkpoint
from training.evaluation.text import encode_files

CONTEXT = 48


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / request.param, request.param, context=CONTEXT)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(make_text(60).encode())
    return path


def masked_perplexity(folder: Path, ids: torch.Tensor, length: int, stride: int) -> float:
    """transformers' recipe for long texts: windows that overlap, with labels of -100 where tokens have counted.

    A window holds at most `length` + 1 tokens, the last of which is a target only; the next ends `stride` tokens on.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, done = 0.0, 1
    for end in [*range(length + 1, len(ids), stride), len(ids)]:
        window = ids[max(0, end - length - 1) : end][None]
        labels = window.clone()
        labels[:, : window.shape[1] - (end - done)] = -100
        with torch.no_grad():
            logits = model(window[:, :-1]).logits
            # What the last token predicts has no label; GPT-2 has no position for it in a window of its whole context.
            logits = torch.cat([logits, logits[:, -1:]], dim=1)
            loss = model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size)
        total, done = total + loss.item() * (end - done), end
    return math.exp(total / (len(ids) - 1))


def plain_perplexity(folder: Path, ids: torch.Tensor, length: int) -> float:
    """Windows side by side, by transformers' logits for all their tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, length):
            window = ids[start : start + length + 1]
            logits = model(window[None, :-1]).logits[0]
            total -= logits.log_softmax(-1).gather(1, window[1:, None]).double().sum().item()
    return math.exp(total / (len(ids) - 1))


@pytest.mark.parametrize(("length", "stride"), [(48, None), (48, 16), (20, 7), (31, 1), (7, None)])
def test_perplexity_equals_that_of_transformers(checkpoint: Path, text: Path, length: int, stride: int | None) -> None:
    ids = torch.tensor(Tokenizer.bytes().encode(text.read_text("utf-8")))
    result = evaluate_checkpoint(checkpoint, text=text, seq_len=length, stride=stride, batch_size=5, device="cpu")
    if stride is None:
        expected = plain_perplexity(checkpoint, ids, length)
    else:
        expected = masked_perplexity(checkpoint, ids, length, stride)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.tokens == len(ids) - 1


def test_more_context_is_a_lower_perplexity_only_where_the_model_uses_it(checkpoint: Path, text: Path) -> None:
    """A stride below the window changes the figure, so the tests above do tell windows apart."""
    loaded = open_checkpoint(checkpoint, device="cpu")
    figures = {
        stride: loaded.evaluate(TextSource(texts=[text]), seq_len=12, stride=stride).loss for stride in (12, 6, 3, 1)
    }
    assert len({round(loss, 6) for loss in figures.values()}) == 4


def test_several_files_are_documents_one_behind_the_other(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ink\n", "utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("स्याही".encode()))
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', "utf-8")
    tokens = encode_files([tmp_path / name for name in ("a.txt", "b.txt.gz", "c.jsonl")], Tokenizer.bytes())
    documents = [b"ink\n", "स्याही".encode(), b"one", b"two"]
    expected = list(documents[0])
    for document in documents[1:]:
        expected += [256, *document]
    assert tokens.read(0, tokens.num_tokens).tolist() == expected
    assert tokens.num_bytes == sum(map(len, documents))
    assert tokens.read(3, 2).tolist() == expected[3:5]
    (tmp_path / "d.jsonl").write_text('{"title": "ink", "body": "dries"}\n', "utf-8")
    joined = encode_files([tmp_path / "d.jsonl"], Tokenizer.bytes(), text_keys=("title", "body"))
    assert bytes(joined.read(0, 12).astype(np.uint8)) == b"ink\n\ndries"


@pytest.mark.parametrize("tokenizer", [Tokenizer.bytes(), Tokenizer.gpt2()], ids=["bytes", "gpt2"])
def test_a_text_read_in_pieces_has_the_tokens_of_the_whole(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_CHUNK", 64)
    text = make_text(400)
    (tmp_path / "a.txt").write_text(text, "utf-8", newline="")
    tokens = encode_files([tmp_path / "a.txt"], tokenizer)
    assert tokens.read(0, tokens.num_tokens).tolist() == tokenizer.encode(text)


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """The tokens lie in a file, a piece of text at a time in memory: four times the text takes no more of it."""
    line = (make_text(200) + "\n").encode()
    peaks = []
    for megabytes in (10, 40):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("wb") as file:
            for _ in range(megabytes * 1_000_000 // len(line)):
                file.write(line)
        tracemalloc.start()
        tokens = encode_files([path], Tokenizer.bytes())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert tokens.num_tokens == tokens.num_bytes == path.stat().st_size
        assert bytes(tokens.read(0, len(line)).astype(np.uint8)) == line
    assert peaks[1] < 1.1 * peaks[0]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("ink")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"ink" * 99)[:-9])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "ink"}) + "\n")
    for name, reason in [
        ("empty.txt", "the file is empty"), ("latin.txt", "not UTF-8 text"), ("cut.txt.gz", "damaged"),
        ("rows.jsonl", "has no 'text'"), ("absent.txt", "cannot be read"), (".", "cannot be read"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=reason) as refusal:
            encode_files([tmp_path / "good.txt", tmp_path / name], Tokenizer.bytes())
        assert str(tmp_path / name) in str(refusal.value)


def test_a_full_disk_is_told(tmp_path: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("ink")
    monkeypatch.setattr(
        "training.evaluation.text.tempfile.TemporaryFile", lambda **_: full_disk.open("wb", buffering=0)
    )
    with pytest.raises(DataError, match="cannot hold the text's tokens \\(No space left"):
        encode_files([tmp_path / "a.txt"], Tokenizer.bytes())


def test_progress_is_told_to_the_end(checkpoint: Path, text: Path) -> None:
    told: dict[str, list[tuple[int, int | None]]] = {}
    open_checkpoint(checkpoint, device="cpu").evaluate(
        TextSource(texts=[text]), seq_len=8, stride=3, batch_size=2,
        on_progress=lambda what, done, total: told.setdefault(what, []).append((done, total)),
    )  # fmt: skip
    size = text.stat().st_size
    assert told["tokenising"][-1] == (size, size)
    assert told["predicting tokens"][-1] == (size - 1, size - 1)
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(told["predicting tokens"]))
