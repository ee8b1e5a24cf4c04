"""Control tokens: prepared as transformers reads `<|meter:doha|>text`, trained on, and obeyed in generation."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from model.checkpoint import load_model
from model.controls import Controls, Label, controls_json, read_controls
from model.errors import ControlError, TokenizerError
from model.generate import generate
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from tests.training.conftest import Command, ConfigMaker, train
from tests.training.test_prepare_formats import write_rows
from training.controls import control_prefix
from training.data.prepare import PrepareRequest, prepare
from training.data.shards import DataManifest, read_manifest
from training.errors import DataError, RecipeError
from training.export import export_checkpoint
from training.generate import TextGenerator

METERS, THEMES = ("doha", "चौपाई"), ("night", "rain", "sea")
VERSE = Controls({"meter": METERS, "theme": THEMES})


def make_rows(number: int, seed: int = 0) -> list[dict[str, object]]:
    """Rows with both labels, one or none of them; texts differ, and some hold a control token as text."""
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for index in range(number):
        row: dict[str, object] = {
            "meter": None,
            "id": index,
            "text": f"{index} naïve नमस्ते {rng.choice(['', '<|theme:rain|>', ' x '])}verse",
        }
        if index % 3:
            row["meter"] = METERS[index % 2]
        row["theme"] = THEMES[index % 4] if index % 4 < 3 else None
        rows.append(row)
    return rows


def marked(row: dict[str, object]) -> str:
    """The row's document as transformers is to read it, its text aside."""
    return "".join(f"<|{name}:{row[name]}|>" for name in ("meter", "theme") if row.get(name))


