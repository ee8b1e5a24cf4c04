"""`python -m training generate` as its users call it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.beam_search import BeamParams, beam_search
from model.checkpoint import load_model
from model.generate import generate
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from tests.training.conftest import Command
from tests.training.tiny_models import save_tiny_model

Call = Callable[..., str]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "llama", context=96)


@pytest.fixture
def call(folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Status, stdout and stderr of `generate CHECKPOINT …` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object, checkpoint: Path = folder) -> tuple[int, str, str]:
        return command("generate", checkpoint, *args, "--device", "cpu")

    return run


@pytest.fixture
def output(call: Callable[..., tuple[int, str, str]]) -> Call:
    """stdout of a call that succeeds and is silent on stderr."""

    def run(*args: object, **options: Path) -> str:
        status, out, err = call(*args, **options)
        assert (status, err) == (0, "")
        return out

    return run


def expected_text(folder: Path, prompt: str, params: SamplingParams) -> str:
    tokenizer = Tokenizer.load(folder)
    result = generate(load_model(folder, dtype=torch.float32), tokenizer.encode(prompt) or [256], params)
    return tokenizer.decode(result.token_ids)


def test_every_sampling_option_reaches_the_sampler(output: Call, folder: Path) -> None:
    options = {
        "max-tokens": 9, "min-tokens": 2, "temperature": 1.3, "top-k": 30, "top-p": 0.9, "min-p": 0.01,
        "repetition-penalty": 1.3, "presence-penalty": 0.4, "frequency-penalty": 0.2, "seed": 11,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    out = output("--prompt", "ink", *words, "--logit-bias", "97=5", "--logit-bias", "98=-2", "--stop-token-id", 3,
                 "--ignore-eos", "--logprobs", 2, "--json")  # fmt: skip
    values: dict[str, object] = {name.replace("-", "_"): value for name, value in options.items()}
    params = SamplingParams(
        **values, logit_bias={97: 5.0, 98: -2.0}, stop_token_ids=(3,), ignore_eos=True, logprobs=2  # type: ignore[arg-type]
    )  # fmt: skip
    expected = generate(load_model(folder, dtype=torch.float32), Tokenizer.load(folder).encode("ink"), params)
    [sample] = json.loads(out)["samples"]
    assert sample["token_ids"] == expected.token_ids
    assert expected.logprobs is not None
    assert [entry["logprob"] for entry in sample["logprobs"]] == pytest.approx(
        [entry.logprob for entry in expected.logprobs], rel=1e-4
    )
    assert all(len(entry["top"]) == 2 for entry in sample["logprobs"])


def test_greedy_needs_no_temperature(output: Call, folder: Path) -> None:
    greedy = expected_text(folder, "ink", SamplingParams(max_tokens=8, temperature=0.0))
    assert output("--prompt", "ink", "--greedy", "--max-tokens", 8) == f"ink{greedy}\n"
    assert output("--prompt", "ink", "--temperature", 0, "--max-tokens", 8, "--no-echo") == f"{greedy}\n"


def test_an_empty_prompt_starts_from_the_end_of_text_token(output: Call, folder: Path) -> None:
    text = expected_text(folder, "", SamplingParams(max_tokens=8, temperature=0.8))
    assert output("--max-tokens", 8) == f"{text}\n"


def test_streamed_text_is_the_text(output: Call) -> None:
    options = ("--prompt", "the ", "--num-samples", 2, "--max-tokens", 12, "--temperature", 1)
    assert output(*options, "--stream") == output(*options)
    assert "\n---\n" in output(*options)


def test_a_file_of_prompts_gives_what_each_gives_alone(output: Call, tmp_path: Path) -> None:
    prompts = ["the", "ink remembers", "स्याही"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    options = ("--max-tokens", 10, "--seed", 4, "--num-samples", 2, "--json")
    together = json.loads(output("--prompts", "prompts.txt", "--batch-size", 4, *options))["results"]
    assert together == [json.loads(output("--prompt", prompt, *options)) for prompt in prompts]


def test_one_prompt_in_a_file_is_still_a_list(output: Call, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"prompt": ""}\n')
    [result] = json.loads(output("--prompts", "one.jsonl", "--max-tokens", 2, "--json"))["results"]
    assert result["prompt"] == ""


def test_prompts_come_through_a_pipe(output: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the\nink\n")))
    lines = output("--prompts", "-", "--max-tokens", 3, "--greedy").split("\n---\n")
    assert [line[:3] for line in lines] == ["the", "ink"]


def test_out_holds_a_line_for_each_text_that_evaluate_can_read(output: Call, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the\nink\n")
    printed = output("--prompts", "prompts.txt", "--num-samples", 2, "--max-tokens", 6, "--out", "texts.jsonl")
    assert printed == "4 texts in texts.jsonl\n"
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [("the", 0), ("the", 1), ("ink", 0), ("ink", 1)]
    expected = json.loads(output("--prompt", "ink", "--max-tokens", 6, "--json"))["samples"][0]
    assert {"prompt": "ink", **expected} == rows[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "texts.jsonl"]


def test_stop_strings_may_name_a_line_end(output: Call) -> None:
    whole = json.loads(output("--prompt", "x", "--max-tokens", 60, "--ignore-eos", "--json", "--logit-bias", "10=6"))
    sample = json.loads(output("--prompt", "x", "--max-tokens", 60, "--ignore-eos", "--json", "--logit-bias", "10=6",
                               "--stop", "\\n"))["samples"][0]  # fmt: skip
    assert sample["stop_reason"] == "\n"
    assert sample["text"] == whole["samples"][0]["text"].partition("\n")[0]


def test_beams(output: Call, folder: Path) -> None:
    out = output("--prompt", "the", "--beams", 3, "--num-samples", 2, "--max-tokens", 7, "--length-penalty", 0.5,
                 "--early-stopping", "never", "--json")  # fmt: skip
    params = BeamParams(num_beams=3, max_tokens=7, length_penalty=0.5, early_stopping="never")
    expected = beam_search(load_model(folder, dtype=torch.float32), list(b"the"), params)
    samples = json.loads(out)["samples"]
    assert [sample["token_ids"] for sample in samples] == [h.token_ids for h in expected[:2]]
    assert [sample["score"] for sample in samples] == pytest.approx([h.score for h in expected[:2]], rel=1e-4)
    assert "seed" not in samples[0]


@pytest.mark.parametrize("mode", [(), ("--stream",), ("--beams", "2")])
def test_verbose_tells_the_speed_on_stderr(mode: tuple[str, ...], call: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = call("--prompt", "the", "--max-tokens", 5, "--ignore-eos", "--verbose", *mode)
    assert (status, out[:3]) == (0, "the")
    assert err.startswith("5 tokens in ")
    assert " tokens/s, the first after " in err


def test_a_prompt_can_be_a_message(output: Call, folder: Path, tmp_path: Path) -> None:
    chat = save_tiny_model(tmp_path / "chat", "llama", context=96)
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    text = expected_text(folder, "[system]short[user]hi[assistant]", SamplingParams(max_tokens=6, temperature=0.8))
    options = ("--prompt", "hi", "--max-tokens", 6, "--no-echo")
    assert output(*options, "--chat", "--system", "short", checkpoint=chat) == f"{text}\n"
    assert output(*options, checkpoint=chat) == output(*options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--beams", 2, "--temperature", 1), "--temperature has no meaning with --beams; leave out one of them"),
        (("--beams", 2, "--stop", "x"), "--stop has no meaning with --beams"),
        (("--greedy", "--temperature", 1), "--temperature has no meaning with --greedy"),
        (("--prompts", "a.txt", "--prompt", "x"), "--prompt has no meaning with --prompts"),
        (("--stream", "--json"), "--json has no meaning with --stream"),
        (("--interactive", "--out", "x"), "--out has no meaning with --interactive"),
        (("--length-penalty", 2), "--length-penalty needs --beams beside it"),
        (("--system", "x"), "--system needs --chat or --interactive beside it"),
        (("--logprobs", 2), "--logprobs needs --json or --out beside it"),
        (("--beams", 2, "--num-samples", 3), "--num-samples is 3 but --beams gives 2"),
        (("--beams", 0), "num_beams must lie between 1 and 64"),
        (("--max-tokens", 0), "max_tokens must be at least 1"),
        (("--logit-bias", "97"), "--logit-bias is '97' but must have the form ID=BIAS"),
        (("--logit-bias", "300=1"), "logit_bias must use token ids from 0 to 256"),
        (("--stop", ""), "--stop must not be empty"),
        (("--chat", "--prompt", "x"), "--chat needs a chat template"),
        (("--control", "theme=rain"), "control 'theme' is unknown"),
        (("--prompt", "x" * 96), "the prompt has 96 tokens and must leave room in the context of 96"),
        (("--prompts", "absent.txt"), "absent.txt: cannot be read"),
        (("--prompts", "long.txt"), "long.txt, line 2: the prompt has 96 tokens"),
        (("--out", "long.txt"), "--out long.txt is there already"),
        (("--out", "absent/x.jsonl"), "--out absent/x.jsonl: its folder is not there"),
    ],
)
def test_a_mistake_is_one_line(
    args: tuple[object, ...], message: str, call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("short\n" + "x" * 96)
    status, out, err = call(*args)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]
