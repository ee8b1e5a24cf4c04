"""A small random model over bytes, and an engine for it: every text that it writes is nobody's but the grammar's."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import save_model
from model.config import llama_config
from model.grammar import Grammar
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from server.engine.config import EngineConfig
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest, SequenceOutput

TOKENIZER = Tokenizer.bytes()
EOS = 256
IDS = itertools.count()

Answers = dict[int, tuple[str, str, list[int]]]
"""By the requests' numbers their texts, finish_reasons and ids."""


def make_model(folder: Path, max_seq_len: int = 256) -> Path:
    config = llama_config(2, 4, 2, 64, 128, vocab_size=257, max_seq_len=max_seq_len)
    model = Transformer(replace(config, eos_token_id=EOS, bos_token_id=EOS))
    model.init_weights(seed=5)
    save_model(folder, model, dtype=torch.float32)
    TOKENIZER.save(folder)
    return folder


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


def run(engine: LLMEngine, requests: list[AddRequest]) -> Answers:
    numbers = {each.request_id: each.params.seed for each in requests}
    ids: dict[int, list[int]] = {each.request_id: [] for each in requests}
    answers: Answers = {}
    for each in requests:
        engine.add(each)
    for output in drain(engine):
        got = ids[output.request_id]
        got += output.token_ids
        if output.finish_reason is not None:
            shown = got if output.keeps_last or output.finish_reason != "stop" else got[:-1]
            answers[numbers[output.request_id]] = (TOKENIZER.decode(shown), output.finish_reason, got)
    return answers
