"""Fine-tuning a tiny random model on texts that a word inside them decides, from the file to the saved classifier."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from model.checkpoint import load_model, read_manifest, save_model
from model.classifier import load_classifier
from model.errors import CheckpointError, ConfigError, QuillError
from model.presets import create_config
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from tests.training.conftest import Command
from training.errors import DivergedError, RecipeError
from training.tasks import classification
from training.tasks.classification import finetune_classifier
from training.tasks.classification_data import read_labelled
from training.tasks.classification_predict import classify_texts
from training.tasks.classification_request import FinetuneRequest, FinetuneResult

WORDS = {"calm": "aaa", "loud": "zzz", "odd": "QQQ"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = create_config(
        "llama-tiny", vocab_size=257, hidden_size=32, num_heads=2, num_layers=2, max_seq_len=32, num_kv_heads=1,
        intermediate_size=64,
    )  # fmt: skip
    model = Transformer(replace(config, bos_token_id=256, eos_token_id=256, dropout=0.0))
    model.init_weights(1)
    out = tmp_path_factory.mktemp("base") / "tiny"
    save_model(out, model, tokenizer=Tokenizer.bytes(), dtype=torch.float32)
    return out


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 texts of digits with the deciding word anywhere, the labels 6 : 2 : 2."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("table") / "texts.tsv"
    with path.open("w") as file:
        for number in range(300):
            label = ("calm", "calm", "calm", "calm", "calm", "calm", "loud", "loud", "odd", "odd")[number % 10]
            digits = "".join(rng.choices("0123456789 ", k=rng.randint(4, 24)))
            place = rng.randint(0, len(digits))
            file.write(f"{label}\t{digits[:place]}{WORDS[label]}{digits[place:]}\n")
    return path


def request(base: Path, table: Path, out: Path, **values: Any) -> FinetuneRequest:
    return FinetuneRequest(base, table, out, **({"epochs": 8, "lr": 5e-3, "device": "cpu"} | values))


def finetune(request: FinetuneRequest) -> tuple[FinetuneResult, list[str]]:
    said: list[str] = []
    result = finetune_classifier(request, said.append)
    assert result is not None
    return result, said


@pytest.fixture(scope="module")
def tuned(base: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FinetuneResult, list[str]]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("tuned") / "classifier"
    return out, *finetune(request(base, table, out))


def test_a_tiny_random_model_learns_the_rule(tuned: tuple[Path, FinetuneResult, list[str]]) -> None:
    _, result, said = tuned
    assert result.test is not None
    assert result.test.accuracy >= 0.98
    assert result.test.total == 60
    assert result.test.labels == ("calm", "loud", "odd")
    first, best = result.epochs[0], result.best
    assert best.train_loss < first.train_loss / 5
    assert best.validation is not None
    assert best.validation.macro.f1 == max(each.validation.macro.f1 for each in result.epochs if each.validation)
    assert any("uneven (3.0 to 1)" in line and "'calm' would reach 60.0%" in line for line in said)
    assert said[1].split() == ["calm", "126", "18", "36", "60.0%"]


def test_the_folder_is_a_whole_checkpoint(tuned: tuple[Path, FinetuneResult, list[str]], table: Path) -> None:
    out, result, _ = tuned
    manifest = read_manifest(out)
    assert manifest is not None
    assert set(manifest.files) == {path.name for path in out.iterdir()} - {"manifest.json"}
    assert manifest.provenance.step == result.best.step
    assert manifest.provenance.data is not None
    saved = json.loads((out / "classification.json").read_text())
    assert saved["test"]["accuracy"] == result.test.accuracy if result.test else False
    assert str(table.parent) not in (out / "classification.json").read_text()
    config = load_classifier(out).config
    assert config.labels == ("calm", "loud", "odd")
    assert config.pad_token_id == 256


def test_the_saved_classifier_scores_as_measured(tuned: tuple[Path, FinetuneResult, list[str]], table: Path) -> None:
    out, result, _ = tuned
    data = read_labelled(table, request(out, table, out).columns)
    texts = [data.texts[row] for row in result.split.test]
    found = classify_texts(
        out, texts, [data.labels[row] for row in result.split.test], batch_size=7, device="cpu", dtype=torch.float32
    )
    assert result.test is not None
    assert found.report is not None
    assert found.report.confusion == result.test.confusion
    assert found.report.loss == pytest.approx(result.test.loss, rel=1e-4)
    for each in found.items:
        assert sum(each.scores.values()) == pytest.approx(1.0, abs=1e-5)
        assert each.score == max(each.scores.values()) == each.scores[each.label]


def test_transformers_runs_it_on_padded_batches_of_text(
    tuned: tuple[Path, FinetuneResult, list[str]],
) -> None:
    out, _, _ = tuned
    transformers.logging.disable_progress_bar()
    texts = ["12 aaa 3", "404 99zzz 73", "8 QQQ 0000000000 11111", "7"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    with torch.no_grad():
        logits = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    found = classify_texts(out, texts, batch_size=4, device="cpu", dtype=torch.float32)
    expected = [dict(zip(("calm", "loud", "odd"), row, strict=True)) for row in logits.softmax(-1).tolist()]
    for ours, scores in zip(found.items, expected, strict=True):
        assert ours.scores == pytest.approx(scores, abs=1e-5)
    assert [each.label for each in found.items[:3]] == ["calm", "loud", "odd"]


def test_the_seed_decides_everything(base: Path, table: Path, tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        finetune(request(base, table, tmp_path / name, epochs=1, seed=seed))
        manifest = read_manifest(tmp_path / name)
        assert manifest is not None
        digests.append(manifest.weights)
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_frozen_layers_stay_as_they_were(base: Path, table: Path, tmp_path: Path) -> None:
    finetune(request(base, table, tmp_path / "out", epochs=1, freeze_layers=1, val_fraction=0, test_fraction=0))
    before = load_model(base).state_dict()
    after = load_classifier(tmp_path / "out").transformer.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("embed_tokens.", "layers.0."))}


def test_bfloat16_products_learn_too(base: Path, table: Path, tmp_path: Path) -> None:
    result, _ = finetune(request(base, table, tmp_path / "out", dtype="bfloat16"))
    assert result.test is not None
    assert result.test.accuracy >= 0.95


def test_long_texts_are_cut_here_and_in_use(base: Path, table: Path, tmp_path: Path) -> None:
    result, said = finetune(request(base, table, tmp_path / "out", epochs=1, max_seq_len=8))
    assert result.num_cut > 100
    assert any("longer than the limit" in line for line in said)
    assert load_classifier(tmp_path / "out").config.context == 8
    same_start = ["12345678", "12345678zzz"]
    found = classify_texts(tmp_path / "out", same_start, batch_size=2, device="cpu", dtype=torch.float32)
    assert found.items[0].scores == pytest.approx(found.items[1].scores)
    assert found.num_cut == 1


def test_without_validation_the_last_weights_are_kept(base: Path, table: Path, tmp_path: Path) -> None:
    result, _ = finetune(request(base, table, tmp_path / "out", epochs=2, val_fraction=0, test_fraction=0))
    assert (result.best.number, result.best.validation, result.test) == (2, None, None)


def test_stopping_keeps_the_best_so_far(base: Path, table: Path, tmp_path: Path) -> None:
    polls = iter(range(10_000))
    said: list[str] = []
    result = finetune_classifier(
        request(base, table, tmp_path / "out", epochs=50), said.append, lambda: next(polls) >= 20
    )  # fmt: skip
    assert result is not None
    assert (result.stopped, result.test, len(result.epochs)) == (True, None, 1)
    assert load_classifier(tmp_path / "out").config.labels == ("calm", "loud", "odd")
    assert finetune_classifier(request(base, table, tmp_path / "none"), said.append, lambda: True) is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"freeze_layers": 3}, "--freeze-layers is 3 but the model has only 2"),
        ({"freeze_layers": -1}, "--freeze-layers is -1"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"max_seq_len": 33}, "--max-seq-len is 33 but must lie between 1 and the model's context 32"),
        ({"max_seq_len": 0}, "--max-seq-len is 0"),
        ({"val_fraction": 1.0}, "--val-fraction is 1.0"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_settings_that_cannot_be_run(
    base: Path, table: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        finetune(request(base, table, tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit(
    tuned: tuple[Path, FinetuneResult, list[str]], base: Path, table: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="labels texts and writes none"):
        finetune(request(tuned[0], table, tmp_path / "out"))
    with pytest.raises(CheckpointError, match="is not empty"):
        finetune(request(base, table, table.parent))
    with pytest.raises(QuillError, match="a language model"):
        classify_texts(base, ["a"], batch_size=1, device="cpu", dtype=torch.float32)


def test_a_loss_that_is_no_number_ends_the_run(base: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="try a smaller --lr"):
        finetune(request(base, table, tmp_path / "out", lr=1e30, epochs=3))
    assert not (tmp_path / "out").exists()


def test_the_commands(base: Path, table: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    tune = ["finetune", "classify", "--init-from", base, "--input", table, "--out", out, "--lr", "5e-3"]
    status, printed, told = command(*tune, "--epochs", "8", "--json", "--device", "cpu")
    assert status == 0
    assert json.loads(printed)["test"]["accuracy"] >= 0.95
    assert "epoch 8 of 8" in told
    status, printed, _ = command("classify", out, "--text", "1 zzz 1", "--text", "aaa", "--json")
    answer = json.loads(printed)
    assert [each["label"] for each in answer["results"]] == ["loud", "calm"]
    status, printed, _ = command("classify", out, "--text", "1 zzz 1")
    assert printed.startswith("loud\t0.")
    status, printed, _ = command("classify", out, "--input", table)
    assert "precision" in printed
    assert "true \\ given" in printed
    for arguments, message in (
        ([out], "give either --text"),
        ([out, "--text", "a", "--input", table], "give either --text"),
        ([base, "--text", "a"], "a language model"),
    ):
        status, _, told = command("classify", *arguments)
        assert status == 1
        assert message in told
    (tmp_path / "other.tsv").write_text("calm\ta\nhuge\tb\n")
    status, _, told = command("classify", out, "--input", tmp_path / "other.tsv")
    assert (status, "label 'huge' is none of the classifier's (calm, loud, odd)" in told) == (1, True)
    status, _, told = command(*tune)
    assert (status, "is not empty" in told) == (1, True)


def test_a_signal_stops_the_command_with_status_0(
    base: Path, table: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = classification.log_probabilities

    def terminate(*args: Any, **options: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*args, **options)

    monkeypatch.setattr(classification, "log_probabilities", terminate)
    out = tmp_path / "out"
    status, printed, _ = command(
        "finetune", "classify", "--init-from", base, "--input", table, "--out", out,
        "--epochs", "30", "--device", "cpu",
    )  # fmt: skip
    assert status == 0
    assert "stopped by a signal" in printed
    assert load_classifier(out).config.labels == ("calm", "loud", "odd")
