"""Grammars in the engine: what is written belongs to the language, under any load, and a failure is one request's."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from model.grammar import Grammar
from server.engine.grammar_compiler import GrammarCompiler
from server.engine.grammar_matcher import GrammarMatcher
from server.engine.grammar_vocabulary import GrammarVocabulary
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest
from tests.engine.grammar_model import drain, make_engine, make_model, request, run
from tests.engine.mixed_load import cache_bytes

OBJECT = {
    "type": "object",
    "properties": {"name": {"enum": ["quill", "reed"]}, "sharp": {"type": "boolean"}, "size": {"type": "integer"}},
    "required": ["name", "sharp"],
    "additionalProperties": False,
}
WORDS = "(red|green|blue)( (red|green|blue)){0,3}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("grammar") / "model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> LLMEngine:
    return make_engine(folder)


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
