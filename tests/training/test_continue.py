"""Going on from weights, on a second corpus, with a tokenizer that is kept or extended. The oracle is transformers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.checkpoint import load_model, read_manifest, save_model
from model.errors import TokenizerError
from model.manifest import weights_digest
from model.tokenizer import Tokenizer
from model.tokenizer.extension import extend_tokenizer, is_extension
from tests.training.conftest import ConfigMaker, exit_status, train
from training.build import make_model, make_model_config
from training.config import ModelSection, TrainConfig
from training.data.prepare import PrepareRequest, prepare
from training.data.shards import read_manifest as read_data_manifest
from training.errors import RecipeError
from training.export import export_checkpoint

BYTES, LETTERS = Tokenizer.bytes(), Tokenizer.characters("abc नमस्ते")
WORDS = ["नदी", "पानी", "बादल", "हवा", "धरती", "आकाश", "सूरज", "चाँद"]
ENDS = ["है", "था", "होगा", "बहता"]


def prose(sentences: int) -> str:
    rng = random.Random(1)
    return "".join(f"{rng.choice(WORDS)} और {rng.choice(WORDS)} {rng.choice(ENDS)}। " for _ in range(sentences))


def verses(number: int) -> list[dict[str, str]]:
    rng = random.Random(2)
    rows = []
    for index in range(number):
        theme = rng.choice(WORDS[:3])
        lines = [f"{theme} {rng.choice(ENDS)}, {rng.choice(WORDS)} {rng.choice(ENDS)} {index};"]
        rows.append({"theme": theme, "text": "\n".join([*lines, f"{rng.choice(WORDS)} {theme} {rng.choice(ENDS)}॥"])})
    return rows


# --- extending a tokenizer ---


@pytest.mark.parametrize(
    "base",
    [BYTES, LETTERS, pytest.param(Tokenizer.gpt2(), marks=pytest.mark.slow)],
    ids=["bytes", "char", "gpt2"],
)
def test_an_extended_tokenizer_is_the_same_for_transformers(base: Tokenizer, tmp_path: Path) -> None:
    tokenizer = extend_tokenizer(
        base, special=["<|a:b|>", "<|दो|>", "<|a:b|>"], text=["नमस्ते a"], files={"x.json": b"{}"}
    )
    size = base.vocab_size
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.special_tokens == {**base.special_tokens, "<|a:b|>": size, "<|दो|>": size + 1}
    assert tokenizer.eos_token_id == base.eos_token_id
    tokenizer.save(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.digest == tokenizer.digest
    assert len(theirs) == size + 3
    text = "a<|a:b|>नमस्ते ab<|दो|>c"
    assert theirs(text)["input_ids"] == ours.encode_template(text)
    assert size + 2 in ours.encode("cनमस्ते ab")
    if base is not LETTERS:  # which lacks "<"
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text)
        assert ours.decode(ours.encode(text)) == text


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_special_tokens_change_the_ids_of_no_text(text: str) -> None:
    assert EXTENDED.encode(text) == BYTES.encode(text)
    assert EXTENDED.decode(EXTENDED.encode(text)) == text


EXTENDED = extend_tokenizer(BYTES, special=["<|a|>", "<|b|>"])


def test_what_is_there_is_not_added_again() -> None:
    assert extend_tokenizer(EXTENDED, special=["<|b|>"], text=["x"]).digest == EXTENDED.digest
    assert extend_tokenizer(EXTENDED, special=["<|b|>", "<|c|>"]).special_tokens["<|c|>"] == 259


def test_only_tokens_behind_the_vocabulary_make_an_extension() -> None:
    words = extend_tokenizer(EXTENDED, text=["नमस्ते"])
    assert all(
        is_extension(later, earlier) for later, earlier in [(EXTENDED, BYTES), (words, EXTENDED), (words, BYTES)]
    )
    assert is_extension(BYTES, Tokenizer.bytes())
    for tokenizer, base in [
        (BYTES, EXTENDED), (words, LETTERS), (EXTENDED, Tokenizer.characters(map(chr, range(256)))),
        (extend_tokenizer(BYTES, special=["<|b|>", "<|a|>"]), extend_tokenizer(BYTES, special=["<|a|>"])),
    ]:  # fmt: skip
        assert not is_extension(tokenizer, base)


def test_a_token_that_would_not_be_read_back_is_refused() -> None:
    with pytest.raises(TokenizerError, match="the token 'café' cannot be added"):  # é spells a byte there
        extend_tokenizer(BYTES, text=["café"])


# --- the model ---


def from_weights(config: TrainConfig, folder: Path, **model: Any) -> TrainConfig:
    """The recipe with another model section."""
    return replace(config, model=ModelSection(init_from=str(folder), **model))


def folder_of(config: TrainConfig, tokenizer: Tokenizer, folder: Path) -> Path:
    save_model(folder, make_model(config, make_model_config(config, tokenizer)), tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_an_extended_model_says_of_old_tokens_what_it_said(
    tied: bool, make_config: ConfigMaker, tmp_path: Path
) -> None:
    folder = folder_of(make_config(model__tie_word_embeddings=tied), BYTES, tmp_path / "base")
    config = from_weights(make_config(), folder, vocab_multiple=64)
    model = make_model(config, make_model_config(config, EXTENDED)).eval()
    assert model.config.vocab_size == 320
    ids = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(1))
    base = load_model(folder)
    with torch.no_grad():
        logits, expected = (each.compute_logits(each(ids))[..., :257] for each in (model, base))
    torch.testing.assert_close(logits, expected)


def test_rows_of_padding_become_rows_of_tokens(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config(model__vocab_multiple=64)
    model_config = make_model_config(config, BYTES)
    save_model(tmp_path / "padded", make_model(config, model_config), tokenizer=BYTES)  # all 320 rows
    config = from_weights(make_config(), tmp_path / "padded")
    model = make_model(config, make_model_config(config, EXTENDED))
    assert model.config.vocab_size == 320
    known = model.embed_tokens.weight[:257]
    torch.testing.assert_close(model.embed_tokens.weight[257:259].mean(0), known.mean(0), atol=2e-3, rtol=0)


def test_another_tokenizer_of_the_right_size_is_refused(make_config: ConfigMaker, tmp_path: Path) -> None:
    folder = folder_of(make_config(), EXTENDED, tmp_path / "base")
    config = from_weights(make_config(), folder)
    renamed = extend_tokenizer(BYTES, special=["<|b|>", "<|a|>", "<|c|>"])
    with pytest.raises(RecipeError, match="259; prepare the data with --tokenizer"):
        make_model_config(config, renamed)
    with pytest.raises(RecipeError, match="another tokenizer"):
        make_model_config(config, BYTES)
    lora = replace(config, train=replace(config.train, lora_rank=2))
    make_model_config(lora, EXTENDED)
    with pytest.raises(RecipeError, match="lora_rank leaves the embedding as it is"):
        make_model_config(lora, extend_tokenizer(EXTENDED, special=["<|c|>"]))


# --- a second corpus ---


def losses(run: str, split: str) -> dict[int, tuple[float, float]]:
    """Step to loss and learning rate."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["lr"]) for line in lines if line["split"] == split}