def library_folder(folder: Path, kind: str, texts: list[str]) -> Path:
    """A tokenizer.json that `tokenizers` trained: bytes, or WordPiece in lower case."""
    end = "<|endoftext|>"
    if kind == "bpe":
        tokenizer = LibraryTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
    else:
        tokenizer = LibraryTokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=[end, "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def documents_of(folder: Path) -> Counter[tuple[int, ...]]:
    """The ids of the documents of all splits, between the end-of-text tokens."""
    manifest, found = read_manifest(folder), Counter[tuple[int, ...]]()
    end = Tokenizer.load(folder / "tokenizer").eos_token_id
    for split in manifest.splits.values():
        ids = np.concatenate([np.fromfile(folder / shard.file, manifest.token_dtype) for shard in split.shards])
        for part in np.split(ids, np.flatnonzero(ids == end)):
            found[tuple(part[part != end].tolist())] += 1
    return found


def prepare_rows(rows: list[dict[str, object]], tmp_path: Path, name: str = "rows.jsonl", **options: object) -> Path:
    path, out = write_rows(tmp_path / name, rows), tmp_path / "data"
    settings: dict[str, object] = {"tokenizer": "bytes", "control_keys": ("meter", "theme")}
    prepare(PrepareRequest((str(path),), out, **(settings | options)))  # type: ignore[arg-type]
    return out


# --- prepare ---


@pytest.mark.parametrize("kind", ["bytes", "char", "gpt2", "bpe", "wordpiece"])
def test_documents_are_what_transformers_reads_from_the_marked_text(kind: str, tmp_path: Path) -> None:
    rows = make_rows(60)
    texts = [str(row["text"]) for row in rows]
    named = kind if kind in ("bytes", "char", "gpt2") else str(library_folder(tmp_path / "lib", kind, texts))
    out = prepare_rows(rows, tmp_path, tokenizer=named)
    theirs = AutoTokenizer.from_pretrained(out / "tokenizer")
    plain = Tokenizer.load(out / "tokenizer")
    expected = Counter(
        (*theirs(marked(row), add_special_tokens=False)["input_ids"], *plain.encode(text, add_special=False))
        for row, text in zip(rows, texts, strict=True)
    )
    assert documents_of(out) == expected
    assert read_controls(out / "tokenizer") == VERSE
    assert read_manifest(out).controls == dict(VERSE.values)
    ids = [plain.special_tokens[label.token] for label in VERSE.labels]
    assert ids == list(range(plain.vocab_size - 5, plain.vocab_size))  # behind the old vocabulary, in declared order


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet", "rows.jsonl"])
def test_every_format_of_rows_and_every_number_of_workers_gives_the_same(name: str, tmp_path: Path) -> None:
    rows = make_rows(40)
    expected = documents_of(prepare_rows(rows, tmp_path))
    (tmp_path / "other").mkdir()
    workers = 2 if name == "rows.jsonl" else 1
    assert documents_of(prepare_rows(rows, tmp_path / "other", name, workers=workers)) == expected


def test_a_hub_dataset_has_labels_too(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = make_rows(40)
    expected = documents_of(prepare_rows(rows, tmp_path))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    out = tmp_path / "hub"
    prepare(PrepareRequest((str(tmp_path / "saved"),), out, "bytes", control_keys=("meter", "theme")))
    assert documents_of(out) == expected


def test_labels_stand_once_before_a_long_document_and_again_where_a_split_cuts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.data.readers._CHUNK", 100)
    rows: list[dict[str, object]] = [{"text": "abc " * 500, "theme": "sea"}, {"text": "x" * 30, "theme": "rain"}]
    out = prepare_rows(rows, tmp_path, split="tail", val_fraction=0.4, control_keys=("theme",))
    special = Tokenizer.load(out / "tokenizer").special_tokens
    sea, rain = special["<|theme:sea|>"], special["<|theme:rain|>"]
    train_ids = np.fromfile(out / "train-00000.bin", "<u2").tolist()
    val_ids = np.fromfile(out / "val-00000.bin", "<u2").tolist()
    assert (train_ids[0], val_ids[0]) == (sea, sea)
    assert sum(token > 256 for token in train_ids) == 1
    assert [token for token in val_ids if token >= 256] == [sea, 256, rain]
    assert read_manifest(out).splits["train"].bytes == len(train_ids) - 1  # labels are no text


def test_the_same_rows_are_not_prepared_twice_and_others_not_over_them(tmp_path: Path) -> None:
    path, out = write_rows(tmp_path / "rows.jsonl", make_rows(40)), tmp_path / "data"

    def again(**options: object) -> tuple[DataManifest, bool]:
        settings: dict[str, object] = {"tokenizer": "char", "control_keys": ("meter", "theme")}
        return prepare(PrepareRequest((str(path),), out, **(settings | options)))  # type: ignore[arg-type]

    assert again()[1] is True
    assert again()[1] is False
    others: list[dict[str, object]] = [
        {"control_keys": ("theme", "meter")}, {"control_keys": ("theme",)}, {"control_keys": ()},
        {"tokenizer": "bytes"}, {"special_tokens": ("<|x|>",)}, {"text_tokens": ("verse",)},
    ]  # fmt: skip
    for options in others:
        with pytest.raises(DataError, match="already holds other prepared data"):
            again(**options)


def test_values_are_one_whatever_their_unicode_form_and_numbers_are_texts(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": f"t{index}", "theme": value} for index, value in enumerate(["caf\u00e9", " cafe\u0301 ", 7, "7"] * 20)
    ]
    out = prepare_rows(rows, tmp_path, control_keys=("theme",))
    controls = read_controls(out / "tokenizer")
    assert controls.values == {"theme": ("7", "caf\u00e9")}
    assert controls.choose(["theme=cafe\u0301"]) == [Label("theme", "caf\u00e9")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, r"rows\.jsonl, line 2: 'theme' is bool; a --control field must hold one text"),
        (["a", "b"], "line 2: 'theme' is list"),
        (1.5, "line 2: 'theme' is float"),
        ("a|>b", "line 2: control theme has the value 'a|>b'"),
        ("two\nlines", "values are one line of at most 100 characters"),
        ("x" * 101, "values are one line of at most 100 characters"),
    ],
)
def test_a_field_that_is_no_label_is_named(value: object, message: str, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "a", "theme": "x"}, {"text": "b", "theme": value}]
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        prepare_rows(rows, tmp_path, control_keys=("theme",))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"control_keys": ("theme", "metre")}, DataError, "--control metre: no row of the inputs has a value"),
        ({"control_keys": ("theme", "theme")}, RecipeError, "--control theme is given twice"),
        ({"control_keys": ("a=b",)}, ControlError, "control name 'a=b' must be letters"),
        ({"special_tokens": ("",)}, RecipeError, "--add-token or --add-special-token is empty"),
    ],
)
def test_what_cannot_be_declared_is_refused(
    options: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        prepare_rows(make_rows(40), tmp_path, **options)
    assert not (tmp_path / "data").exists()


def test_a_field_of_too_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.splits.MAX_LABELS", 10)
    with pytest.raises(DataError, match="--control id: has 11 values or more; name a field of fewer, at most 10"):
        prepare_rows(make_rows(40), tmp_path, control_keys=("id",))


def test_data_for_a_model_with_controls_keeps_their_order_and_ids(tmp_path: Path) -> None:
    first = prepare_rows(make_rows(40), tmp_path)
    rows: list[dict[str, object]] = [
        {"text": f"new {index}", "theme": ("dawn", "rain")[index % 2], "form": "haiku", "meter": "doha"}
        for index in range(40)
    ]
    (tmp_path / "more").mkdir()
    second = prepare_rows(
        rows, tmp_path / "more", tokenizer=str(first / "tokenizer"), control_keys=("form", "theme", "meter")
    )
    controls, tokenizer = read_controls(second / "tokenizer"), Tokenizer.load(second / "tokenizer")
    assert list(controls.values.items()) == [
        ("meter", METERS), ("theme", (*THEMES, "dawn")), ("form", ("haiku",)),
    ]  # fmt: skip
    old = Tokenizer.load(first / "tokenizer").special_tokens
    assert old.items() <= tokenizer.special_tokens.items()
    added = [tokenizer.special_tokens[token] for token in ("<|theme:dawn|>", "<|form:haiku|>")]
    assert added == [262, 263]
    order = ["<|meter:doha|>", "<|theme:dawn|>", "<|form:haiku|>"]
    start = tuple(tokenizer.special_tokens[token] for token in order)
    assert sum(document[:3] == start for document in documents_of(second)) == 20


# --- choices ---


@given(st.permutations(["theme=rain", "meter=doha", "form=haiku"]), st.integers(0, 3))
def test_choices_come_in_declared_order(choices: list[str], number: int) -> None:
    controls = Controls({"meter": METERS, "theme": THEMES, "form": ("haiku",)})
    names = [label.name for label in controls.choose(choices[:number])]
    assert names == [name for name in controls.values if any(choice.startswith(name) for choice in choices[:number])]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            ["weather=rain"],
            r"'weather' is unknown; known are meter \(doha, चौपाई\); theme \(night, rain, sea\)",
        ),
        (["theme=snow"], "control theme has no value 'snow', only night, rain, sea"),
        (["theme"], "control 'theme' must have the form name=value; known are meter"),
        (["theme=sea", "theme=sea"], "control theme is given twice"),
    ],
)
def test_an_unknown_choice_is_answered_with_what_is_known(choices: list[str], message: str) -> None:
    with pytest.raises(ControlError, match=message):
        VERSE.choose(choices)


