"""Hindi from text to a stream: tokenizer, data, model, export, server by the public commands; no broken character."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from model.tokenizer import Tokenizer
from tests.server.clients import Answer, ask_all
from tests.server.real import RealServer, running
from tests.training.conftest import exit_status
from tests.training.hindi import SAMPLE, hindi_text

CONTROL = "<|रस:वीर|>"
MAX_TOKENS = 40


def run(*words: object) -> None:
    assert exit_status(*words) == 0


def make_checkpoint(root: Path, num_sentences: int, steps: int, hidden_size: int) -> Path:
    """A small Llama trained on the sample and on what the grammar makes of it."""
    text = root / "hindi.txt"
    text.write_text(SAMPLE + hindi_text(num_sentences).replace("। ", "।\n"), encoding="utf-8")
    run("tokenizer", "train", "--input", text, "--kind", "bpe", "--vocab-size", 400, "--pretokenizer", "devanagari",
        "--normalize", "nfc", "--special", CONTROL, "--out", root / "tokenizer", "--json")  # fmt: skip
    run("prepare", "--input", text, "--documents", "line", "--tokenizer", root / "tokenizer", "--out", root / "data",
        "--json")  # fmt: skip
    run("train", "cpu-smoke", f"data.dir={root / 'data'}", f"run.dir={root / 'run'}", "model.num_layers=1",
        f"model.hidden_size={hidden_size}", "model.max_seq_len=64", "train.seq_len=32", "train.batch_size=16",
        f"train.lr={0.64 / hidden_size}",
        f"train.max_steps={steps}", f"train.eval_interval={steps}", f"train.save_interval={steps}",
        "train.eval_tokens=1024", "run.sample_tokens=0")  # fmt: skip
    return root / "run" / "checkpoints" / "best"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hindi"), 400, 80, 64)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RealServer]:
    with running(checkpoint, "--num-threads", "1") as server:
        server.wait_ready()
        yield server


def generate(server: RealServer, count: int, **body: Any) -> tuple[list[Answer], list[Answer]]:
    """As many generations as streams, and the same ones whole."""
    bodies = [
        {"prompt": ("", "सुबह", "वर्षा में", "रात को", "बुधवार को")[seed % 5], "temperature": 1.0, "seed": seed,
         "max_tokens": MAX_TOKENS, **body}
        for seed in range(count)
    ]  # fmt: skip
    return ask_all(server.url, [each | {"stream": True} for each in bodies]), ask_all(server.url, bodies)


def check(streams: list[Answer], whole: list[Answer], folder: Path) -> list[str]:
    """The texts, streamed as they are whole, and as the tokenizer decodes their ids."""
    tokenizer = Tokenizer.load(folder)
    for stream, answer in zip(streams, whole, strict=True):
        assert stream.only.text == answer.only.text
        assert stream.only.token_ids == answer.only.token_ids
        ends = stream.only.token_ids
        assert stream.only.text == tokenizer.decode(ends)
    return [stream.only.text for stream in streams]


def broken_deltas(streams: list[Answer]) -> list[str]:
    return [delta for stream in streams for delta in stream.only.deltas if "\ufffd" in delta]


def test_streams_hold_whole_characters(server: RealServer, checkpoint: Path) -> None:
    streams, whole = generate(server, 20, top_p=0.99)
    texts = check(streams, whole, checkpoint)
    assert broken_deltas(streams) == []
    assert len(set(texts)) > 5
    known = set("".join(map(Tokenizer.load(checkpoint).normalize, (SAMPLE, hindi_text(400)))))
    assert set("".join(texts)) <= known
    # As it is made, not all at the end; how many tokens share a delta depends on how busy this process is.
    assert sum(len(stream.only.deltas) for stream in streams) > len(streams)


def test_broken_bytes_of_the_model_are_replaced_alike_in_both(server: RealServer, checkpoint: Path) -> None:
    """A bias towards single bytes makes text that is no UTF-8."""
    tokenizer = Tokenizer.load(checkpoint)
    lead = tokenizer.encode("𝄞")[0]  # first byte of a character that the vocabulary lacks
    streams, whole = generate(server, 10, logit_bias={str(lead): 6.0})
    check(streams, whole, checkpoint)
    assert broken_deltas(streams)


def test_the_checkpoint_carries_the_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer.kind == "byte_bpe"
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, CONTROL: 1}
    assert tokenizer.normalize("\u0958") == "क\u093c"
    run("export", checkpoint, "--out", tmp_path / "exported", "--json")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text in (SAMPLE, hindi_text(50), "क़ \u0958 e\u0301 ज़"):
        assert theirs.encode(text) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == tokenizer.normalize(text)
    assert theirs.encode(f"{CONTROL}नदी")[0] == tokenizer.encode_template(f"{CONTROL}नदी")[0] == 1
    assert Tokenizer.load(tmp_path / "exported").digest == tokenizer.digest
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.vocab_size == 400


@pytest.mark.slow
def test_200_generations_stream_without_a_broken_character(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 2_500, 600, 128)
    with running(checkpoint, "--num-threads", "1") as server:
        server.wait_ready()
        streams, whole = generate(server, 200, top_p=0.999)
        check(streams, whole, checkpoint)
        assert broken_deltas(streams) == []
        # Of all that a small model may draw, bytes that are no character come once in some ten thousand tokens.
        streams, whole = generate(server, 200)
        check(streams, whole, checkpoint)
        num_tokens = sum(len(stream.only.token_ids) for stream in streams)
        print(f"temperature 1: {len(broken_deltas(streams))} broken deltas among {num_tokens} tokens of 200 streams")
        assert len(broken_deltas(streams)) <= num_tokens / 1_000
