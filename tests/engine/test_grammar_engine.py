"""Grammars in the engine: what is written belongs to the language, under any load, and a failure is one request's."""

from __future__ import annotations

import itertools
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from model.checkpoint import save_model
from model.config import llama_config
from model.grammar import Grammar
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from server.engine.config import EngineConfig
from server.engine.grammar_compiler import GrammarCompiler
from server.engine.grammar_matcher import GrammarMatcher
from server.engine.grammar_vocabulary import GrammarVocabulary
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest, SequenceOutput
from tests.engine.mixed_load import cache_bytes

TOKENIZER = Tokenizer.bytes()
EOS = 256
IDS = itertools.count()
OBJECT = {
    "type": "object",
    "properties": {"name": {"enum": ["quill", "reed"]}, "sharp": {"type": "boolean"}, "size": {"type": "integer"}},
    "required": ["name", "sharp"],
    "additionalProperties": False,
}
WORDS = "(red|green|blue)( (red|green|blue)){0,3}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model over bytes whose EOS is the tokenizer's."""
    folder = tmp_path_factory.mktemp("grammar") / "model"
    config = llama_config(2, 4, 2, 64, 128, vocab_size=257, max_seq_len=256)
    model = Transformer(replace(config, eos_token_id=EOS, bos_token_id=EOS))
    model.init_weights(seed=5)
    save_model(folder, model, dtype=torch.float32)
    TOKENIZER.save(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> LLMEngine:
    return make_engine(folder)


def make_engine(folder: Path, **changes: Any) -> LLMEngine:
    settings = {"dtype": "float32", "max_num_seqs": 12, "max_num_batched_tokens": 128} | changes
    return LLMEngine(EngineConfig(str(folder), "test", device="cpu", **settings))


def request(number: int, grammar: Grammar | None, **values: Any) -> AddRequest:
    """`number` is its seed; ids are never used twice."""
    params = SamplingParams(**{"max_tokens": 120, "seed": number, "grammar": grammar} | values)
    return AddRequest(next(IDS), list(b"The answer: "), params, time.monotonic())


def drain(engine: LLMEngine) -> list[SequenceOutput]:
    """All outputs of what the engine has."""
    outputs: list[SequenceOutput] = []
    while engine.has_unfinished:
        outputs += engine.step().outputs
    return outputs


def run(engine: LLMEngine, requests: list[AddRequest]) -> dict[int, tuple[str, str, list[int]]]:
    """By the requests' numbers their texts, finish_reasons and ids."""
    numbers = {each.request_id: each.params.seed for each in requests}
    ids: dict[int, list[int]] = {each.request_id: [] for each in requests}
    texts: dict[int, tuple[str, str, list[int]]] = {}
    for each in requests:
        engine.add(each)
    for output in drain(engine):
        got = ids[output.request_id]
        got += output.token_ids
        if output.finish_reason is not None:
            shown = got if output.keeps_last or output.finish_reason != "stop" else got[:-1]
            texts[numbers[output.request_id]] = (TOKENIZER.decode(shown), output.finish_reason, got)
    return texts


def mixed() -> list[AddRequest]:
    grammars = [
        Grammar.json_schema(OBJECT), None, Grammar.regex(WORDS), Grammar.choice(["yes", "no", "a.b*c"]),
        Grammar.lark('start: "(" start ")" | "x"'), Grammar.regex("[a-f]{3,}"),
    ]  # fmt: skip
    values: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_k": 5, "logprobs": 2}, {"repetition_penalty": 1.3}]
    return [request(number, grammars[number % len(grammars)], **values[number % len(values)]) for number in range(24)]


def test_texts_belong_to_their_languages(engine: LLMEngine) -> None:
    whole = 0
    for number, (text, reason, _) in run(engine, mixed()).items():
        grammar = number % 6
        if reason == "length":
            continue
        assert reason == "stop"
        whole += 1
        if grammar == 0:
            assert set(json.loads(text)) <= {"name", "sharp", "size"}
        elif grammar == 2:
            assert re.fullmatch(WORDS, text)
        elif grammar == 3:
            assert text in ("yes", "no", "a.b*c")
        elif grammar == 4:
            assert re.fullmatch(r"(\(*)x(\)*)", text)
            assert text.count("(") == text.count(")")
        elif grammar == 5:
            assert re.fullmatch("[a-f]{3,}", text)
    assert whole >= 12


def test_a_text_is_the_same_alone_and_under_any_load(folder: Path, engine: LLMEngine) -> None:
    alone = {}
    for each in mixed():
        alone |= run(engine, [each])
    assert run(engine, mixed()) == alone
    crowded = make_engine(folder, kv_cache_memory=cache_bytes(engine, 20), max_num_batched_tokens=24, block_size=16)
    assert run(crowded, mixed()) == alone
    assert crowded.stats().num_preemptions > 0


def test_an_ended_grammar_ends_the_sequence_without_eos(engine: LLMEngine) -> None:
    text, reason, ids = run(engine, [request(0, Grammar.choice(["yes"]), ignore_eos=True)])[0]
    assert (text, reason, ids) == ("yes", "stop", list(b"yes"))


def test_log_probabilities_are_those_of_the_raw_distribution(engine: LLMEngine) -> None:
    engine.add(request(0, Grammar.choice(["q"]), logprobs=3))
    outputs = drain(engine)
    (entry,) = [entry for output in outputs for entry in output.logprobs or []]
    assert entry.token_id == ord("q")
    assert entry.logprob < 0
    assert ord("q") not in [token_id for token_id, _ in entry.top]


def test_sequences_with_a_grammar_guess_nothing(engine: LLMEngine) -> None:
    engine.add(request(0, Grammar.regex("(ab){40}")))
    while engine.has_unfinished:
        engine.step()
        assert all(not seq.draft and seq.lookup is None for seq in engine.scheduler.running)


@pytest.mark.parametrize("seam", ["fill", "accept"])
def test_a_grammar_that_fails_costs_only_its_request(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, seam: str
) -> None:
    expected = run(engine, mixed())
    original = getattr(GrammarMatcher, seam)
    victim: list[GrammarMatcher] = []

    def fail_later(self: GrammarMatcher, *args: Any) -> None:
        original(self, *args)
        if not victim and self._num_tokens == 3:
            victim.append(self)
        if victim == [self]:
            self.has_failed = True

    monkeypatch.setattr(GrammarMatcher, seam, fail_later)
    got = run(engine, mixed())
    failed = [number for number, (_, reason, _) in got.items() if reason == "grammar"]
    assert len(failed) == 1
    assert {number: answer for number, answer in got.items() if number not in failed} == {
        number: answer for number, answer in expected.items() if number not in failed
    }


def test_a_vocabulary_that_cannot_write_it_fails_the_request_alone(folder: Path) -> None:
    engine = make_engine(folder)
    tokens = [b"a", b"b", b"c", *[b"<none>"] * 254]
    engine.runner.grammars = GrammarCompiler(lambda: GrammarVocabulary(tokens, list(range(3, 257))))
    got = run(engine, [request(0, Grammar.regex("[ab]{2}z")), request(1, None, max_tokens=4)])
    assert got[0][1] == "grammar"
    assert got[1][1] == "length"


def test_a_grammar_that_is_wrong_ends_its_request(engine: LLMEngine) -> None:
    got = run(engine, [request(0, Grammar.regex("(a")), request(1, None, max_tokens=4)])
    assert got[0] == ("", "grammar", [])
    assert got[1][1] == "length"


def test_waiting_for_a_grammar_takes_no_seat_and_can_be_aborted(engine: LLMEngine) -> None:
    slow = Grammar.regex("|".join(f"word{number}" for number in range(4000)))
    waiting, other = request(0, slow), request(1, None, max_tokens=1)
    engine.add(waiting)
    engine.add(other)
    assert (engine.scheduler.num_waiting, engine.scheduler.num_running) == (1, 0)
    engine.abort(waiting.request_id)
    assert [output.request_id for output in drain(engine)] == [other.request_id]


def test_a_deadline_passes_while_a_grammar_is_compiled(engine: LLMEngine) -> None:
    late = request(0, Grammar.regex("never seen before"))
    engine.add(msgspec.structs.replace(late, deadline=time.monotonic() - 1))
    assert [output.finish_reason for output in engine.step().outputs] == ["deadline"]
    assert not engine.has_unfinished
