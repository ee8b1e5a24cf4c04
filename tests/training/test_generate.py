"""Texts from a checkpoint in Python: what a text depends on, stop strings, files of prompts, a batch's speed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.beam_search import BeamParams, beam_search
from model.controls import Controls
from model.errors import ControlError, TokenizerError
from model.generate import GeneratedToken, PromptError, generate
from model.sampling_params import SamplingParams
from model.tokenizer import StreamDecoder, Tokenizer
from tests.training.tiny_models import save_tiny_model
from training.errors import DataError, RecipeError
from training.generate import Request, TextGenerator
from training.generation.prompts import read_prompts
from training.generation.sample import TextBuilder, sample_values

BYTES = Tokenizer.bytes()
PROMPTS = ["the quill", "", "स्याही 🖋", "a", "ink remembers what"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", request.param, context=64)
    return TextGenerator.load(folder, device="cpu")


def test_each_text_is_the_one_it_is_alone(generator: TextGenerator) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.1, top_p=0.95, repetition_penalty=1.2, seed=5)
    together = generator.generate(PROMPTS, params, num_samples=3, batch_size=4)
    for prompt, samples in zip(PROMPTS, together, strict=True):
        assert [sample.seed for sample in samples] == [5, 6, 7]
        assert generator.generate([prompt], params, num_samples=3, batch_size=1) == [samples]
        ids = generator.prompt_ids(prompt)
        assert samples[0].token_ids == generate(generator.model, ids, params).token_ids
    assert len({sample.text for samples in together for sample in samples}) == 15


def test_deltas_joined_are_the_text(generator: TextGenerator) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.3, ignore_eos=True)
    requests = [Request(generator.prompt_ids(prompt), params) for prompt in PROMPTS]
    texts = dict.fromkeys(range(len(PROMPTS)), "")
    samples = {}
    for delta in generator.stream_requests(requests, batch_size=3):
        assert delta.index not in samples
        texts[delta.index] += delta.text
        if delta.sample is not None:
            samples[delta.index] = delta.sample
    for index, sample in samples.items():
        assert texts[index] == sample.text == BYTES.decode(sample.token_ids)
    assert len(samples) == len(PROMPTS)


def test_a_stop_string_ends_its_text_alone(generator: TextGenerator) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, seed=3)
    [[whole]] = generator.generate(["x"], params)
    stop = next(c for c in whole.text[4:] if c != "\ufffd")
    ids = generator.prompt_ids("x")
    stopped, other = generator.generate_requests([Request(ids, params, [stop]), Request(ids, params)])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert whole.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    assert other == whole
    assert sample_values(stopped)["stop_reason"] == stop


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the shortest prefix that holds a stop string, cut before the earliest one in it."""
    for end in range(1, len(text) + 1):
        found = [(text[:end].find(stop), stop) for stop in stops if stop in text[:end]]
        if found:
            position, stop = min(found, key=lambda pair: pair[0])
            return text[:position], stop
    return text, None


@settings(deadline=None, max_examples=100)
@given(st.text("ab€", max_size=12), st.lists(st.text("ab€", min_size=1, max_size=3), max_size=3, unique=True))
def test_stop_strings_follow_their_definition(text: str, stops: list[str]) -> None:
    ids = [*BYTES.encode(text), 120]
    builder = TextBuilder(BYTES, seed=0, stop=stops)
    parts = []
    for place, token_id in enumerate(ids):
        parts.append(builder.push(GeneratedToken(token_id, None, "length" if place == len(ids) - 1 else None)))
        if builder.sample is not None:
            break
    expected, stop = cut(text + "x", stops)
    assert builder.sample is not None
    assert (builder.sample.text, builder.sample.stop_reason) == (expected, stop)
    assert "".join(parts) == expected


def test_the_token_that_ends_a_text_is_not_shown() -> None:
    builder = TextBuilder(BYTES, seed=0, eos_token_ids=[256])
    builder.push(GeneratedToken(97, None, None))
    builder.push(GeneratedToken(98, None, "stop"))
    assert builder.sample is not None
    assert (builder.sample.text, builder.sample.token_ids, builder.sample.stop_reason) == ("a", [97, 98], 98)


def test_min_tokens_puts_stop_strings_off() -> None:
    builder = TextBuilder(BYTES, seed=0, stop=["a"], min_tokens=2)
    text = "".join(builder.push(GeneratedToken(token_id, None, None)) for token_id in b"aaba")
    assert builder.sample is not None
    assert builder.sample.text == text == "aab"


def test_beams_are_the_models(generator: TextGenerator) -> None:
    params = BeamParams(num_beams=3, max_tokens=10)
    ids = generator.prompt_ids("the")
    found = generator.beam_search(ids, params)
    expected = beam_search(generator.model, ids, params)
    assert [(s.token_ids, s.score) for s in found] == [(h.token_ids, h.score) for h in expected]
    assert all(s.seed is None and s.text == BYTES.decode(s.token_ids) for s in found)


