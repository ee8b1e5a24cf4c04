"""Instruction tuning: what rows become, that the template is the one of serving, that answers get better."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from model.chat_template import load_chat_template, render_chat
from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from tests.training.instructions import CONTEXT, make_rows, save_tiny_llama, write_rows
from training.checkpoint import step_folders
from training.cli import app
from training.data.dataset import open_split
from training.data.examples import ExampleSplit
from training.errors import DataError, RecipeError, ResumeError
from training.step import StepResult
from training.tasks.instruct import InstructRequest, InstructResult, finetune
from training.tasks.instruct_data import InstructDataRequest, conversation, make_example, prepare_instructions
from training.tasks.instruct_templates import write_template
from training.trainer import Trainer

PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a bird.\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay it louder.\n\n### Input:\nhello\n\n### Response:\n"
)
SETTINGS = ("train.dtype=float32", "train.device=cpu", "train.warmup_steps=0", "train.save_interval=2",
            "train.log_interval=1")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.json", make_rows(40))


@pytest.fixture(params=["bytes", "gpt2", "llama"])
def tokenizer_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    if request.param != "llama":
        (Tokenizer.bytes() if request.param == "bytes" else Tokenizer.gpt2()).save(folder)
        return folder
    Tokenizer.bytes().save(folder)  # with a beginning that the tokenizer itself adds, as Llama's does
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"].append(document["added_tokens"][0] | {"id": 257, "content": "<s>"})
    document["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                 {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<s>"}))
    return folder


@pytest.mark.parametrize("name", ["alpaca", "chat"])
def test_training_sees_the_ids_that_a_request_is_rendered_to(name: str, tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    write_template(name, tokenizer, tokenizer_folder)
    template, theirs = load_chat_template(tokenizer_folder), AutoTokenizer.from_pretrained(tokenizer_folder)
    assert template is not None
    answer = {"role": "assistant", "content": " HELLO, said naïve स्याही\n"}
    conversations = [
        [{"role": "user", "content": "Name a bird.\n"}],
        [{"role": "system", "content": "Say it louder."}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": "Name a bird."}, answer, {"role": "user", "content": "And another?"}],
    ]
    for asked in conversations:
        example = make_example([*asked, answer], template, tokenizer)
        request_ids = tokenizer.encode_template(render_chat(template, asked))
        assert example.ids[: len(request_ids)] == request_ids
        assert theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == request_ids
        assert not any(example.counted[len(request_ids) - 3 : len(request_ids)])
        assert all(example.counted[len(request_ids) :])
        answered = example.ids[len(request_ids) :]
        assert tokenizer.decode(answered).strip() == answer["content"].strip()
        assert answered[-1] == tokenizer.eos_token_id
        added = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
        assert (example.ids[0] == tokenizer.bos_token_id) == added
        assert example.ids.count(tokenizer.eos_token_id) == len([m for m in asked if m["role"] == "assistant"]) + 1


def alpaca_example(row: dict[str, object], folder: Path) -> tuple[str, str]:
    """The prompt and the answer as text, special tokens written out."""
    tokenizer = Tokenizer.bytes()
    tokenizer.save(folder)
    template = write_template("alpaca", tokenizer, folder)
    example = make_example(conversation(row, "row 1", "alpaca"), template, tokenizer)
    start = example.counted.index(True)
    whole = [b"".join(map(tokenizer.token_bytes, ids)).decode() for ids in (example.ids[:start], example.ids[start:])]
    return whole[0], whole[1]


def test_the_alpaca_format(tmp_path: Path) -> None:
    row = {"instruction": "Name a bird.", "input": "", "output": "The wren.", "text": "ignored"}
    assert alpaca_example(row, tmp_path) == (PLAIN, "The wren.<|endoftext|>")
    del row["input"]
    assert alpaca_example(row, tmp_path) == (PLAIN, "The wren.<|endoftext|>")
    row = {"instruction": "Say it louder.", "input": " hello ", "output": "HELLO"}
    assert alpaca_example(row, tmp_path) == (WITH_INPUT, "HELLO<|endoftext|>")


def test_the_answers_of_a_conversation_count_and_the_rest_does_not(tmp_path: Path) -> None:
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "Bye."), ("assistant", "So long."), ("user", "?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    tokenizer = Tokenizer.bytes()
    tokenizer.save(tmp_path)
    template = write_template("alpaca", tokenizer, tmp_path)
    example = make_example(conversation({"messages": messages}, "row 1", "alpaca"), template, tokenizer)
    pieces = [i for i, is_counted in zip(example.ids, example.counted, strict=True) if is_counted]
    assert b"".join(map(tokenizer.token_bytes, pieces)) == b"Hello.<|endoftext|>So long.<|endoftext|>"
    assert example.answers == "Hello.So long."
    assert tokenizer.decode(example.ids).endswith("### Instruction:\nBye.\n\n### Response:\nSo long.")


def test_a_checkpoint_keeps_its_own_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    tokenizer.save(tmp_path)
    own = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(own)
    assert write_template("chat", tokenizer, tmp_path).source == own
    assert write_template("alpaca", tokenizer, tmp_path).source != own
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages | length }}"}))
    template = write_template("chat", tokenizer, tmp_path)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(TokenizerError, match="rewrites what was said before"):
        make_example(messages, template, tokenizer)


def test_a_tokenizer_that_cannot_end_an_answer_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.characters("abc", end_of_text=False)
    tokenizer.save(tmp_path)
    with pytest.raises(RecipeError, match="has no end-of-text token"):
        write_template("alpaca", tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a"}, r"^rows\.jsonl, line 2: has no output; rows need instruction and output, or messages"),
        ({"output": "a"}, r"^rows\.jsonl, line 2: has no instruction"),
        ({"instruction": 3, "output": "a"}, r"^rows\.jsonl, line 2: instruction is int, not text"),
        ({"messages": "a"}, r"^rows\.jsonl, line 2: messages Expected `array`"),
        ({"messages": [{"role": "user"}]}, r"^rows\.jsonl, line 2: a message lacks its role or its content"),
        ({"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]},
         r"^rows\.jsonl, line 2: messages do not fit this model's chat template"),
        ({"instruction": "<|endoftext|>", "output": "a"}, r"line 2: messages\[0\] holds a control token"),
    ],
)  # fmt: skip
def test_a_row_of_another_form_is_named(row: dict[str, object], message: str, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(make_rows(1)[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        prepare_instructions(InstructDataRequest((str(path),), tmp_path / "out", str(base)))
    assert not (tmp_path / "out").exists()


def test_prepared_examples_are_the_same_from_every_kind_of_file(base: Path, tmp_path: Path) -> None:
    rows = [*make_rows(30), {"instruction": "Say nothing.", "input": "", "output": " "}]
    files = [write_rows(tmp_path / name, rows) for name in ("rows.json", "rows.jsonl")]
    files.append(tmp_path / "rows.jsonl.gz")
    files[2].write_bytes(gzip.compress(files[1].read_bytes()))
    notices: list[str] = []
    prepared = [
        prepare_instructions(
            InstructDataRequest((str(path),), tmp_path / str(number), str(base)), on_notice=notices.append
        )[0]
        for number, path in enumerate(files)
    ]
    assert prepared[0].splits == prepared[1].splits == prepared[2].splits
    assert notices == ["1 rows have no answer and are left out"] * 3
    assert sum(info.documents for info in prepared[0].splits.values()) == 30
    split = open_split(tmp_path / "0", "train")
    assert isinstance(split, ExampleSplit)
    answers = [row["output"] for row in rows]
    tokenizer = Tokenizer.load(base)
    for start, end in zip(split.starts.tolist(), split.ends.tolist(), strict=True):
        ids = split.read(start, end - start)[split.counted[start:end].astype(bool)]
        assert tokenizer.decode(ids.tolist()) in answers
        assert ids[-1] == tokenizer.eos_token_id


def test_equal_rows_stay_in_one_split(base: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.json", make_rows(30) * 2)
    request = InstructDataRequest((str(path),), tmp_path / "out", str(base), val_fraction=0.3, test_fraction=0.3)
    manifest, written = prepare_instructions(request)
    assert written
    assert set(manifest.splits) == {"train", "val", "test"}
    for name in manifest.splits:
        split = open_split(tmp_path / "out", name)
        assert isinstance(split, ExampleSplit)
        texts = [bytes(split.read(s, e - s - 1).astype("u1")) for s, e in zip(split.starts, split.ends, strict=True)]
        assert all(texts.count(text) == 2 for text in texts)
    assert prepare_instructions(request) == (manifest, False)
    with pytest.raises(DataError, match="already holds other prepared data"):
        prepare_instructions(InstructDataRequest((str(path),), tmp_path / "out", str(base)))


def instruct(base: Path, rows: Path, out: Path, **changes: object) -> InstructResult:
    options: dict[str, object] = {
        "epochs": 1.0, "lr": 1e-2, "batch_size": 6, "val_fraction": 0.3, "template": "chat", "max_seq_len": 96,
        "overrides": SETTINGS,
    }  # fmt: skip
    result = finetune(InstructRequest(base, (str(rows),), out, **(options | changes)), "auto", Console(quiet=True))  # type: ignore[arg-type]
    assert result is not None
    return result


def final_bytes(out: Path) -> list[bytes]:
    _, state = step_folders(out / "state")[-1]
    files = (state / "training.safetensors", *(out / "checkpoints" / n / "model.safetensors" for n in ("last", "best")))
    return [path.read_bytes() for path in files]


def test_answers_to_rows_held_out_get_better(base: Path, rows: Path, tmp_path: Path) -> None:
    result = instruct(base, rows, tmp_path / "run", epochs=3.0, test_fraction=0.1)
    assert result.before is not None
    assert result.best is not None
    assert result.test is not None
    assert result.before == pytest.approx(5.55, abs=0.2)  # ln 257: it knows nothing
    assert result.best < result.before - 1.5
    assert result.test < result.before - 1.5
    assert sum(result.examples.values()) == 40
    best = tmp_path / "run" / "checkpoints" / "best"
    assert load_chat_template(best) == load_chat_template(tmp_path / "run" / "data" / "tokenizer")
    assert instruct(base, rows, tmp_path / "run", epochs=3.0, test_fraction=0.1) == result  # nothing left to do
    options = ["evaluate", str(best), "--data", str(tmp_path / "run" / "data"), "--seq-len", "96", "--json"]
    for split, loss in (("val", result.best), ("test", result.test)):
        done = CliRunner().invoke(app, [*options, "--split", split], catch_exceptions=False)
        assert json.loads(done.stdout)["loss"] == pytest.approx(loss, rel=1e-5)
    with pytest.raises(RecipeError, match="--stride is for texts, but the data are examples"):
        CliRunner().invoke(app, [*options, "--stride", "4"], catch_exceptions=False)


@pytest.mark.parametrize("changes", [{"packing": True}, {"lora_rank": 2}], ids=["packed", "lora"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    changes: dict[str, object], base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"batch_size": 2, "max_seq_len": 160, "epochs": 0.6} | changes
    instruct(base, rows, tmp_path / "whole", **changes)
    original: Callable[[Trainer], StepResult] = Trainer.train_step

    def failing(self: Trainer) -> StepResult:
        if self.progress.step == 3:
            raise ConnectionError("power cut")
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", failing)
    with pytest.raises(ConnectionError):
        instruct(base, rows, tmp_path / "parts", **changes)
    monkeypatch.setattr(Trainer, "train_step", original)
    result = instruct(base, rows, tmp_path / "parts", **changes)
    assert result.steps > 3
    assert final_bytes(tmp_path / "parts") == final_bytes(tmp_path / "whole")


def test_another_file_does_not_go_on_with_a_run(base: Path, rows: Path, tmp_path: Path) -> None:
    instruct(base, rows, tmp_path / "run", epochs=0.1)
    other = write_rows(tmp_path / "other.json", make_rows(40, seed=1))
    with pytest.raises(DataError, match="already holds other prepared data"):
        instruct(base, other, tmp_path / "run", epochs=0.1)
    with pytest.raises(ResumeError, match=r"train\.lr is"):
        instruct(base, rows, tmp_path / "run", epochs=0.1, lr=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_len": CONTEXT + 1}, rf"^--max-seq-len is {CONTEXT + 1} but must lie between 2 and"),
        ({"overrides": ("data.dir=elsewhere",)}, r"^data\.dir=elsewhere cannot be set here; use --init-from"),
        ({"epochs": 0.0}, r"^--epochs is 0\.0"),
        ({"val_fraction": 0.0}, r"^--val-fraction is 0\.0"),
        ({"lora_rank": 2, "overrides": ("train.optimizer=muon",)}, r"^train\.lora_rank is set but train\.optimizer"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    changes: dict[str, object], message: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        instruct(base, rows, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_began_may_begin_otherwise(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no answer of the train split lies within train\.seq_len, 8"):
        instruct(base, rows, tmp_path / "run", max_seq_len=8)
    assert not (tmp_path / "run" / "state").exists()
    assert instruct(base, rows, tmp_path / "run", epochs=0.1, val_fraction=0.2).finished


def test_examples_that_do_not_fit_are_counted(base: Path, tmp_path: Path) -> None:
    answers = ["short", "long " * 20, "short"] * 10
    rows = [{"instruction": f"Go {n}.", "output": answer} for n, answer in enumerate(answers)]
    rows += [{"instruction": "Listen. " * 20 + str(n), "output": "yes"} for n in range(10)]
    path = write_rows(tmp_path / "rows.json", rows)
    with (tmp_path / "printed").open("w") as printed:
        request = InstructRequest(
            base, (str(path),), tmp_path / "run", epochs=0.01, max_seq_len=64, template="chat", overrides=SETTINGS,
            val_fraction=0.2,
        )  # fmt: skip
        finetune(request, "auto", Console(file=printed, width=60))
    split = open_split(tmp_path / "run" / "data", "train")
    assert isinstance(split, ExampleSplit)
    lengths = (split.ends - split.starts).tolist()
    long_prompts = sum(bytes(split.read(s, 20).astype("u1")).endswith(b"Listen. Li") for s in split.starts.tolist())
    cut = sum(length > 65 for length in lengths) - long_prompts
    text = (tmp_path / "printed").read_text()
    assert f"of the examples, {cut} are longer than 64 tokens and lose their end, {long_prompts} have" in text


def test_the_commands(base: Path, rows: Path, tmp_path: Path) -> None:
    options = ["--init-from", str(base), "--input", str(rows), "--out", str(tmp_path / "run"), "--template", "chat",
               "--epochs", "0.2", "--max-seq-len", "96", "--json", *SETTINGS]  # fmt: skip
    done = CliRunner().invoke(app, ["finetune", "instruct", *options], catch_exceptions=False)
    values = json.loads(done.stdout)
    assert values["finished"]
    assert values["after"] < values["before"]
    assert values["checkpoint"] == str(tmp_path / "run" / "checkpoints" / "best")
    options = ["--input", str(rows), "--tokenizer", str(base), "--template", "chat", "--out", str(tmp_path / "data")]
    done = CliRunner().invoke(app, ["prepare", *options, "--json"], catch_exceptions=False)
    values = json.loads(done.stdout)
    assert values["written"]
    ours, theirs = (open_split(folder, "train") for folder in (tmp_path / "data", tmp_path / "run" / "data"))
    assert ours.num_tokens == theirs.num_tokens == values["train"]["tokens"]
    with pytest.raises(RecipeError, match="--template reads whole conversations"):
        CliRunner().invoke(app, ["prepare", *options, "--text-key", "a"], catch_exceptions=False)
