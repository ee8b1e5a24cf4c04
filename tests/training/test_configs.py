"""The package's recipes: what they build, that their commands are the real ones, and that the small ones learn."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model.config import ModelConfig, count_parameters
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from tests.training.conftest import make_text, train
from tests.training.shell import shell_commands, training_command
from training.build import make_model_config
from training.data.prepare import PrepareRequest, prepare
from training.generate import generate_from_checkpoint
from training.recipe import CONFIGS, leading_comment, load_config, recipe_names, recipe_summary

NAMES = recipe_names()
LETTERS = Tokenizer.characters("abcdefghijklmnopqrstuvwxyz\n")
SHAKESPEARE = Tokenizer.characters(chr(0x41 + i) for i in range(65))

# Weights of a layer of width D and inner width I: attention 4·D² (less with fewer key-value heads), MLP 2·D·I, or 3·D·I
# where it is gated; LayerNorm 2·D, RMSNorm D.
EXPECTED = {
    "continue": (Tokenizer.gpt2(), 124_439_808),
    "cpu-smoke": (Tokenizer.bytes(), 771_328),
    "gpt1": (Tokenizer.gpt2(), 116_534_784 + (50_304 - 40_478) * 768),
    "gpt2-124m": (Tokenizer.gpt2(), 124_439_808 + (50_304 - 50_257) * 768),
    "gpt2-124m-speedrun": (
        Tokenizer.gpt2(), 12 * (4 * 768**2 + 3 * 768 * 2_048 + 2 * 768 + 2 * 128) + 50_304 * 768 + 768
    ),
    "gpt2-finetune": (Tokenizer.gpt2(), 124_439_808),
    "instruct": (Tokenizer.gpt2(), 124_439_808),
    "llama-small": (
        Tokenizer.gpt2(), 12 * (2 * 768**2 + 2 * 256 * 768 + 3 * 768 * 2_048 + 2 * 768) + 50_304 * 768 + 768
    ),
    "names": (LETTERS, 4 * (12 * 64**2 + 13 * 64) + (28 + 64) * 64 + 2 * 64),
    "shakespeare-char": (SHAKESPEARE, 10_646_784 + 256 * 384 + 384),  # nanoGPT's, the positions, the end-of-text token
}  # fmt: skip


def gpt2_folder(folder: Path) -> Path:
    """GPT-2's configuration without its weights: enough to know what would be built."""
    folder.mkdir()
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(folder)
    Tokenizer.gpt2().save(folder)
    return folder


def model_config_of(name: str, folder: Path) -> ModelConfig:
    overrides = [f"model.init_from={gpt2_folder(folder / 'gpt2')}"] if load_config(name).model.init_from else []
    return make_model_config(load_config(name, overrides), EXPECTED[name][0])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_builds_a_model_of_the_stated_size(name: str, tmp_path: Path) -> None:
    config = model_config_of(name, tmp_path)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == EXPECTED[name][1] == count_parameters(config)


def test_every_recipe_is_tested() -> None:
    assert {*EXPECTED, "shakespeare"} == set(NAMES)


def test_the_gpt2_recipe_without_its_padding_is_the_gpt2_of_transformers(tmp_path: Path) -> None:
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config())
    assert EXPECTED["gpt2-finetune"][1] == theirs.num_parameters()
    assert model_config_of("gpt2-124m", tmp_path).vocab_size == 50_304


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("gpt2-124m", 524_288), ("gpt2-124m-speedrun", 524_288), ("gpt1", 64 * 512), ("gpt2-finetune", 32_768),
     ("shakespeare-char", 64 * 256), ("llama-small", 262_144)],
)  # fmt: skip
def test_a_step_has_the_published_number_of_tokens(name: str, tokens: int) -> None:
    assert load_config(name).tokens_per_step == tokens


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_begins_with_its_purpose_and_the_commands_that_run_it(name: str) -> None:
    comment = leading_comment(CONFIGS / f"{name}.toml")
    config = load_config(name)
    assert 40 < len(recipe_summary(name)) < 130
    commands = shell_commands(comment)
    prepared = [options for command, options in map(training_command, commands) if command == "prepare"]
    assert config.data.dir in [str(options["out"]) for options in prepared]
    trained = [options for command, options in map(training_command, commands) if command == "train"]
    assert all(Path(str(options["recipe"])).stem == name for options in trained)
    assert trained
    for options in trained:
        load_config(name, options["overrides"] or ())


def entropy(text: str) -> float:
    """Nats a symbol of a model that knows only how often each occurs."""
    counts = Counter(text)
    return -sum(n * math.log(n / len(text)) for n in counts.values()) / len(text)


def validation_losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "val"]


def test_the_smoke_run_learns(tmp_path: Path) -> None:
    text = make_text(12_000)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    prepare(PrepareRequest((str(tmp_path / "text.txt"),), tmp_path / "data", "bytes"))
    config = load_config(
        "cpu-smoke",
        [f"data.dir={tmp_path / 'data'}", f"run.dir={tmp_path / 'run'}", "train.max_steps=24",
         "train.eval_interval=12", "train.eval_tokens=2048", "run.sample_prompt=the", "run.sample_tokens=20"],
    )  # fmt: skip
    output = train(config)
    first, last = validation_losses(tmp_path / "run")
    assert last < first
    assert last < 0.6 * entropy(text.encode().decode("latin-1"))
    assert output.count("sample: the") == 2


def make_names(number: int) -> list[str]:
    """Syllables of a consonant and a vowel, so that there is something to learn."""
    rng = random.Random(4)
    return [
        "".join(rng.choice("bdklmnrst") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(number)
    ]


def test_the_names_run_learns_where_names_end(tmp_path: Path) -> None:
    names = make_names(3_000)
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    prepare(PrepareRequest((str(tmp_path / "names.txt"),), tmp_path / "data", "char", documents="line"))
    config = load_config(
        "names",
        [f"data.dir={tmp_path / 'data'}", f"run.dir={tmp_path / 'run'}", "train.max_steps=60",
         "train.eval_interval=60", "train.batch_size=16", "train.warmup_steps=10"],
    )  # fmt: skip
    train(config)
    # A consonant, a vowel, and an end after a vowel: ln 9 + ln 5 + the entropy of one to four syllables, a name.
    letters = sum(map(len, names)) / len(names)
    best = (letters / 2 * (math.log(9) + math.log(5)) + math.log(4)) / (letters + 1)
    assert best - 0.1 < validation_losses(tmp_path / "run")[-1] < best + 0.25
    params = [SamplingParams(max_tokens=12, temperature=0.8, seed=seed) for seed in range(20)]
    samples = generate_from_checkpoint(
        tmp_path / "run" / "checkpoints" / "best", "", params, device="cpu", dtype=torch.float32
    )
    syllables = re.compile(r"(?:[bdklmnrst][aeiou]){1,4}")
    ended = [sample.text for sample in samples if sample.finish_reason == "stop"]
    assert sum(syllables.fullmatch(text) is not None for text in ended) >= 10
