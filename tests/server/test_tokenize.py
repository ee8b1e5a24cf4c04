"""POST /tokenize and POST /detokenize: round trips, special tokens, and what is refused."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import Any

import httpx
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from model.tokenizer import Tokenizer
from server.app import create_app
from server.schemas.tokenize import MAX_CHARACTERS, MAX_TOKENS
from server.tokenization import place_tokens
from tests.server.conftest import client_for, make_settings
from tests.server.fake_engine import EOS, FakeEngine
from tests.server.hostile_bodies import CANARY

pytestmark = pytest.mark.anyio
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def client_with(tokenizer: Tokenizer | None, **engine_options: Any) -> httpx.AsyncClient:
    return client_for(create_app(make_settings(), FakeEngine(**engine_options), tokenizer=tokenizer))


def bos_tokenizer(folder: Any) -> Tokenizer:
    """A byte-level BPE that puts a BOS before every text, as Llama's does."""
    vocabulary = {"<s>": 0} | {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.add_special_tokens(["<s>"])
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def test_round_trip() -> None:
    tokenizer = Tokenizer.gpt2()
    with asyncio.Runner() as runner:
        client = client_with(tokenizer)

        def ask(path: str, **body: Any) -> Any:
            return runner.run(client.post(path, json=body)).json()

        @settings(max_examples=100, deadline=None)
        @given(text=TEXT, add_special_tokens=st.booleans())
        def check(text: str, add_special_tokens: bool) -> None:
            answer = ask("/tokenize", text=text, add_special_tokens=add_special_tokens, return_token_strs=True)
            assert answer["tokens"] == tokenizer.encode(text)
            assert answer["count"] == len(answer["tokens"]) == len(answer.pop("token_strs"))
            assert answer == ask("/tokenize", prompt=text)
            assert ask("/detokenize", tokens=answer["tokens"]) == {"text": text, "prompt": text}

        check()
        runner.run(client.aclose())


async def test_the_answer(client: httpx.AsyncClient) -> None:
    answer = await client.post("/tokenize", json={"text": "hé", "return_token_strs": True, "model": "tiny"})
    assert answer.json() == {
        "tokens": [104, 195, 169], "count": 3, "max_model_len": 256, "token_strs": ["h", "\ufffd", "\ufffd"],
    }  # fmt: skip
    assert (await client.post("/tokenize", json={"text": ""})).json() == {
        "tokens": [],
        "count": 0,
        "max_model_len": 256,
    }
    assert (await client.post("/detokenize", json={"tokens": []})).json()["text"] == ""
    cut = await client.post("/detokenize", json={"tokens": [104, 195, EOS]})
    assert cut.json()["text"] == "h\ufffd"  # half a character, and a special token, which has no text


async def test_special_tokens_are_added_unless_refused(tmp_path: Any) -> None:
    tokenizer = bos_tokenizer(tmp_path)
    async with client_with(tokenizer) as client:
        marked = (await client.post("/tokenize", json={"text": "ab<s>", "return_token_strs": True})).json()
        bare = (await client.post("/tokenize", json={"text": "ab<s>", "add_special_tokens": False})).json()
        placed = (await client.post("/tokenize", json={"inputs": "aé"})).json()
    assert marked["tokens"] == [0, *bare["tokens"]]
    assert marked["token_strs"] == ["<s>", "a", "b", "<", "s", ">"]  # in a user's text it is text
    assert [(token["text"], token["start"], token["stop"]) for token in placed] == [
        ("", 0, 0), ("a", 0, 1), ("\ufffd", 1, 2), ("\ufffd", 2, 3),
    ]  # fmt: skip


@given(text=TEXT)
def test_tgi_s_places_cover_the_text(text: str) -> None:
    tokenizer = Tokenizer.gpt2()
    data = text.encode()
    tokens = place_tokens(data, tokenizer.encode(text), tokenizer)
    assert [data[token.start : token.stop] for token in tokens] == [tokenizer.token_bytes(token.id) for token in tokens]
    assert (tokens[-1].stop if tokens else 0) == len(data)
    assert all(token.stop == after.start for token, after in itertools.pairwise(tokens))


def test_a_text_that_the_tokenizer_changes_has_no_places() -> None:
    tokens = place_tokens(b"AB", list(b"ab"), Tokenizer.bytes())
    assert [(token.id, token.start, token.stop, token.text) for token in tokens] == [(97, 0, 0, ""), (98, 0, 0, "")]


async def test_long_texts_leave_the_event_loop(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []
    encode, decode = Tokenizer.encode, Tokenizer.decode

    def noting_encode(self: Tokenizer, text: str, **options: Any) -> list[int]:
        threads.append(threading.current_thread() is threading.main_thread())
        return encode(self, text, **options)

    def noting_decode(self: Tokenizer, ids: list[int]) -> str:
        threads.append(threading.current_thread() is threading.main_thread())
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "encode", noting_encode)
    monkeypatch.setattr(Tokenizer, "decode", noting_decode)
    for size in (10, 100_000):
        ids = (await client.post("/tokenize", json={"text": "a" * size})).json()["tokens"]
        assert len((await client.post("/tokenize", json={"inputs": "a" * size})).json()) == size
        assert (await client.post("/detokenize", json={"tokens": ids})).json()["text"] == "a" * size
    assert threads == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("path", "raw", "param"),
    [
        ("/tokenize", b"{}", "text"), ("/tokenize", b'{"text": "a", "prompt": "a"}', "text"),
        ("/tokenize", b'{"text": 5}', "text"), ("/tokenize", b'{"text": ["a"]}', "text"),
        ("/tokenize", b'{"text": "a", "add_special_tokens": 1}', "add_special_tokens"),
        ("/tokenize", b'{"text": "\\ud800"}', None), ("/tokenize", b'{"text": "a", "x": 1}', None),
        ("/detokenize", b"{}", "tokens"), ("/detokenize", b'{"tokens": [257]}', "tokens"),
        ("/detokenize", b'{"tokens": [-1]}', "tokens"), ("/detokenize", b'{"tokens": [1.0]}', "tokens"),
        ("/detokenize", b'{"tokens": [true]}', "tokens"), ("/detokenize", b'{"tokens": "abc"}', "tokens"),
        ("/detokenize", b'{"tokens": [99999999999999999999]}', "tokens"), ("/detokenize", b"[1]", None),
    ],
)  # fmt: skip
async def test_wrong_bodies(client: httpx.AsyncClient, path: str, raw: bytes, param: str | None) -> None:
    response = await client.post(path, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"] == param


async def test_what_is_not_served_or_not_ready_or_not_in_the_vocabulary() -> None:
    async with client_with(Tokenizer.bytes()) as client:
        for path, body in (("/tokenize", {"text": "a"}), ("/detokenize", {"tokens": [1]})):
            response = await client.post(path, json=body | {"model": CANARY})
            assert (response.status_code, CANARY in response.text) == (404, False)
        tgi = await client.post("/tokenize", json={"inputs": "a", "model": CANARY})
        assert (tgi.status_code, tgi.json()["error_type"]) == (404, "model_not_found")
    async with client_with(None, state="loading") as client:
        for path, body in (("/tokenize", {"text": "a"}), ("/detokenize", {"tokens": [1]})):
            response = await client.post(path, json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
    async with client_with(Tokenizer.characters("ab")) as client:
        response = await client.post("/tokenize", json={"prompt": "abc"})
        assert (response.status_code, response.json()["error"]["param"]) == (422, "prompt")
        tgi = await client.post("/tokenize", json={"inputs": "abc"})
        assert (tgi.status_code, tgi.json()["error_type"]) == (422, "validation")


async def test_limits(client: httpx.AsyncClient) -> None:
    for body, param in (
        ({"text": "a" * MAX_CHARACTERS}, "text"),
        ({"prompt": "a" * MAX_CHARACTERS}, "prompt"),
        ({"tokens": [97] * MAX_TOKENS}, "tokens"),
    ):
        path = "/detokenize" if param == "tokens" else "/tokenize"
        assert (await client.post(path, json=body)).status_code == 200
        over = await client.post(path, json={param: body[param] + body[param][:1]})  # type: ignore[operator]
        assert over.status_code == 422
        assert str(MAX_CHARACTERS) in over.json()["error"]["message"]
    over = await client.post("/tokenize", json={"inputs": "a" * (MAX_CHARACTERS + 1)})
    assert (over.status_code, over.json()["error_type"]) == (422, "validation")
