"""--watch on a real server: newer checkpoints take over under streams, bad ones do not, and it tells which and why."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model.checkpoint import load_model, save_model
from model.generate import generate
from model.manifest import weights_digest
from model.packed_model import pack_model
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from tests.server.checkpoints import save_step, touch_later
from tests.server.live import wait_until
from tests.server.real import PATIENCE, RealServer, running

STREAMS = 32
TEXT = "to be, or not to be, that is the question. " * 20


def ask(url: str, number: int, max_tokens: int = 100) -> tuple[str, list[int]]:
    """(weights, tokens) of a stream."""
    body = {"prompt": f"line {number}:", "max_tokens": max_tokens, "seed": number, "ignore_eos": True, "stream": True}
    tokens: list[int] = []
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=PATIENCE) as response:
        assert response.status_code == 200
        events = response.read().split(b"\n\n")  # not by lines: the text holds characters that end some
    for data in events:
        if data.startswith(b"data: {"):
            event = json.loads(data.removeprefix(b"data: "))
            tokens += [token for choice in event["choices"] for token in choice["token_ids"]]
    return event["provenance"]["weights"], tokens


def alone(folder: Path, number: int, max_tokens: int = 100) -> list[int]:
    model = pack_model(load_model(folder, dtype=torch.float32))
    params = SamplingParams(max_tokens=max_tokens, seed=number, ignore_eos=True)
    prompt = Tokenizer.bytes().encode(f"line {number}:")
    return generate(model, prompt, params, valid_vocab_size=Tokenizer.bytes().vocab_size).token_ids


def keep_asking(url: str, number: int, tried: threading.Event, pause: float) -> list[tuple[str, list[int]]]:
    """One stream after the other until the new checkpoint has been tried, and one more."""
    answers = [ask(url, number)]
    while not tried.wait(pause):
        answers.append(ask(url, number))
    return [*answers, ask(url, number)]


def reload_of(server: RealServer) -> dict[str, Any]:
    info: dict[str, Any] = httpx.get(f"{server.url}/info", timeout=PATIENCE).json()["reload"]
    return info


def wait_attempt(server: RealServer, checkpoint: str) -> dict[str, Any]:
    """Until it was tried, and how that went."""

    def tried() -> bool:
        attempt = reload_of(server)["last_attempt"]
        return attempt is not None and attempt["checkpoint"] == checkpoint

    wait_until(tried, seconds=PATIENCE)
    attempt: dict[str, Any] = reload_of(server)["last_attempt"]
    return attempt


def publish(run: Path, folder: Path, age: float) -> None:
    """As a training does: whole, under its name, at once; `age` orders what this test makes within a moment."""
    touch_later(folder, age)
    folder.rename(run / "checkpoints" / folder.name)


# Without a pause, the streams take all of the time that the gate's process would run in. Of the bad checkpoints, the
# first two are known by their files alone.
@pytest.mark.parametrize(("pause", "num_bad"), [(1.0, 2), pytest.param(0.0, 4, marks=pytest.mark.slow)])
def test_checkpoints_take_over_under_load_and_bad_ones_are_rolled_back(
    tmp_path: Path, pause: float, num_bad: int
) -> None:
    run = tmp_path / "a-run"
    first = save_step(run / "checkpoints" / "step-1", 1, sharpness=1.0)
    (tmp_path / "text").write_text(TEXT)
    options: tuple[str, ...] = ("--watch", str(run), "--watch-interval", "0.1", "--watch-text", str(tmp_path / "text"))
    options += ("--max-num-seqs", "64", "--served-model-name", "m", "--num-threads", "1")
    with running(first, *options) as server:
        server.wait_ready()
        assert reload_of(server)["watching"] == "a-run"
        second = save_step(tmp_path / "step-2", 2, sharpness=0.6)
        folders = {weights_digest(folder): keep(folder) for folder in (first, second)}
        old, new = folders

        tried = threading.Event()
        with ThreadPoolExecutor(STREAMS) as pool:
            streams = [pool.submit(keep_asking, server.url, number, tried, pause) for number in range(STREAMS)]
            try:
                wait_until(lambda: server.metric("vllm:generation_tokens_total") > 50 * STREAMS, seconds=PATIENCE)
                publish(run, second, 10)
                attempt = wait_attempt(server, "step-2")
            finally:
                tried.set()
            answers = [stream.result(PATIENCE) for stream in streams]
        assert (attempt["verdict"], attempt["step"], attempt["weights"]) == ("swapped", 2, new)
        assert attempt["scores"]["candidate"] < attempt["scores"]["live"]
        for number, own in enumerate(answers):
            expected = {weights: alone(folder, number) for weights, folder in folders.items()}
            assert expected[old] != expected[new]
            assert all(tokens == expected[weights] for weights, tokens in own)
            assert [own[0][0], own[-1][0]] == [old, new]

        live = reload_of(server)["live"]
        assert live == {"weights": new, "loss": attempt["scores"]["candidate"]}
        assert server.metric("quill:reloads_total", model_name="m", verdict="swapped") == 1
        assert server.metric("quill:live_nll", model_name="m") == pytest.approx(live["loss"])
        model = httpx.get(f"{server.url}/info", timeout=PATIENCE).json()["models"][0]
        assert (model["provenance"]["step"], model["self_check"]["status"]) == (2, "passed")

        expected_answer = new, alone(folders[new], 7, 8)
        for name, verdict, words in bad_checkpoints(tmp_path)[:num_bad]:
            publish(run, tmp_path / name, 20)
            attempt = wait_attempt(server, name)
            assert attempt["verdict"] == verdict, attempt
            assert words in attempt["reason"]
            assert str(tmp_path) not in attempt["reason"]
            assert server.metric("quill:reloads_total", verdict=verdict) == 1
            assert reload_of(server)["live"] == live
            assert ask(server.url, 7, 8) == expected_answer
            shutil.rmtree(run / "checkpoints" / name)
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        server.terminate()
        assert server.wait() == 0
        assert "serving step-2 now" in server.log
        assert "Traceback" not in server.log


def keep(folder: Path) -> Path:
    """A copy that stays as it is."""
    copy = folder.with_name(f".kept-{folder.name}")
    shutil.copytree(folder, copy)
    return copy


def bad_checkpoints(root: Path) -> list[tuple[str, str, str]]:
    """Makes them; (name, verdict, words of the reason) of each."""
    save_step(root / "worse", 3, sharpness=2.0)
    flipped = save_step(root / "flipped", 4, sharpness=0.5)
    data = bytearray((flipped / "model.safetensors").read_bytes())
    data[-5] ^= 0x10
    (flipped / "model.safetensors").write_bytes(data)
    save_step(root / "other-tokens", 5, sharpness=0.5, tokenizer=Tokenizer.characters("abc"))
    endless = save_step(root / "endless", 6, sharpness=0.5)
    model = load_model(endless)
    with torch.no_grad():
        assert model.lm_head is not None
        model.lm_head.weight.copy_(model.lm_head.weight.sign() * 3e38)  # finite weights, logits that are no numbers
    save_model(endless, model, tokenizer=Tokenizer.bytes(), dtype=torch.float32)
    return [
        ("flipped", "damaged", "flipped/model.safetensors differs from its sha256"),
        ("other-tokens", "incompatible", "tokenizer"),
        ("worse", "worse", "is worse than the live one's"),
        ("endless", "canary_failed", "no numbers"),
    ]
