"""The real `openai` client against real servers, beside what `generate()` alone and transformers say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from transformers import LlamaForCausalLM

from model.transformer import Transformer
from tests.docs_pages import run_python
from tests.server.clients import read_events
from tests.server.expected import alone
from tests.server.fake_engine import FakeEngine, Plan
from tests.server.live import LiveServer
from tests.server.real import PATIENCE, RealServer, load_alone, running, save_random

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a] {% endif %}"
)
MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hé 🦜"}]
RENDERED = "[system] be brief\n[user] hé 🦜\n[a] "
CAPACITY = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("openai") / "random")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    torch.set_num_threads(1)
    return load_alone(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RealServer]:
    half = str(CAPACITY // 2)
    options = ("--num-threads", "1", "--max-num-seqs", half, "--max-queued-requests", half)
    with running(folder, "--served-model-name", "mine", *options) as server:
        server.wait_ready()
        yield server
        assert "Traceback" not in server.log


def connect(url: str, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)


@pytest.fixture
def client(server: RealServer) -> Iterator[openai.OpenAI]:
    with connect(server.url) as client:
        yield client


def test_completions(client: openai.OpenAI, model: Transformer) -> None:
    fields: dict[str, Any] = {"max_tokens": 30, "temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.4, "seed": 5}
    extra = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.2, "logit_bias": {"65": 2.0}}
    prompts = ["It was the best", "żółw 🦜"]
    answer = client.completions.create(model="mine", prompt=prompts, n=2, extra_body=extra, **fields)
    events = client.completions.create(model="mine", prompt=prompts, n=2, extra_body=extra, stream=True, **fields)
    streamed = ["", "", "", ""]
    for event in events:
        streamed[event.choices[0].index] += event.choices[0].text
    for choice in answer.choices:
        assert choice.model_extra is not None
        seed = choice.model_extra["seed"]
        expected = alone(model, {"prompt": prompts[choice.index // 2], **fields, **extra}, seed)
        assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
        assert streamed[choice.index] == expected.text
        assert (seed == 5) == (choice.index % 2 == 0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(prompt.encode()) for prompt in prompts)


def test_stop_strings_and_ids(client: openai.OpenAI, model: Transformer) -> None:
    body = {"prompt": [72, 105], "max_tokens": 60, "temperature": 0.0}
    text = alone(model, body, 0).text
    answer = client.completions.create(model="mine", stop=[text[7:9], "never"], **body)
    assert answer.choices[0].text == text.partition(text[7:9])[0]
    assert answer.choices[0].finish_reason == "stop"


def test_chat(client: openai.OpenAI, model: Transformer) -> None:
    expected = alone(model, {"prompt": RENDERED, "max_tokens": 40, "temperature": 0.8, "logprobs": 2}, 9)
    fields: dict[str, Any] = {"model": "mine", "messages": MESSAGES, "max_tokens": 40, "temperature": 0.8, "seed": 9}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=2, **fields)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(RENDERED.encode())
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert expected.logprobs is not None
    for token, entry in zip(logprobs.content, expected.logprobs, strict=True):
        assert token.token == entry["text"]
        assert [token.logprob] == pytest.approx([entry["logprob"]], abs=1e-4)
        assert [each.logprob for each in token.top_logprobs] == pytest.approx(
            [each["logprob"] for each in entry["top"]], abs=1e-4
        )


def test_a_chat_in_a_stream(client: openai.OpenAI, model: Transformer) -> None:
    """The client's own accumulator puts the answer together and checks the shape of what it gets."""
    body = {"prompt": RENDERED, "max_tokens": 60}
    stop = alone(model, body, 3).text[30:32]
    expected = alone(model, body | {"stop": [stop]}, 3)
    with client.chat.completions.stream(
        model="mine", messages=MESSAGES, max_tokens=60, seed=3, stop=stop, stream_options={"include_usage": True}
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == expected.text
    assert final.choices[0].finish_reason == expected.finish_reason == "stop"
    assert final.usage is not None
    assert final.usage.completion_tokens == len(expected.token_ids)
    assert final.usage.total_tokens == len(RENDERED.encode()) + len(expected.token_ids)


def test_echo_with_logprobs_beside_transformers(client: openai.OpenAI, folder: Path) -> None:
    ids = [list(b"The quill writes what a hand has thought"), list("żółw 🦜".encode()), [7]]
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for max_tokens in (0, 1):
        answer = client.completions.create(
            model="mine", prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
        )
        for prompt, choice in zip(ids, answer.choices, strict=True):
            assert choice.logprobs is not None
            assert choice.logprobs.token_logprobs is not None
            assert choice.logprobs.top_logprobs is not None
            with torch.inference_mode():
                scores = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
            expected = scores[range(len(prompt) - 1), prompt[1:]].tolist()
            assert choice.logprobs.token_logprobs[0] is None
            assert choice.logprobs.token_logprobs[1 : len(prompt)] == pytest.approx(expected, abs=1e-4)
            assert len(choice.logprobs.token_logprobs) == len(prompt) + max_tokens
            best = [max(top.values()) for top in choice.logprobs.top_logprobs[1 : len(prompt)]]
            assert best == pytest.approx(scores.max(-1).values[:-1].tolist(), abs=1e-4)


def test_shapes_by_the_clients_own_types(server: RealServer) -> None:
    url = f"{server.url}/v1"
    raw = httpx.post(f"{url}/completions", json={"prompt": "a", "logprobs": 2}, timeout=PATIENCE)
    Completion.model_validate_json(raw.content, strict=True)
    body = {"messages": MESSAGES, "max_tokens": 5, "logprobs": True, "top_logprobs": 1}
    ChatCompletion.model_validate_json(
        httpx.post(f"{url}/chat/completions", json=body, timeout=PATIENCE).content, strict=True
    )
    stream = httpx.post(f"{url}/chat/completions", json=body | {"stream": True}, timeout=PATIENCE)
    for _, data in list(read_events(stream.text))[:-1]:
        ChatCompletionChunk.model_validate_json(data, strict=True)


def test_models(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["mine"]
    assert client.models.retrieve("mine").owned_by == "quill"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("openai-community/gpt2")


def test_many_at_once(server: RealServer, model: Transformer) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(model="mine", prompt="p", seed=seed, max_tokens=25, stream=True)
        return "".join([event.choices[0].text async for event in stream])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=PATIENCE) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(CAPACITY)))

    assert asyncio.run(run()) == [
        alone(model, {"prompt": "p", "max_tokens": 25}, seed).text for seed in range(CAPACITY)
    ]