def test_controls_stand_before_the_prompt(generator: TextGenerator, tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    tokenizer.special_tokens["<|theme:rain|>"] = 200  # an id of this vocabulary, for the test
    controlled = TextGenerator(generator.model, tokenizer, controls=Controls({"theme": ("rain",)}))
    assert controlled.prompt_ids("a", ["theme=rain"]) == [256, 200, 97]
    assert controlled.prompt_ids("", ["theme=rain"]) == [256, 200]
    params = SamplingParams(max_tokens=6)
    [[sample]] = controlled.generate(["a"], params, controls=["theme=rain"])
    assert sample.token_ids == generate(generator.model, [256, 200, 97], params).token_ids
    with pytest.raises(ControlError, match="theme has no value 'sun'"):
        controlled.prompt_ids("a", ["theme=sun"])


def test_what_cannot_be_continued_is_refused_before_anything_is_generated(generator: TextGenerator) -> None:
    with pytest.raises(PromptError, match="70 tokens and must leave room in the context of 64"):
        generator.stream("x" * 70, SamplingParams())
    with pytest.raises(TokenizerError, match="lone surrogate"):
        generator.generate(["\ud800"], SamplingParams())
    with pytest.raises(RecipeError, match="needs a chat template"):
        generator.chat_ids([{"role": "user", "content": "hello"}])
    letters = TextGenerator(generator.model, Tokenizer.characters("ab", end_of_text=False))
    with pytest.raises(RecipeError, match="no end-of-text token to start from"):
        letters.generate([""], SamplingParams())


def test_no_delta_of_two_hundred_texts_has_half_a_character(generator: TextGenerator) -> None:
    """A replacement character comes only from bytes that are no character, never from a cut."""
    ids_of_prompt = generator.prompt_ids("नमस्ते")
    requests = [
        Request(ids_of_prompt, SamplingParams(max_tokens=20, ignore_eos=True, seed=seed)) for seed in range(200)
    ]
    texts: dict[int, list[str]] = {}
    ids: dict[int, list[int]] = {}
    for delta in generator.stream_requests(requests, batch_size=64):
        texts.setdefault(delta.index, []).append(delta.text)
        ids.setdefault(delta.index, []).append(delta.token_id)
    assert len(texts) == 200
    for index, parts in texts.items():
        whole = bytes(token_id for token_id in ids[index] if token_id < 256).decode("utf-8", "replace")
        assert "".join(parts) == whole
        decoder = StreamDecoder(BYTES)
        assert parts[:-1] == [decoder.push([token_id]) for token_id in ids[index][:-1]]


class TestReadPrompts:
    def test_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.txt"
        path.write_bytes("\ufeffthe ink\r\n\n  indented \n   \nस्याही".encode())
        prompts = read_prompts(path)
        assert [prompt.text for prompt in prompts] == ["the ink", "  indented ", "स्याही"]
        assert [prompt.place for prompt in prompts] == [f"{path}, line {number}" for number in (1, 3, 5)]

    def test_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text('{"prompt": "two\\nlines", "other": 1}\n\n{"prompt": ""}\n')
        assert [prompt.text for prompt in read_prompts(path)] == ["two\nlines", ""]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b" \n\n", "a.txt: holds no prompts"),
            ("a.txt", b"ok\n\xff\n", "a.txt, line 2: not UTF-8"),
            ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "a.jsonl, line 2: not an object with a text"),
            ("a.jsonl", b'{"prompt": 3}\n', "a.jsonl, line 1: not an object"),
            ("a.jsonl", b'["prompt"]\n', "a.jsonl, line 1: not an object"),
            ("a.jsonl", b'{"prompt": "\xff"}\n', "a.jsonl, line 1: not an object"),
            ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not an object"),
        ],
    )
    def test_what_is_no_prompt_is_named(self, name: str, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_prompts(tmp_path / name)

    def test_an_absent_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"absent\.txt: cannot be read"):
            read_prompts(tmp_path / "absent.txt")


def test_a_batch_is_faster_than_one_after_the_other(tmp_path: Path) -> None:
    generator = TextGenerator.load(save_tiny_model(tmp_path / "model", "llama"), device="cpu", dtype=torch.float32)
    requests = [
        Request([seed], SamplingParams(max_tokens=10, seed=seed, ignore_eos=True)) for seed in range(16)
    ]  # fmt: skip

    def cpu_seconds(batch_size: int) -> float:
        start = time.process_time()
        generator.generate_requests(requests, batch_size=batch_size)
        return time.process_time() - start

    cpu_seconds(16)
    assert min(cpu_seconds(16) for _ in range(3)) * 2 < cpu_seconds(1)
