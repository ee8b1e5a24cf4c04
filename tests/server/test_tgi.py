"""TGI's bodies and answers over the fake engine: shapes, defaults, and how streams and answers agree."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.engine.messages import RequestTimings, SequenceOutput, TokenLogprobs
from server.output import ChoiceDelta, TokenLogprob
from server.tgi_output import TokenReader
from server.tgi_request import is_tgi_body
from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import EOS, PROVENANCE, FakeEngine, Plan, fake_prompt_logprob, says, seeded_letters
from tests.server.tgi_clients import events, post

pytestmark = pytest.mark.anyio


async def params_of(parameters: dict[str, Any] | None, inputs: str = "abc") -> SamplingParams:
    """What the engine is asked for."""
    body = {"inputs": inputs} | ({} if parameters is None else {"parameters": parameters})
    response, engine = await post(says("x"), body)
    assert response.status_code == 200, response.text
    return engine.submitted[0].params


async def test_an_answer_is_the_text_alone() -> None:
    response, _ = await post(says("hello", end=True), {"inputs": "abc"})
    assert response.json() == {"generated_text": "hello"}
    assert response.headers["content-type"] == "application/json"


async def test_details() -> None:
    parameters = {"details": True, "max_new_tokens": 9, "top_n_tokens": 2}
    response, _ = await post(says("hé", end=True), {"inputs": "ab", "parameters": parameters})

    def token(token_id: int, text: str, special: bool = False) -> dict[str, Any]:
        return {"id": token_id, "text": text, "logprob": -0.5, "special": special}

    def second(token_id: int, text: str, special: bool = False) -> dict[str, Any]:
        return token(token_id, text, special) | {"logprob": -1.5}

    assert response.json() == {
        "generated_text": "hé",
        "details": {
            "finish_reason": "eos_token",
            "generated_tokens": 4,
            "seed": None,
            "prefill": [],
            "provenance": PROVENANCE,
            "tokens": [token(104, "h"), token(195, ""), token(169, "é"), token(EOS, "<|endoftext|>", True)],
            "top_tokens": [
                [token(104, "h"), second(105, "i")],
                [token(195, "\ufffd"), second(196, "\ufffd")],
                [token(169, "\ufffd"), second(170, "\ufffd")],
                [token(EOS, "<|endoftext|>", True), second(257, "")],
            ],
        },
    }


async def test_the_prompt_s_tokens() -> None:
    body = {"inputs": "né", "parameters": {"decoder_input_details": True, "max_new_tokens": 1}}
    details = (await post(says("x"), body))[0].json()["details"]
    ids = list("né".encode())
    assert details["prefill"] == [
        {"id": 110, "text": "n", "logprob": None},
        {"id": 195, "text": "\ufffd", "logprob": fake_prompt_logprob(ids, 1)},
        {"id": 169, "text": "\ufffd", "logprob": fake_prompt_logprob(ids, 2)},
    ]
    assert "top_tokens" not in details
    assert "best_of_sequences" not in details


@pytest.mark.parametrize("chunk", [1, 2, 3, 64])
@pytest.mark.parametrize(
    ("parameters", "text", "reason"),
    [
        ({}, "żółw STOP 🦜 end", "eos_token"),
        ({"stop": ["nothing", "OP"]}, "żółw STOP", "stop_sequence"),
        ({"stop": ["ó"]}, "żó", "stop_sequence"),
        ({"stop": ["🦜 e"], "max_new_tokens": 17}, "żółw STOP 🦜", "length"),
        ({"max_new_tokens": 2}, "ż", "length"),
        ({"max_new_tokens": 3}, "ż\ufffd", "length"),
        ({"return_full_text": True, "max_new_tokens": 2}, "abż", "length"),
    ],
)
async def test_a_stream_says_what_an_answer_says(
    chunk: int, parameters: dict[str, Any], text: str, reason: str
) -> None:
    script = says("żółw STOP 🦜 end", chunk=chunk, end=True)
    body = {"inputs": "ab", "parameters": parameters | {"details": True, "top_n_tokens": 1}}
    answer = (await post(script, body))[0].json()
    details = answer["details"]
    assert (answer["generated_text"], details["finish_reason"]) == (text, reason)
    parts = events((await post(script, body, "/generate_stream"))[0])
    assert [part["index"] for part in parts] == list(range(1, len(parts) + 1))
    assert [part["token"] for part in parts] == details["tokens"]
    assert [part["top_tokens"] for part in parts] == details["top_tokens"]
    assert all(part["generated_text"] is None and part["details"] is None for part in parts[:-1])
    assert parts[-1]["generated_text"] == text
    assert parts[-1]["details"] == {
        "finish_reason": reason, "generated_tokens": len(parts), "seed": None, "input_length": 2,
        "provenance": PROVENANCE,
    }  # fmt: skip
    shown = "".join(part["token"]["text"] for part in parts if not part["token"]["special"])
    assert ("ab" if parameters.get("return_full_text") else "") + shown == text


def delta(ids: list[int], **fields: Any) -> ChoiceDelta:
    logprobs = [TokenLogprob(token_id, "", -1.0, []) for token_id in ids]
    return ChoiceDelta(0, "", ids, logprobs=logprobs, **fields)


async def test_text_after_a_stop_sequence_in_the_same_token_is_left_out() -> None:
    tokenizer = Tokenizer.gpt2()
    ids = tokenizer.encode("One, two\n\n")
    reader = TokenReader(tokenizer)
    reader.push(delta(ids[:-1]))
    assert tokenizer.token_bytes(ids[-1]) == b"\n\n"
    tokens = reader.push(delta(ids[-1:], finish_reason="stop", stop_reason="\n"))
    assert [token.text for token in tokens] == ["\n"]
    assert reader.text == "One, two\n"


async def test_ids_without_text_and_specials_inside() -> None:
    reader = TokenReader(Tokenizer.bytes())
    tokens = reader.push(delta([97, 300, EOS, 98], finish_reason="length"))
    assert [(token.text, token.special) for token in tokens] == [
        ("a", False), ("", False), ("<|endoftext|>", True), ("b", False),
    ]  # fmt: skip
    assert reader.text == "ab"


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        (None, 1.0), ({}, 0.0), ({"do_sample": False}, 0.0), ({"do_sample": True}, 1.0), ({"temperature": 0.7}, 0.7),
        ({"temperature": 1.0}, 0.0), ({"temperature": 1}, 0.0), ({"top_k": 3}, 1.0), ({"top_p": 0.5}, 1.0),
        ({"repetition_penalty": 1.2}, 0.0), ({"seed": 3}, 0.0), ({"do_sample": None, "temperature": None}, 0.0),
    ],
)  # fmt: skip
async def test_when_tgi_samples(parameters: dict[str, Any] | None, temperature: float) -> None:
    params = await params_of(parameters)
    assert params.temperature == temperature


async def test_every_parameter_reaches_the_engine() -> None:
    parameters = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.3, "seed": 5,
        "max_new_tokens": 11, "top_n_tokens": 4, "details": True, "stop": ["q"], "typical_p": None, "watermark": False,
        "grammar": None, "adapter_id": None, "best_of": 1, "truncate": 2, "return_full_text": False,
    }  # fmt: skip
    response, engine = await post(
        says("x"), {"inputs": "abc", "parameters": parameters, "options": {"use_cache": True}}
    )
    assert response.status_code == 200, response.text
    assert engine.submitted[0].prompt == [98, 99]  # truncate keeps the prompt's end
    assert engine.submitted[0].params == SamplingParams(
        max_tokens=11, temperature=0.5, top_k=7, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.3, seed=5,
        logprobs=4,
    )  # fmt: skip
    assert response.headers["x-prompt-tokens"] == "2"
    assert response.json()["details"]["seed"] == 5


async def test_defaults() -> None:
    params = await params_of({})
    assert params == SamplingParams(max_tokens=253, temperature=0.0, seed=params.seed)  # the rest of the context
    assert (await params_of({"top_k": 10_000})).top_k == 257


async def test_the_compatible_route_wraps_and_repeats_the_prompt() -> None:
    answer = (await post(says("hello"), {"inputs": "abc: "}, "/"))[0]
    assert answer.json() == [{"generated_text": "abc: hello"}]
    body: dict[str, Any] = {"inputs": "abc: ", "parameters": {"return_full_text": False}}
    assert (await post(says("hello"), body, "/"))[0].json() == [{"generated_text": "hello"}]
    assert events((await post(says("hello"), body | {"stream": True}, "/"))[0])[-1]["generated_text"] == "hello"
    streamed = events((await post(says("hello"), {"inputs": "a", "stream": True}, "/generate"))[0])
    assert (len(streamed), streamed[-1]["generated_text"], streamed[-1]["details"]) == (5, "hello", None)


def likelihoods(logprobs: dict[int, list[float]]) -> type[FakeEngine]:
    """An engine that gives request i these log-probabilities."""

    class Engine(FakeEngine):
        def _output(self, stream: Any, tokens: list[int], *args: Any, **options: Any) -> SequenceOutput:
            output = super()._output(stream, tokens, *args, **options)
            values = logprobs[stream.request_id]
            entries = [TokenLogprobs(token, value, []) for token, value in zip(tokens, values, strict=True)]
            return SequenceOutput(0, tokens, output.finish_reason, logprobs=entries, timings=output.timings)

    return Engine


async def test_best_of_takes_the_likeliest_by_mean_logprob() -> None:
    engine = likelihoods({0: [-3.0], 1: [-0.5, -0.5, -0.5, -0.5], 2: [-1.0, -0.8]})()
    texts = iter(["a", "bbbb", "cc"])
    engine.script = lambda prompt, params: Plan([list(next(texts).encode())])
    parameters = {"best_of": 3, "do_sample": True, "details": True}
    async with client_for(make_app(engine)) as client:
        answer = (await client.post("/generate", json={"inputs": "x", "parameters": parameters})).json()
    assert answer["generated_text"] == "bbbb"
    details = answer["details"]
    assert (details["generated_tokens"], len(details["tokens"])) == (4, 4)
    others = details["best_of_sequences"]
    assert [(one["generated_text"], one["finish_reason"]) for one in others] == [("a", "length"), ("cc", "length")]
    assert all(set(one) == {*details, "generated_text"} - {"best_of_sequences", "provenance"} for one in others)
    seeds = {details["seed"], *(one["seed"] for one in others)}
    assert len(seeds) == 3
    assert {stream.params.seed for stream in engine.submitted} == seeds


async def test_headers() -> None:
    def at(timings: RequestTimings | None) -> type[FakeEngine]:
        class Engine(FakeEngine):
            def _output(self, *args: Any, **options: Any) -> SequenceOutput:
                output = super()._output(*args, **options)
                finished = output.finish_reason is not None
                return SequenceOutput(0, output.token_ids, output.finish_reason, timings=timings if finished else None)

        return Engine

    loop_time = asyncio.get_running_loop().time()  # the monotonic clock
    engine = at(RequestTimings(loop_time - 9.0, loop_time - 5.0, loop_time - 4.0, loop_time, 0))(says("abcd"))
    async with client_for(make_app(engine)) as client:
        headers = (await client.post("/generate", json={"inputs": "xyé"}, headers={"x-request-id": "mine"})).headers
        names = {name for name in headers if name.startswith("x-")}
        assert names == {
            "x-request-id", "x-compute-type", "x-compute-time", "x-compute-characters", "x-prompt-tokens",
            "x-generated-tokens", "x-total-time", "x-validation-time", "x-queue-time", "x-inference-time",
            "x-time-per-token", "x-content-type-options",
        }  # fmt: skip
        assert headers["x-request-id"] == "mine"
        assert (headers["x-prompt-tokens"], headers["x-generated-tokens"]) == ("4", "4")
        assert (headers["x-compute-characters"], headers["x-compute-type"]) == ("3", "cpu")
        assert headers["x-queue-time"] == "4000"
        assert 5000 <= int(headers["x-inference-time"]) < 5900
        assert 1250 <= int(headers["x-time-per-token"]) < 1500
        assert 0 <= int(headers["x-total-time"]) < 900
        assert 0.0 <= float(headers["x-compute-time"]) < 0.9
    async with client_for(make_app(at(None)(says("abcd")))) as client:
        stopped = await client.post("/generate", json={"inputs": "x", "parameters": {"stop": ["c"]}})
        assert stopped.json() == {"generated_text": "abc"}
        assert stopped.headers["x-generated-tokens"] == "3"
        assert 0 <= int(stopped.headers["x-inference-time"]) < 900
        assert "x-queue-time" not in stopped.headers


async def test_our_own_body_stays_ours() -> None:
    response, _ = await post(seeded_letters, {"prompt": 'the word "inputs"', "max_tokens": 3, "seed": 1})
    assert set(response.json()) >= {"id", "choices", "usage"}
    both, _ = await post(seeded_letters, {"prompt": "a", "inputs": "a"})
    assert (both.status_code, both.json()["error"]["code"]) == (422, "unknown_field")
    assert is_tgi_body(b'{"parameters": {"a": [1, {}]}, "inputs": "a"}')
    for raw in (b'{"prompt": {"inputs": 1}}', b'{"a": "inputs"}', b'{"inputs": ', b'["inputs"]', b'"inputs"'):
        assert not is_tgi_body(raw)
    assert not is_tgi_body(b'{"inputs": 1, "x": ' + b"[" * 100_000)


async def test_info_has_what_tgi_s_clients_read(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()
    assert info["model_id"] == "tiny"
    assert info["model_sha"] == "sha256:abc"
    assert info["model_pipeline_tag"] == "text-generation"
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (255, 256)
    assert info["max_concurrent_requests"] == 8 + 256
    assert (info["max_best_of"], info["max_stop_sequences"]) == (16, 16)
    assert info["version"] == info["versions"]["quill"]
    at_most = {"inputs": "a" * info["max_input_tokens"]}
    assert (await client.post("/generate", json=at_most)).status_code == 200
