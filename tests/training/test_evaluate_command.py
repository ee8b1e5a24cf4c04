"""`evaluate` as its users call it: several measures at once, texts generated and scored, files written, mistakes."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from model.sampling_params import SamplingParams
from tests.training.conftest import Command, make_text
from tests.training.tiny_models import save_tiny_model
from training.evaluation.samples import read_samples
from training.evaluation.tables import ResultTable
from training.generate import TextGenerator


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "gpt2", "gpt2", context=64)


@pytest.fixture
def command(command: Command) -> Command:
    return partial(command, "evaluate")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With two texts, prompts, samples and HellaSwag's rows, and where the command runs."""
    (tmp_path / "a.txt").write_text(make_text(20), "utf-8")
    (tmp_path / "b.txt").write_text(make_text(20, seed=1), "utf-8")
    prompts = [
        {"prompt": "the quill ", "reference": "writes what a hand has thought"},
        {"prompt": "so, ", "references": ["it went", "on and on it went"]},
        {"prompt": "ink"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    samples = [{"text": "it went on and on it went", "reference": "on and on it went"}, {"text": "A line\nB"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    choice = {"ctx": "ink", "endings": ["a", "bc"], "label": 1}
    (tmp_path / "choices.jsonl").write_text(3 * (json.dumps(choice) + "\n"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def values_of(result: tuple[int, str, str]) -> dict[str, Any]:
    status, out, err = result
    assert (status, err) == (0, "")
    return json.loads(out)


def test_several_measures_of_one_checkpoint_at_once(checkpoint: Path, folder: Path, command: Command) -> None:
    options = ["--device", "cpu", "--json"]
    generating = ["--generate-from", "prompts.jsonl", "--max-tokens", 5]
    together = values_of(command(
        checkpoint, "--text", "a.txt", "--text", "b.txt", "--hellaswag", "choices.jsonl", *generating, *options
    ))  # fmt: skip
    assert together.keys() == {"loss", "perplexity", "bits_per_byte", "tokens", "hellaswag", "generation"}
    alone = [
        values_of(command(checkpoint, *args, *options))
        for args in (["--text", "a.txt", "b.txt"], ["--hellaswag", "choices.jsonl"], generating)
    ]
    assert {key: value for part in alone for key, value in part.items()} == together
    assert together["hellaswag"].keys() == {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "items", "cut"}
    assert together["hellaswag"]["items"] == 3
    assert (
        values_of(command(checkpoint, "--hellaswag", "choices.jsonl", "--limit", 2, *options))["hellaswag"]["items"]
        == 2
    )
    sizes = [len((folder / name).read_bytes()) for name in ("a.txt", "b.txt")]
    assert together["tokens"] == sum(sizes)  # the separator between the files is predicted, the first token is not


def test_generated_texts_are_those_of_their_seeds_and_scored_as_their_file(
    checkpoint: Path, folder: Path, command: Command
) -> None:
    scored = values_of(command(
        checkpoint, "--generate-from", "prompts.jsonl", "--max-tokens", 12, "--temperature", 1, "--top-k", 40,
        "--seed", 7, "--save-samples", "out.jsonl", "--pattern", "[a-z]", "--device", "cpu", "--json",
    ))["generation"]  # fmt: skip
    samples = read_samples(folder / "out.jsonl")
    generator = TextGenerator.load(checkpoint, device="cpu")
    for number, sample in enumerate(samples):
        params = SamplingParams(max_tokens=12, temperature=1.0, top_k=40, seed=7 + number)
        [[expected]] = generator.generate([sample.prompt or ""], params)
        assert (sample.text, sample.tokens) == (expected.text, len(expected.token_ids))
    assert [len(sample.references) for sample in samples] == [1, 2, 0]
    assert scored["bleu"]["texts"] == 2
    again = values_of(command("--samples", "out.jsonl", "--pattern", "[a-z]", "--json"))
    assert again == {"generation": scored}
    plain = values_of(command(checkpoint, "--generate-from", "a.txt", "--max-tokens", 2, "--limit", 3, "--json"))
    assert (plain["generation"]["texts"], plain["generation"]["bleu"]) == (3, None)


def test_samples_are_measured_without_a_checkpoint(folder: Path, command: Command) -> None:
    result = values_of(command("--samples", "samples.jsonl", "--pattern", "^[AB]", "--out", "out.json", "--json"))
    assert json.loads((folder / "out.json").read_text()) == result
    measured = result["generation"]
    assert measured["texts"] == 2
    assert measured["mean_words"] == 5
    assert measured["mean_tokens"] is None
    assert measured["distinct_1"] == 7 / 10  # it went on and it A line B
    assert measured["pattern"] == {"pattern": "^[AB]", "lines": 3, "share": 2 / 3}
    assert measured.keys() == {
        "texts", "mean_tokens", "mean_words", "mean_characters", "distinct_1", "distinct_2", "distinct_3",
        "distinct_4", "diversity", "repetition", "bleu", "pattern",
    }  # fmt: skip


def test_the_table_says_what_the_object_does(checkpoint: Path, folder: Path, command: Command) -> None:
    options = [checkpoint, "--text", "a.txt", "--hellaswag", "choices.jsonl", "--samples", "samples.jsonl"]
    values = values_of(command(*options, "--json"))
    status, out, _ = command(*options)
    assert status == 0
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert f" {values['loss']:.4f}  nats per token" in rows["loss"]
    assert f" {values['perplexity']:.3f}" in rows["perplexity"]
    assert f"{values['hellaswag']['acc_norm']:.4f}" in rows["acc_norm"]
    assert f"{values['generation']['bleu']['score']:.2f}" in rows["BLEU-4"]
    assert f"{values['generation']['distinct_2']:.4f}" in rows["distinct-2"]


def test_a_table_is_drawn_on_a_terminal_and_aligned_elsewhere() -> None:
    table = ResultTable("Title", ("name", "value"), [("a", "1.5"), ("long [b]", "12")], text_columns=(0,))
    assert table.plain() == "Title\nname      value\na           1.5\nlong [b]     12"
    drawn = table.rich()
    assert [column.justify for column in drawn.columns] == ["left", "right"]
    assert drawn.row_count == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("CKPT", "nothing to measure: give --data, --text, --hellaswag, --generate-from or --samples"),
        ("CKPT a.txt", "a.txt stands behind the checkpoint; name text files with --text"),
        ("CKPT --text a.txt --data data", "give either --data or --text"),
        ("CKPT --generate-from prompts.jsonl --samples samples.jsonl", "give either --generate-from or --samples"),
        ("CKPT --text a.txt --save-samples out.jsonl", "--save-samples keeps what --generate-from generates"),
        ("CKPT --text a.txt --out b.txt", "--out b.txt already exists; choose another name or pass --force"),
        ("CKPT --text a.txt --out .", "--out . is a folder; name a file"),
        ("CKPT --generate-from samples.jsonl", "samples.jsonl, line 1: has no 'prompt'; every row must hold one"),
        ("--samples prompts.jsonl", "prompts.jsonl, line 1: has no 'text'"),
        ("--samples a.txt --pattern [", "--pattern '[' is no regular expression"),
        ("CKPT --generate-from prompts.jsonl --temperature 3", "temperature must lie in"),
        ("CKPT --generate-from prompts.jsonl --pattern (", "--pattern '(' is no regular expression"),
        ("CKPT --generate-from prompts.jsonl --control theme=rain", "theme"),
        ("CKPT --hellaswag prompts.jsonl", "prompts.jsonl, line 1: Object missing required field `ctx`"),
        ("CKPT --text absent.txt", "absent.txt: cannot be read (No such file or directory)"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(
    args: str, message: str, checkpoint: Path, folder: Path, command: Command
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    status, out, err = command(*(str(checkpoint) if word == "CKPT" else word for word in args.split()))
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before


def test_no_checkpoint_is_wrong_usage(folder: Path, command: Command) -> None:
    status, out, err = command("--text", "a.txt")
    assert (status, out) == (2, "")
    assert "name a checkpoint folder" in err


def test_a_missing_library_is_told_before_anything_is_generated(
    checkpoint: Path, folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    args = (checkpoint, "--generate-from", "prompts.jsonl", "--max-tokens", 2, "--save-samples", "out.jsonl")
    status, _, err = command(*args)
    assert status == 1
    assert "BLEU needs sacrebleu; install quill's extra `evaluation`" in err
    assert not (folder / "out.jsonl").exists()
    (folder / "prompts.jsonl").write_text('{"prompt": "ink"}\n')  # without references there is no BLEU to compute
    assert command(*args)[0] == 0
    assert (folder / "out.jsonl").exists()
