"""huggingface_hub's client and raw bodies against a real server, beside what `generate()` alone says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError

from model.generate import generate
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from server.schemas.tgi import TgiParameters
from server.settings import Settings
from tests.docs_pages import fenced_blocks, run_python
from tests.server.expected import Expected, alone
from tests.server.real import PATIENCE, VOCAB_SIZE, RealServer, load_alone, running, save_random

PROMPT = "It was the best of times, żółw 🦜"
PAGE = Path(__file__).parents[2] / "docs" / "migrating-from-tgi.md"
TOKENIZER = Tokenizer.bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("tgi") / "random")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RealServer]:
    with running(folder, "--num-threads", "1", "--max-num-seqs", "4", "--max-queued-requests", "4") as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    torch.set_num_threads(1)
    return load_alone(folder)


@pytest.fixture
def client(server: RealServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceClient]:
    """One that may open connections, which the tests' settings for the Hub forbid."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with InferenceClient(server.url, provider="hf-inference", timeout=PATIENCE) as client:
        yield client


def expected(model: Transformer, seed: int = 0, **body: Any) -> Expected:
    return alone(model, {"prompt": PROMPT, "temperature": 0.0, "logprobs": 2} | body, seed)


def test_text(client: InferenceClient, model: Transformer) -> None:
    """The client's route gives the prompt back unless told not to."""
    answer = expected(model, max_tokens=40).text
    assert client.text_generation(PROMPT, max_new_tokens=40) == PROMPT + answer
    assert client.text_generation(PROMPT, max_new_tokens=40, return_full_text=False) == answer


def test_details(client: InferenceClient, model: Transformer) -> None:
    answer = expected(model, max_tokens=12)
    output = client.text_generation(
        PROMPT, max_new_tokens=12, details=True, top_n_tokens=2, decoder_input_details=True, return_full_text=False
    )
    details = output.details
    assert details is not None
    assert (output.generated_text, details.finish_reason, details.seed) == (answer.text, "length", None)
    assert details.generated_tokens == 12
    assert [token.id for token in details.tokens] == answer.token_ids
    assert answer.logprobs is not None
    assert [token.logprob for token in details.tokens] == pytest.approx(
        [entry["logprob"] for entry in answer.logprobs], abs=1e-4
    )
    assert details.top_tokens is not None
    for alternatives, entry in zip(details.top_tokens, answer.logprobs, strict=True):
        assert [token["id"] for token in alternatives] == [token["id"] for token in entry["top"]]  # type: ignore[index]
    ids = TOKENIZER.encode(PROMPT)
    assert [token.id for token in details.prefill] == ids
    with torch.inference_mode():
        logits = model.compute_logits(model(torch.tensor([ids])))[0].float()
    scores = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
    assert [token.logprob for token in details.prefill] == [None, *(pytest.approx(score, abs=1e-4) for score in scores)]


@pytest.mark.parametrize("stop", [None, ["nowhere", "X"]])
def test_streams(client: InferenceClient, model: Transformer, stop: list[str] | None) -> None:
    params = SamplingParams(max_tokens=200, temperature=0.9, top_k=30, top_p=0.9, seed=41)
    with torch.inference_mode():
        ids = generate(model, TOKENIZER.encode(PROMPT), params, valid_vocab_size=TOKENIZER.vocab_size).token_ids
    text = TOKENIZER.decode(ids)
    if stop is not None:
        text = text[: text.index("X") + 1]
    options: dict[str, Any] = {
        "max_new_tokens": 200, "temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 41, "stop": stop,
        "return_full_text": False,
    }  # fmt: skip
    events = list(client.text_generation(PROMPT, stream=True, details=True, **options))
    last = events[-1]
    assert [event.token.id for event in events] == ids[: len(events)]
    assert last.generated_text == text
    assert last.details is not None
    assert last.details.seed == 41
    assert last.details.input_length == len(TOKENIZER.encode(PROMPT))
    assert last.details.generated_tokens == len(events)
    reason = "stop_sequence" if stop else ("eos_token" if ids[-1] == 256 else "length")
    assert last.details.finish_reason == reason
    assert "".join(event.token.text for event in events if not event.token.special) == text
    plain = list(client.text_generation(PROMPT, stream=True, **options))
    assert plain == [event.token.text for event in events]
    assert client.text_generation(PROMPT, **options) == text


def test_best_of(client: InferenceClient) -> None:
    output = client.text_generation(PROMPT, best_of=3, do_sample=True, details=True, max_new_tokens=8)
    details = output.details
    assert details is not None
    assert details.best_of_sequences is not None
    assert len(details.best_of_sequences) == 2

    def mean(tokens: Any) -> float:
        return sum(token.logprob for token in tokens) / len(tokens)

    assert all(mean(details.tokens) >= mean(other.tokens) for other in details.best_of_sequences)
    # Each sequence can be had again by its own seed.
    for sequence, text in [
        (details, output.generated_text),
        *((o, o.generated_text) for o in details.best_of_sequences),
    ]:
        again = client.text_generation(PROMPT, do_sample=True, seed=sequence.seed, max_new_tokens=8)
        assert again == text