def test_from_prose_to_verse(make_config: ConfigMaker, tmp_path: Path) -> None:
    """The path of the guide: a first corpus, then a smaller one with labels and an extended tokenizer."""
    (tmp_path / "prose.txt").write_text(prose(400), encoding="utf-8")
    rows = "\n".join(json.dumps(row, ensure_ascii=False) for row in verses(300))
    (tmp_path / "verse.jsonl").write_text(rows, encoding="utf-8")

    settings: dict[str, object] = {
        "train__seq_len": 32, "train__batch_size": 8, "train__warmup_steps": 3, "train__eval_interval": 30,
        "train__eval_tokens": 0, "model__dropout": 0.0, "model__hidden_size": 32,
    }  # fmt: skip
    first_corpus = ("--input", tmp_path / "prose.txt", "--tokenizer", "bytes", "--out", tmp_path / "prose")
    assert exit_status("prepare", *first_corpus) == 0
    first = make_config(
        data__dir=str(tmp_path / "prose"), run__dir=str(tmp_path / "first"), train__max_steps=90, **settings
    )
    train(first)
    parent = tmp_path / "first/checkpoints/best"

    second_corpus = (
        "--input", tmp_path / "verse.jsonl", "--tokenizer", parent, "--control", "theme", "--add-token", "॥",
        "--val-fraction", 0.1, "--test-fraction", 0.1, "--out", tmp_path / "verse",
    )  # fmt: skip
    assert exit_status("prepare", *second_corpus) == 0
    splits = {name: info.documents for name, info in read_data_manifest(tmp_path / "verse").splits.items()}
    assert sum(splits.values()) == 300
    assert all(15 < splits[name] < 45 for name in ("val", "test"))

    again = settings | {"data__dir": str(tmp_path / "verse"), "train__max_steps": 30}
    from_start = make_config(run__dir=str(tmp_path / "scratch"), **again)
    train(from_start)
    second = from_weights(make_config(run__dir=str(tmp_path / "second"), **again), parent)
    digest = weights_digest(parent)
    said = train(second)
    assert (
        f"starting from {parent} ({digest}); 4 tokens are new, their rows in the vocabulary set to the mean of the"
        in said
    )

    continued, scratch = (losses(config.run.dir, "train") for config in (second, from_start))
    assert {step: lr for step, (_, lr) in continued.items()} == {step: lr for step, (_, lr) in scratch.items()}
    assert list(continued) == list(range(1, 31))  # steps and schedule begin anew
    assert continued[30][0] < 0.75 * continued[1][0]
    assert losses(second.run.dir, "val")[30][0] < 0.75 * losses(from_start.run.dir, "val")[30][0]

    best = Path(second.run.dir) / "checkpoints" / "best"
    manifest = read_manifest(best)
    assert manifest is not None
    assert manifest.provenance.parent == digest
    scratch_manifest = read_manifest(Path(from_start.run.dir) / "checkpoints" / "best")
    assert scratch_manifest is not None
    assert scratch_manifest.provenance.parent is None
    ids = torch.tensor([Tokenizer.load(best).encode_template("<|theme:नदी|>नदी है॥")])
    assert {257, 258} < set(ids[0].tolist())  # ॥ and the label
    theirs, ours = AutoModelForCausalLM.from_pretrained(best), load_model(best)
    with torch.no_grad():
        torch.testing.assert_close(ours.compute_logits(ours(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    export_checkpoint(best, tmp_path / "exported")
    assert f"| started from | `{digest}` |" in (tmp_path / "exported" / "README.md").read_text()


def test_a_run_with_new_tokens_resumes_to_the_bit(make_config: ConfigMaker, text_file: Path, tmp_path: Path) -> None:
    base = folder_of(make_config(), BYTES, tmp_path / "base")
    prepare(PrepareRequest((str(text_file),), tmp_path / "data", str(base), text_tokens=("quill",)))

    def config(run: str, steps: int) -> TrainConfig:
        where = {"data__dir": str(tmp_path / "data"), "run__dir": str(tmp_path / run), "train__schedule": "constant"}
        return from_weights(make_config(**where, train__max_steps=steps), base, dropout=0.1)

    train(config("whole", 8))
    train(config("parts", 4))
    train(config("parts", 8))
    whole, parts = (weights_digest(tmp_path / run / "checkpoints" / "last") for run in ("whole", "parts"))
    assert whole == parts
    assert Tokenizer.load(tmp_path / "whole/checkpoints/last").encode("a quill") == [97, 32, 257]


def test_a_resumed_run_remembers_the_weights_it_began_with(make_config: ConfigMaker, tmp_path: Path) -> None:
    base = folder_of(make_config(), BYTES, tmp_path / "base")
    digest = weights_digest(base)
    said = train(from_weights(make_config(train__max_steps=4), base))
    assert f"starting from {base} ({digest})\n" in said
    folder_of(make_config(train__seed=5), BYTES, base)
    assert weights_digest(base) != digest
    said = train(from_weights(make_config(train__max_steps=8), base))
    assert "starting from" not in said
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "last")
    assert manifest is not None
    assert (manifest.provenance.step, manifest.provenance.parent) == (8, digest)
