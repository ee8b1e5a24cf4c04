"""Requests of every kind, alone and under load, and how their answers compare: to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.sampling_params import SamplingParams
from model.transformer import Transformer
from server.engine.config import EngineConfig
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest, TokenLogprobs
from server.engine.speculation import PromptLookup
from tests.engine.conftest import VOCAB_SIZE


@dataclass(slots=True)
class Answer:
    """What one request has got so far; `finish_reason` is None while it runs."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def begins(self, whole: Answer) -> bool:
        """Whether the whole answer starts with this one."""
        parts = (
            (self.token_ids, whole.token_ids),
            (self.logprobs, whole.logprobs),
            (self.prompt_logprobs, whole.prompt_logprobs),
        )
        return all(mine == theirs[: len(mine)] for mine, theirs in parts)


Answers = dict[int, Answer]


def make_lively_checkpoint(config: ModelConfig, folder: Path) -> Path:
    """A random model whose layers change what they are given: one with the usual weights says its last token again,
    and its answers would hardly depend on what attention and products return."""
    model = Transformer(config)
    model.init_weights(seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(60.0)
            elif name.startswith(("embed_tokens", "lm_head")):
                parameter.mul_(6.0)
            elif name.endswith("qkv_proj.weight"):
                parameter.mul_(4.0)
    save_model(folder, model, dtype=torch.float32)
    return folder


def make_engine(folder: Path, precision: str, **changes: object) -> LLMEngine:
    """`precision` is a dtype, or int8 for quantised weights. Nothing is guessed unless `changes` say so.

    Raises ConfigError for what the engine cannot run.
    """
    settings: dict[str, object] = {"max_num_seqs": 24, "max_num_batched_tokens": 128, "speculation": False}
    settings |= {"quantization": "int8"} if precision == "int8" else {"dtype": precision}
    return LLMEngine(EngineConfig(str(folder), "test", device="cpu", **settings | changes))  # type: ignore[arg-type]


def cache_bytes(engine: LLMEngine, num_blocks: int) -> int:
    """The kv_cache_memory that holds so many blocks of this engine."""
    cache = engine.runner.cache
    return num_blocks * sum(block[0].nbytes for block in (*cache.keys, *cache.values))


def mixed_requests(count: int, seed: int) -> list[AddRequest]:
    """Greedy and sampled, with penalties, biases, stop tokens and log-probabilities of prompts and answers; prompts of
    1 to 90 tokens, half of them behind one of three prefixes."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (16, 35, 48)]
    requests = []
    for request_id in range(count):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, rng.choice([6, 42])))]
        prompt = rng.choice(prefixes) + own if rng.random() < 0.5 else own
        scored = rng.choice([None, None, None, 0, 2])
        requests.append(AddRequest(request_id, prompt, _random_params(rng), 0.0, prompt_logprobs=scored))
    return requests


def _random_params(rng: random.Random) -> SamplingParams:
    penalised = rng.random() < 0.3
    return SamplingParams(
        max_tokens=rng.randrange(1, 64),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.0, 1.6]),
        top_k=rng.choice([0, 0, 5, 50]),
        top_p=rng.choice([1.0, 0.9, 0.5]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        repetition_penalty=rng.choice([1.3, 0.8]) if penalised else 1.0,
        presence_penalty=0.6 if penalised else 0.0,
        frequency_penalty=rng.choice([0.0, 0.4]) if penalised else 0.0,
        logit_bias={3: 7.0, rng.randrange(VOCAB_SIZE): -2.0} if rng.random() < 0.25 else {},
        min_tokens=rng.choice([0, 1]),
        seed=rng.getrandbits(63),
        stop_token_ids=tuple(range(0, VOCAB_SIZE, 20)) if rng.random() < 0.35 else (),
        ignore_eos=rng.random() < 0.3,
        logprobs=rng.choice([None, None, 0, 3, 20]),
    )


def run_alone(engine: LLMEngine, requests: Iterable[AddRequest]) -> Answers:
    """One request after the other, each with the engine to itself."""
    answers: Answers = {}
    for request in requests:
        engine.add(request)
        answers[request.request_id] = Answer()
        while engine.has_unfinished:
            _collect(engine, answers)
    return answers


def together(engine: LLMEngine, requests: Iterable[AddRequest]) -> dict[int, list[int]]:
    """The tokens of requests that are there from the start."""
    tokens: dict[int, list[int]] = {}
    for request in requests:
        tokens[request.request_id] = []
        engine.add(request)
    while engine.has_unfinished:
        for output in engine.step().outputs:
            tokens[output.request_id] += output.token_ids
    return tokens


def run_under_load(
    engine: LLMEngine, requests: Iterable[AddRequest], seed: int, *, abort_share: float = 0.0, most: int = 1_000_000
) -> Answers:
    """In random order and bursts, while others run, but never more than `most` at once. With a probability of
    `abort_share` a step is preceded by the abortion of one of them."""
    rng = random.Random(seed)
    waiting = list(requests)
    rng.shuffle(waiting)
    answers: Answers = {}
    while waiting or engine.has_unfinished:
        for _ in range(rng.choice([0, 0, 1, 2, 9])):
            if waiting and engine.scheduler.num_running + engine.scheduler.num_waiting < most:
                request = waiting.pop()
                answers[request.request_id] = Answer()
                engine.add(request)
        if answers and rng.random() < abort_share:
            engine.abort(rng.choice(list(answers)))
        _collect(engine, answers)
    return answers


def _collect(engine: LLMEngine, answers: Answers) -> None:
    for output in engine.step().outputs:
        answer = answers[output.request_id]
        answer.token_ids += output.token_ids
        answer.logprobs += output.logprobs or []
        answer.prompt_logprobs += output.prompt_logprobs or []
        answer.finish_reason = output.finish_reason


def differing(answers: Answers, alone: Answers) -> list[int]:
    """The requests whose answer is another than alone. One that was aborted must be the beginning of it."""
    return [
        request_id
        for request_id, answer in answers.items()
        if not (answer == alone[request_id] if answer.finish_reason else answer.begins(alone[request_id]))
    ]


Propose = Callable[[PromptLookup, list[int], int], list[int]]


def erring_guesses(requests: Iterable[AddRequest], alone: Answers) -> Propose:
    """A `PromptLookup.propose` that knows every answer, and errs somewhere in half of its guesses."""
    rng = random.Random(1)
    known = [request.prompt_token_ids + alone[request.request_id].token_ids for request in requests]

    def propose(self: PromptLookup, token_ids: list[int], most: int) -> list[int]:
        whole = next(whole for whole in known if whole[: len(token_ids)] == list(token_ids))
        guess = whole[len(token_ids) : len(token_ids) + most]
        if guess and rng.random() < 0.5:
            place = rng.randrange(len(guess))
            guess[place] = (guess[place] + 1) % VOCAB_SIZE
        return guess

    return propose


def split_sums(engine: LLMEngine, folder: Path) -> None:
    """Break the engine: its logits are summed in as many parts as there are rows, which is what a library does that
    splits the inner dimension by the size of the product."""
    model = load_model(folder)
    weight = (model.embed_tokens if model.lm_head is None else model.lm_head).weight.detach()

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        parts = zip(hidden.float().chunk(len(hidden), dim=1), weight.chunk(len(hidden), dim=1), strict=True)
        return sum((x @ w.T for x, w in parts), torch.zeros(len(hidden), len(weight)))

    engine.runner.logits = logits  # type: ignore[method-assign]