def test_a_stream_that_is_closed_frees_its_blocks(client: openai.OpenAI, server: RealServer) -> None:
    stream = client.completions.create(
        model="mine", prompt="p", max_tokens=500, n=3, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.wait_idle()


def test_errors_are_the_clients_own(client: openai.OpenAI, server: RealServer) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="mine", prompt="p", max_tokens=4096)
    assert (bad.value.code, bad.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.BadRequestError, match="calls no tools"):
        client.chat.completions.create(
            model="mine", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt="p")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    busy = client.completions.create(
        model="mine", prompt="p", max_tokens=500, n=CAPACITY, stream=True, extra_body={"ignore_eos": True}
    )
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="mine", prompt="p")
    assert int(full.value.response.headers["retry-after"]) >= 1
    assert full.value.type == "rate_limit_error"
    busy.close()
    server.wait_idle()


def test_the_page_of_the_documentation(server: RealServer, tmp_path: Path) -> None:
    page = tmp_path / PAGE.name
    text = PAGE.read_text(encoding="utf-8")
    assert "http://127.0.0.1:8000" in text
    page.write_text(text.replace("http://127.0.0.1:8000", server.url), encoding="utf-8")
    results = list(run_python(page))
    assert len(results) >= 6
    assert [(each.line, each.actual) for each in results] == [(each.line, each.stated or "") for each in results]


def test_a_key_is_checked_and_a_fault_in_a_stream_is_raised() -> None:
    engine = FakeEngine(lambda prompt, params: Plan([[97], [98], [99]], fail_after=2))
    with LiveServer(engine, keys=["correct-horse"]) as server:
        with connect(server.url, "wrong-horse") as client, pytest.raises(openai.AuthenticationError) as refused:
            client.models.list()
        assert refused.value.code == "invalid_api_key"
        with connect(server.url, "correct-horse") as client:
            stream = client.completions.create(model="tiny", prompt="p", stream=True)
            with pytest.raises(openai.APIError, match="gave up"):
                assert "".join(event.choices[0].text for event in stream) == ""
            engine.script = lambda prompt, params: Plan([[97]])
            assert client.completions.create(model="tiny", prompt="p").choices[0].text == "a"
            server.app.state.services.lifecycle.draining = True
            with pytest.raises(openai.InternalServerError) as draining:
                client.completions.create(model="tiny", prompt="p")
            assert (draining.value.status_code, draining.value.code) == (503, "draining")