def test_a_model_without_controls_says_so(tmp_path: Path) -> None:
    Tokenizer.bytes().save(tmp_path)
    assert control_prefix(tmp_path, []) == []
    with pytest.raises(ControlError, match="this model has no controls, for its data was prepared without --control"):
        control_prefix(tmp_path, ["theme=rain"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold a JSON object"),
        ('{"version": 2, "controls": []}', r"controls\.json: version must be 1"),
        ('{"version": 1, "controls": {}}', "controls must be a list"),
        ('{"version": 1, "controls": ["a"]}', "controls must hold objects with a name"),
        ('{"version": 1, "controls": [{"name": "a", "values": ["x", "x"]}]}', "must list different texts"),
        ('{"version": 1, "controls": [{"name": "a", "values": [1]}]}', "must list different texts"),
    ],
)
def test_a_damaged_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "controls.json").write_text(content)
    with pytest.raises(TokenizerError, match=message):
        read_controls(tmp_path)


def test_a_declared_token_that_the_tokenizer_lacks_is_told(tmp_path: Path) -> None:
    Tokenizer.bytes().save(tmp_path)
    (tmp_path / "controls.json").write_bytes(controls_json(VERSE))
    with pytest.raises(TokenizerError, match=r"declares <\|theme:rain\|>, which the tokenizer lacks"):
        control_prefix(tmp_path, ["theme=rain"])


# --- a model that obeys ---

LETTERS = {("a", "low"): "ab", ("b", "low"): "cd", ("a", "up"): "AB", ("b", "up"): "CD"}


def test_a_trained_model_writes_what_the_control_says(
    make_config: ConfigMaker, tmp_path: Path, command: Command
) -> None:
    rng = random.Random(1)
    rows: list[dict[str, object]] = [
        {"text": "".join(rng.choice(letters) for _ in range(6)), "theme": theme, "meter": meter}
        for (theme, meter), letters in rng.choices(list(LETTERS.items()), k=400)  # so that only labels tell what comes
    ]
    data = prepare_rows(rows, tmp_path)
    config = make_config(
        data__dir=str(data), train__max_steps=120, train__batch_size=8, train__lr=1e-2, train__seq_len=32,
        train__eval_interval=120, train__save_interval=120, model__dropout=0.0, model__hidden_size=32,
    )  # fmt: skip
    train(config)
    best = Path(config.run.dir) / "checkpoints" / "best"
    assert json.loads((best / "manifest.json").read_text())["files"].keys() >= {"controls.json", "tokenizer.json"}
    export_checkpoint(best, tmp_path / "exported")
    model, tokenizer = load_model(tmp_path / "exported"), Tokenizer.load(tmp_path / "exported")
    for (theme, meter), letters in LETTERS.items():
        prefix = control_prefix(tmp_path / "exported", [f"theme={theme}", f"meter={meter}"])
        assert prefix == tokenizer.encode_template(f"<|endoftext|><|meter:{meter}|><|theme:{theme}|>")
        written = "".join(
            tokenizer.decode(generate(model, prefix, SamplingParams(max_tokens=10, seed=seed)).token_ids)
            for seed in range(5)
        )
        assert sum(letter in letters for letter in written) > 0.9 * len(written) > 0
    status, out, err = command(
        "generate", best, "--control", "theme=b", "--control", "meter=up", "--max-tokens", 8,
        "--device", "cpu",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert set(out.strip()) <= set("CD")
    typed = TextGenerator.load(best, device="cpu").prompt_ids("<|theme:b|>", ["theme=a"])
    assert typed == [256, tokenizer.special_tokens["<|theme:a|>"], *b"<|theme:b|>"]
    status, _, err = command("generate", best, "--control", "theme=c", "--device", "cpu")
    assert (status, err) == (1, "error: control theme has no value 'c', only a, b\n")