def test_errors_are_those_that_the_client_knows(client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="temperature must be"):
        client.text_generation(PROMPT, temperature=50.0)
    with pytest.raises(ValidationError, match="watermark"):
        client.text_generation(PROMPT, watermark=True, stream=True)
    with pytest.raises(ValidationError, match="max_new_tokens 512"):
        client.text_generation(PROMPT, max_new_tokens=512)


def test_overload(client: InferenceClient, server: RealServer) -> None:
    with pytest.raises(ValidationError, match="best_of must not be above 8"):
        client.text_generation(PROMPT, best_of=9, do_sample=True)
    server.engine.suspend()  # so that what is admitted stays
    try:
        with httpx.stream("POST", f"{server.url}/generate", json={"prompt": "a", "n": 8, "stream": True}) as busy:
            assert busy.status_code == 200
            refused = httpx.post(f"{server.url}/generate", json={"inputs": PROMPT})
            assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            with pytest.raises(OverloadedError):
                client.text_generation(PROMPT)
    finally:
        server.engine.resume()
    server.wait_idle()


def test_info(client: InferenceClient) -> None:
    info = client.get_endpoint_info()
    assert (info["model_id"], info["max_total_tokens"], info["max_best_of"]) == ("random", 512, 8)
    assert client.health_check()


def test_raw_bodies(server: RealServer, model: Transformer) -> None:
    answer = expected(model, max_tokens=20)
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 20}}
    whole = httpx.post(f"{server.url}/generate", json=body)
    assert whole.json() == {"generated_text": answer.text}
    assert whole.headers["x-prompt-tokens"] == str(len(PROMPT.encode()))
    assert whole.headers["x-generated-tokens"] == str(len(answer.token_ids))
    times = [int(whole.headers[f"x-{name}-time"]) for name in ("validation", "queue", "inference", "total")]
    assert sum(times[:3]) == pytest.approx(times[3], abs=3)  # each is rounded to a millisecond
    streamed = httpx.post(f"{server.url}/generate_stream", json=body).text
    assert "[DONE]" not in streamed
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line]
    assert [event["token"]["id"] for event in events] == answer.token_ids
    assert events[-1]["generated_text"] == answer.text
    assert TOKENIZER.vocab_size < VOCAB_SIZE


def test_truncation_keeps_the_end(server: RealServer, model: Transformer) -> None:
    body = {"inputs": "lost " * 200 + PROMPT, "parameters": {"truncate": len(PROMPT.encode()), "max_new_tokens": 9}}
    assert (
        httpx.post(f"{server.url}/generate", json=body).json()["generated_text"] == expected(model, max_tokens=9).text
    )


@pytest.fixture
def page(server: RealServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page on moving from TGI, about the server at hand."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    text = PAGE.read_text(encoding="utf-8").replace("http://127.0.0.1:8000", server.url)
    copy = tmp_path / PAGE.name
    copy.write_text(text, encoding="utf-8")
    return copy


def test_the_page_s_programs_print_what_it_says(page: Path) -> None:
    results = list(run_python(page))
    assert len(results) == 2
    for printed in results:
        assert printed.actual == printed.stated, f"the block at line {printed.line}"


def test_the_page_s_curl_lines(page: Path) -> None:
    """Run as they stand where there is a curl; each answer is TGI's."""
    lines = "\n".join(block.text for block in fenced_blocks(page.read_text()) if block.language == "sh")
    commands = [shlex.split(line) for line in lines.replace("\\\n", " ").splitlines() if line.startswith("curl ")]
    assert len(commands) == 3
    answers = []
    for command in commands:
        url = next(word for word in command if word.startswith("http://"))
        response = httpx.post(url, content=command[-1], headers={"content-type": "application/json"})
        assert response.status_code == 200, response.text
        answers.append(response.text)
        if shutil.which("curl"):
            run = subprocess.run(
                [*command, "--silent", "--fail", "--noproxy", "*"], capture_output=True, timeout=PATIENCE
            )
            assert (run.returncode, run.stdout.decode()) == (0, response.text)
    assert set(json.loads(answers[0])) == {"generated_text"}
    assert json.loads(answers[1].strip().splitlines()[-1].removeprefix("data: "))["generated_text"]
    assert [token["text"] for token in json.loads(answers[2])] == list("ROMEO:")


def test_the_page_names_every_parameter_and_only_what_exists(page: Path, server: RealServer) -> None:
    text = page.read_text()
    for name in TgiParameters.model_fields:
        assert f"`{name}`" in text, name
    metrics = httpx.get(f"{server.url}/metrics").text
    for name in re.findall(r"`((?:vllm|quill):\w+)`", text):
        assert f"# TYPE {name} " in metrics, name
    options = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    rows = re.findall(r"^\| `--.*\| (.*) \|$", text, re.MULTILINE)
    named = {option for row in rows for option in re.findall(r"--[a-z-]+", row)}
    assert len(named) > 10
    assert named <= options
