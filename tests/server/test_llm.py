"""The engine as a Python object against `generate()` alone: same tokens, same text, same log-probabilities."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.chat_template import ChatTemplate, render_chat
from model.errors import ConfigError, HubError, InvalidSamplingParamsError
from model.sampling_params import SamplingParams
from model.transformer import Transformer
from server.llm import LLM, Completion, GenerationParams, LLMError, Output
from server.output import join_deltas
from tests.server.expected import alone, mixed_bodies, prompt_ids
from tests.server.real import VOCAB_SIZE, load_alone, random_config, save_random

CONTEXT = random_config().max_seq_len
GREEDY = GenerationParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("llm") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return load_alone(folder)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """With a cache so small that sequences are preempted."""
    config = random_config()
    block = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4 * 16
    memory = (CONTEXT // 16 + 4) * block
    with LLM(folder, device="cpu", dtype="float32", num_threads=1, kv_cache_memory=memory) as llm:
        yield llm


def params_of(body: dict[str, Any]) -> GenerationParams:
    values = {name: value for name, value in body.items() if name not in ("prompt", "stream")}
    values["logit_bias"] = {int(key): bias for key, bias in values.get("logit_bias", {}).items()}
    values["stop_token_ids"] = tuple(values.get("stop_token_ids", ()))
    return GenerationParams(**values)


def assert_equals_alone(output: Output, body: dict[str, Any], model: Transformer) -> None:
    assert output.prompt_token_ids == prompt_ids(body)
    assert output.prompt == (body["prompt"] if isinstance(body["prompt"], str) else None)
    assert len(output.choices) == body.get("n", 1)
    assert len({choice.seed for choice in output.choices}) == len(output.choices)
    for choice in output.choices:
        expected = alone(model, body, choice.seed)
        assert (choice.text, choice.token_ids) == (expected.text, expected.token_ids)
        assert (choice.finish_reason, choice.stop_reason) == (expected.finish_reason, expected.stop_reason)
        assert logprobs_of(choice) == expected.logprobs


def logprobs_of(choice: Completion) -> list[dict[str, Any]] | None:
    def plain(entry: Any) -> dict[str, Any]:
        return {"id": entry.id, "text": entry.text, "logprob": entry.logprob}

    if choice.logprobs is None:
        return None
    return [plain(entry) | {"top": [plain(other) for other in entry.top]} for entry in choice.logprobs]


def test_mixed_prompts_equal_generate_alone(llm: LLM, model: Transformer) -> None:
    bodies = [{"prompt": "a long story", "max_tokens": 150, "n": 4, "ignore_eos": True, "seed": 4}]
    bodies += mixed_bodies(model, 16)
    outputs = llm.generate([body["prompt"] for body in bodies], [params_of(body) for body in bodies])
    assert llm._open_engine.stats().num_preemptions > 0
    for output, body in zip(outputs, bodies, strict=True):
        assert_equals_alone(output, body, model)
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert any(choice.logprobs for output in outputs for choice in output.choices)
    assert_idle(llm)


def assert_idle(llm: LLM) -> None:
    stats = llm._open_engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
    assert llm._live == {}


def test_streams_and_whole_answers_in_between(llm: LLM) -> None:
    params = GenerationParams(max_tokens=30, seed=3, n=2, logprobs=2, stop=["qq"], ignore_eos=True)
    [whole] = llm.generate("stream me", params)
    stream = llm.stream("stream me", params)
    deltas = [next(stream)]
    [other] = llm.generate("something else", GREEDY)
    deltas += stream
    for index, choice in enumerate(whole.choices):
        joined = join_deltas([delta for delta in deltas if delta.index == index])
        assert (joined.text, joined.token_ids) == (choice.text, choice.token_ids)
        assert (joined.finish_reason, joined.logprobs) == (choice.finish_reason, choice.logprobs)
    assert len(deltas) > 30
    assert llm.generate(["something else"], GREEDY) == [other]
    assert_idle(llm)


def test_leaving_a_stream_ends_its_sequences(llm: LLM) -> None:
    long = GenerationParams(max_tokens=400, ignore_eos=True, n=3)
    for number, _ in enumerate(llm.stream("leave", long)):
        if number == 4:
            break
    assert_idle(llm)
    unused = llm.stream("never begun", long)
    assert_idle(llm)
    del unused


def test_prompts_in_every_form(llm: LLM) -> None:
    text, ids = "żółw", list("żółw".encode())
    [one] = llm.generate(text, GREEDY)
    assert [output.token_ids for output in llm.generate([text, text], GREEDY)] == [one.token_ids] * 2
    assert [output.token_ids for output in llm.generate(ids, GREEDY)] == [one.token_ids]
    assert [output.token_ids for output in llm.generate([ids, tuple(ids)], GREEDY)] == [one.token_ids] * 2
    assert [output.token_ids for output in llm.generate([text, ids], [GREEDY, GREEDY])] == [one.token_ids] * 2
    plain = SamplingParams(max_tokens=12, temperature=0.0)
    assert llm.generate(text, plain)[0].token_ids == one.token_ids
    assert llm.generate([], GREEDY) == []
    assert llm.generate("", GREEDY)[0].prompt_token_ids == [256]
    assert len(llm.generate("by default")[0].token_ids) <= 128


def test_the_context_ends_what_does_not_fit(llm: LLM) -> None:
    [output] = llm.generate([[5] * (CONTEXT - 3)], GenerationParams(max_tokens=100, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason) == (3, "length")


def test_what_cannot_be_run_is_refused_before_anything_runs(llm: LLM) -> None:
    steps = llm._open_engine.stats().num_steps
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (["fits", [1] * CONTEXT], GREEDY, LLMError, f"takes 1 to {CONTEXT - 1}, so change it"),
        (["fits", []], GREEDY, LLMError, "a prompt has 0 tokens"),
        (["fits", [VOCAB_SIZE]], GREEDY, LLMError, f"prompt holds a token id outside 0 … {VOCAB_SIZE - 1}"),
        ([[-1]], GREEDY, LLMError, "prompt holds a token id"),
        ("x", GenerationParams(stop_token_ids=(VOCAB_SIZE,)), LLMError, "stop_token_ids holds a token id"),
        ("x", GenerationParams(logit_bias={VOCAB_SIZE: 1.0}), LLMError, "logit_bias holds a token id"),
        (["x", "y"], [GREEDY], LLMError, "params has 1 entries for 2 prompts"),
    ]
    for prompts, params, kind, words in cases:
        with pytest.raises(kind, match=words):
            llm.generate(prompts, params)
    with pytest.raises(LLMError, match="outside"):
        llm.stream([VOCAB_SIZE], GREEDY)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"n": 0}, "n must"), ({"stop": ["a", ""]}, "stop must"), ({"stop": ""}, "stop must"), ({"top_p": 2}, "top_p"),
    ]  # fmt: skip
    for values, words in bad:
        with pytest.raises(InvalidSamplingParamsError, match=words):
            GenerationParams(**values)
    assert llm._open_engine.stats().num_steps == steps
    assert_idle(llm)


def test_an_engine_that_fails_in_a_step_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._open_engine

    def fail() -> None:
        raise RuntimeError("a device fault")

    monkeypatch.setattr(engine, "step", fail)
    with pytest.raises(RuntimeError, match="a device fault"):
        llm.generate(["a", "b"], GREEDY)
    monkeypatch.undo()
    assert_idle(llm)


def test_chat_uses_the_checkpoints_template(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(LLMError, match="has no chat template"):
        llm.chat(messages)
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    monkeypatch.setattr(llm, "_chat_template", template)
    output = llm.chat(messages, GREEDY)
    assert bytes(output.prompt_token_ids).decode() == render_chat(template, messages) == "<user>Hi<assistant>"
    assert output.token_ids == llm.generate("<user>Hi<assistant>", GREEDY)[0].token_ids


def test_models_and_options_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LLMError, match="max_sequences is no option of LLM; they are device, dtype,"):
        LLM(folder, max_sequences=3)
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda"):
        LLM(folder, device="tpu")
    with pytest.raises(HubError, match="neither a folder here nor in the cache, and HF_HUB_OFFLINE is set"):
        LLM("no-such-org/no-such-model")
    closed = LLM(folder, device="cpu", dtype="float32")
    closed.close()
    closed.close()
    with pytest.raises(LLMError, match="has been closed"):
        closed.generate("x")
    assert closed.info.models[0].name == "tiny"


def test_importing_it_imports_no_torch() -> None:
    program = "import sys, server.llm; sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
