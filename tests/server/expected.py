"""What a request must answer, by `generate()` alone and plain decoding: no engine, no stream, no stop matcher."""

from __future__ import annotations

import codecs
import random
from dataclasses import dataclass
from typing import Any

import torch

from model.generate import GenerationOutput, generate
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from model.transformer import Transformer

_TOKENIZER = Tokenizer.bytes()
_EOS = 256
# Fields of a request that SamplingParams has under the same name.
_SAMPLING = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "logprobs", "ignore_eos",
)  # fmt: skip


@dataclass(frozen=True)
class Expected:
    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[dict[str, Any]] | None


def prompt_ids(body: dict[str, Any]) -> list[int]:
    prompt = body["prompt"]
    return list(prompt.encode()) if isinstance(prompt, str) else prompt


def alone(model: Transformer, body: dict[str, Any], seed: int) -> Expected:
    """What the choice that draws with `seed` must be."""
    params = SamplingParams(
        **{name: body[name] for name in _SAMPLING if name in body} | {"seed": seed},
        logit_bias={int(token_id): bias for token_id, bias in body.get("logit_bias", {}).items()},
        stop_token_ids=tuple(body.get("stop_token_ids", ())),
    )
    with torch.inference_mode():
        output = generate(model, prompt_ids(body), params, valid_vocab_size=_TOKENIZER.vocab_size)
    return _with_stops(output, body.get("stop", []))


def _with_stops(output: GenerationOutput, stops: list[str]) -> Expected:
    """Cut where the text first holds a stop string after some token."""
    ids, decoder, text = output.token_ids, codecs.getincrementaldecoder("utf-8")("replace"), ""
    for count, token_id in enumerate(ids, 1):
        ends = count == len(ids)
        hidden = token_id == _EOS or (ends and output.finish_reason == "stop")
        text += decoder.decode(b"" if hidden else _TOKENIZER.token_bytes(token_id), final=ends)
        found = [(text.index(stop), stop) for stop in stops if stop in text]
        if found:
            position, stop = min(found, key=lambda pair: pair[0])
            return Expected(ids[:count], text[:position], "stop", stop, _logprobs(output, count))
    if output.finish_reason == "stop":
        reason = None if ids[-1] == _EOS else ids[-1]
        return Expected(ids, text, "stop", reason, _logprobs(output, len(ids)))
    assert text == _TOKENIZER.decode(ids)
    return Expected(ids, text, "length", None, _logprobs(output, len(ids)))


def _logprobs(output: GenerationOutput, count: int) -> list[dict[str, Any]] | None:
    if output.logprobs is None:
        return None
    entries = zip(output.token_ids[:count], output.logprobs, strict=False)
    return [
        _named(token_id, entry.logprob) | {"top": [_named(*alternative) for alternative in entry.top]}
        for token_id, entry in entries
    ]


def _named(token_id: int, logprob: float) -> dict[str, Any]:
    text = _TOKENIZER.token_bytes(token_id).decode("utf-8", "replace")
    return {"id": token_id, "text": text, "logprob": logprob}


def mixed_bodies(model: Transformer, count: int) -> list[dict[str, Any]]:
    """Requests of every kind: half behind a shared prefix, as text or ids, streamed or not, with stop strings that
    are taken from what they would have answered."""
    rng = random.Random(17)
    shared = "It was the best of times, it was the worst of times, it was the age of wisdom. "
    bodies = [_mixed_body(rng, shared if rng.random() < 0.5 else "") for _ in range(count)]
    for body in bodies:
        if rng.random() < 0.4:
            text = alone(model, body, body["seed"]).text
            at = rng.randrange(max(1, len(text) - 2))
            body["stop"] = ["no such ending", text[at : at + rng.randrange(1, 4)] or "x"]
    return bodies


def _mixed_body(rng: random.Random, prefix: str) -> dict[str, Any]:
    prompt = prefix + "".join(rng.choices("abcdefg hijk\nlmno ąę🦜", k=rng.randrange(1, 50)))
    body: dict[str, Any] = {
        "prompt": prompt if rng.random() < 0.7 else list(prompt.encode()),
        "max_tokens": rng.randrange(1, 50),
        "temperature": rng.choice([0.0, 0.0, 0.6, 1.0, 1.7]),
        "seed": rng.getrandbits(63),
        "stream": rng.random() < 0.6,
    }
    options: list[tuple[str, float, list[Any]]] = [
        ("n", 0.25, [2, 3]),
        ("logprobs", 0.3, [0, 2, 20]),
        ("top_k", 0.3, [1, 7, 50]),
        ("top_p", 0.3, [0.3, 0.9]),
        ("min_p", 0.2, [0.05]),
        ("repetition_penalty", 0.3, [0.9, 1.4]),
        ("presence_penalty", 0.2, [0.7, -0.5]),
        ("frequency_penalty", 0.2, [0.4]),
        ("logit_bias", 0.2, [{"65": 6.0, "270": 100.0}, {"101": -100.0}]),
        ("stop_token_ids", 0.3, [[101, 32], [97, 98, 99, 200, 210]]),
        ("ignore_eos", 0.3, [True]),
    ]
    return body | {name: rng.choice(values) for name, odds, values in options if rng.random() < odds}
