"""The page's modules one by one, run in the browser: events out of any chunks, tokens on any text, fields, links."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs

import pytest
from playwright.sync_api import Browser, Page

from model.text_output import TextDecoder
from model.tokenizer import Tokenizer
from tests.server.live import LiveServer
from tests.server.page_browser import PageEngine, launch, visit

STREAM = (
    "\ufeffdata: one\n\n: a comment\nevent: error\r\ndata: two\r\ndata:  and a half\r\n\r\nid: 7\ndata\n\n"
    "event: nothing\n\nretry: 5\rdata:three\r\rdata: café 🙂\n\ndata: unfinished\n"
)
EVENTS = [("message", "one"), ("error", "two\n and a half"), ("message", ""), ("message", "three"),
          ("message", "café 🙂")]  # fmt: skip
PARSE = """async (chunks) => {
  const { EventParser } = await import("/static/sse.js");
  return chunks.map((parts) => {
    const parser = new EventParser();
    return parts.flatMap((part) => parser.push(part)).map(({ name, data }) => [name, data]);
  });
}"""
ALIGN = """async (streams) => {
  const { TokenAligner } = await import("/static/tokens.js");
  return streams.map((events) => {
    const aligner = new TokenAligner();
    return events.flatMap(([text, tokens, done]) => aligner.push(text, tokens, done));
  });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    with LiveServer(PageEngine()) as server, visit(browser, server.url) as page:
        yield page


def test_events_come_out_of_any_chunks(page: Page) -> None:
    """Every way to cut the stream in two, every character alone, and cuts at random."""
    drawn = random.Random(3)
    cuts = [[at] for at in range(len(STREAM) + 1)]
    cuts += [sorted(drawn.sample(range(len(STREAM)), 9)) for _ in range(50)]
    cuts.append(list(range(1, len(STREAM))))
    chunks = [[STREAM[start:end] for start, end in zip([0, *cut], [*cut, len(STREAM)], strict=True)] for cut in cuts]
    for parts, events in zip(chunks, page.evaluate(PARSE, chunks), strict=True):
        assert [tuple(event) for event in events] == EVENTS, parts


def token(token_id: int, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
    return {"id": token_id, "text": text, "logprob": -1, "top": []}


def streamed(text: str, tokenizer: Tokenizer, most: int) -> list[list[Any]]:
    """The text as a server streams it, 1 to `most` tokens an event: the decoder's text, the tokens beside it."""
    drawn = random.Random(text)
    decoder, ids, events = TextDecoder(tokenizer), tokenizer.encode(text), []
    while ids:
        count = drawn.randint(1, most)
        part, ids = ids[:count], ids[count:]
        delta = decoder.push(part) + ("" if ids else decoder.finish())
        events.append([delta, [token(each, tokenizer) for each in part], not ids])
    return events


@pytest.mark.parametrize("kind", ["bytes", "gpt2"])
@pytest.mark.parametrize("most", [1, 4])
def test_every_piece_of_text_has_the_tokens_that_wrote_it(page: Page, kind: str, most: int) -> None:
    """Character for character where each token comes alone; in one event, neighbours may share a piece."""
    tokenizer = Tokenizer.bytes() if kind == "bytes" else Tokenizer.gpt2()
    drawn = random.Random(5)
    texts = ["To be, or not to be", "naïve café", "日本語のテキスト", "🙂🙃 ok 🙂", "a\n\n\tb  c", "\ufffdx\ufffd", "é"]
    texts += ["".join(drawn.choices("ab é€🙂\n", k=drawn.randint(1, 30))) for _ in range(60)]
    streams = [streamed(text, tokenizer, most) for text in texts]
    for text, pieces in zip(texts, page.evaluate(ALIGN, streams), strict=True):
        assert "".join(piece["text"] for piece in pieces) == text
        ids = [each["id"] for piece in pieces for each in piece["tokens"]]
        assert ids == tokenizer.encode(text)
        assert all(piece["tokens"] for piece in pieces)
        for piece in pieces if "\ufffd" not in text else []:
            broken = any("\ufffd" in each["text"] for each in piece["tokens"])
            assert broken or [each["text"] for each in piece["tokens"]] == [piece["text"]]
            wrote = b"".join(tokenizer.token_bytes(each["id"]) for each in piece["tokens"])
            assert most > 1 or wrote.decode() == piece["text"]


def test_held_back_dropped_and_odd_text(page: Page) -> None:
    def event(text: str, words: list[str], *, done: bool = False) -> list[Any]:
        return [text, [{"id": at, "text": word, "logprob": -1, "top": []} for at, word in enumerate(words)], done]

    streams = [
        # "ST" might begin a stop string, then does not
        [event("a", ["a"]), event("", ["S"]), event("", ["T"]), event("STx", ["x"], done=True)],
        # it does: the text ends before it, one token is cut in two
        [event("a", ["a"]), event("", [" S"]), event(" ", ["TOP"], done=True)],
        # a tokenizer that drops the first token's space
        [event("Hello", [" Hello"]), event(" world", [" world"], done=True)],
        # an end-of-text token that writes nothing
        [event("a", ["a"]), event("", [""], done=True)],
        # text of which no token knows, and tokens of which no text comes
        [event("echo", [])],
        [event("", ["lost"], done=True)],
    ]
    got = [
        [(piece["text"], [each["text"] for each in piece["tokens"]]) for piece in pieces]
        for pieces in page.evaluate(ALIGN, streams)
    ]
    assert got == [
        [("a", ["a"]), ("S", ["S"]), ("T", ["T"]), ("x", ["x"])],
        [("a", ["a"]), (" ", [" S", "TOP"])],
        [("Hello", [" Hello"]), (" world", [" world"])],
        [("a", ["a"]), ("", [""])],
        [("echo", [])],
        [("", ["lost"])],
    ]


def test_text_that_matches_no_token_does_not_wait_for_ever(page: Page) -> None:
    odd = [["x", [{"id": 0, "text": "y", "logprob": -1, "top": []}], False] for _ in range(100)]
    [pieces] = page.evaluate(ALIGN, [odd])
    assert len("".join(piece["text"] for piece in pieces)) > 60


def test_shades_and_shares(page: Page) -> None:
    show = """async (shares) => {
      const { percent, probability, shade } = await import("/static/tokens.js");
      const logs = (share) => [{ logprob: share === 0 ? null : Math.log(share) }];
      return shares.map((share) => [shade(share), percent(share), probability(logs(share))]);
    }"""
    shares = [1, 0.9996, 0.9, 0.899, 0.5, 0.1, 0.0996, 0.04, 0.0005, 0]
    shades, words, again = zip(*page.evaluate(show, shares), strict=True)
    assert shades == (0, 0, 0, 1, 2, 5, 5, 6, 6, 6)
    assert words == ("100 %", "> 99.9 %", "90 %", "90 %", "50 %", "10 %", "10 %", "4.0 %", "< 0.1 %", "0 %")
    assert again == pytest.approx(shares)


def test_drawn_seeds_differ_and_fit_53_bits(page: Page) -> None:
    draw = """async () => {
      const { readSeed } = await import("/static/fields.js");
      return Array.from({ length: 200 }, () => readSeed(" "));
    }"""
    seeds = [int(seed) for seed in page.evaluate(draw)]
    assert len(set(seeds)) == 200
    assert 2**50 < max(seeds) < 2**53


def test_a_link_is_a_form_encoded_fragment(page: Page) -> None:
    state = {"prompt": "a&b=c #d\n%20+é🙂", "temperature": "0.5", "weights2": ""}
    there_and_back = """async ([state, weights]) => {
      const { fromFragment, toFragment } = await import("/static/replay.js");
      const fragment = toFragment(new Map(Object.entries(state)), weights);
      const back = fromFragment(fragment);
      return [fragment, Object.fromEntries(back.state), back.weights, fromFragment("#temperature=1")];
    }"""
    fragment, back, weights, nothing = page.evaluate(there_and_back, [state, "sha256:" + "ab" * 32])
    parsed = parse_qs(fragment.removeprefix("#"), keep_blank_values=True)
    assert parsed == {**{name: [value] for name, value in state.items()}, "weights": ["ab" * 8]}
    assert (back, weights, nothing) == (state, "ab" * 8, None)
