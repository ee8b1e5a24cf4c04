"""`tokenizer analyze` against counts made by hand and by the libraries, and `tokenizer show`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from matplotlib.image import imread
from transformers import AutoTokenizer

from model.errors import QuillError
from model.tokenizer import Tokenizer
from tests.model.tokenizer_samples import train_metaspace, write_tokenizer
from tests.training.conftest import Command
from tests.training.hindi import SAMPLE, hindi_text
from training.errors import RecipeError
from training.tokenizers.analyze import Analysis, analyze
from training.tokenizers.corpus import CorpusRequest
from training.tokenizers.plot import check_plot_path, plot_analyses
from training.tokenizers.show import walk_through
from training.tokenizers.train import TrainRequest, train_tokenizer

TEXT = "The cat, the “cat” and 日本 – the end.\nनदी बहती है।\n"
WORDS = ["The", "cat", "the", "cat", "and", "日本", "the", "end", "नदी", "बहती", "है"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("analyze")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    (root / "hindi.txt").write_text(SAMPLE + hindi_text(200), encoding="utf-8")
    (root / "english.txt").write_text("the cat and the end. " * 30, encoding="utf-8")
    for name, source, kind, size in (
        ("bpe", "hindi.txt", "bpe", 500), ("pieces", "english.txt", "wordpiece", 80),
        ("chars", "english.txt", "char", None),
    ):  # fmt: skip
        corpus = CorpusRequest((str(root / source),))
        pretokenizer: Any = None if kind == "char" else "devanagari"
        train_tokenizer(TrainRequest(corpus, root / name, kind, size, pretokenizer=pretokenizer))  # type: ignore[arg-type]
    return root


def measure(root: Path, *names: str, text: str = "text.txt") -> list[Analysis]:
    return analyze(names, CorpusRequest((str(root / text),)))


def test_counts_are_those_made_by_hand(root: Path) -> None:
    gpt2, by_bytes, char = measure(root, "gpt2", "bytes", "char")
    for row in (gpt2, by_bytes, char):
        assert (row.characters, row.num_bytes, row.words) == (len(TEXT), len(TEXT.encode()), len(TEXT.split()) - 1)
        assert row.unknown_rate == 0
    oracle = tiktoken.Encoding(
        "gpt2", pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=Tokenizer.gpt2()._parts.encoder._bpe.ranks, special_tokens={},  # type: ignore[attr-defined]
    )  # fmt: skip
    assert gpt2.tokens == len(oracle.encode(TEXT))
    assert by_bytes.tokens == len(TEXT.encode())
    assert char.tokens == len(TEXT)
    assert (gpt2.vocab_size, by_bytes.vocab_size, char.vocab_size) == (50_257, 257, len(set(TEXT)) + 1)
    assert gpt2.whole_words == sum(min(len(oracle.encode(word)), len(oracle.encode(" " + word))) == 1 for word in WORDS)
    assert by_bytes.whole_words == char.whole_words == 0
    assert gpt2.tokens_per_word == gpt2.tokens / len(WORDS)
    assert gpt2.characters_per_token == len(TEXT) / gpt2.tokens
    assert gpt2.bytes_per_token == len(TEXT.encode()) / gpt2.tokens


def test_unknown_words_are_counted(root: Path) -> None:
    pieces, chars = measure(root, str(root / "pieces"), str(root / "chars" / "tokenizer.json"))
    unknown = [word for word in WORDS if not set(word) <= set("the cat and end.")]
    assert unknown == ["The", "日本", "नदी", "बहती", "है"]
    assert pieces.unknown_words == chars.unknown_words == len(unknown)
    assert chars.tokens == sum(TEXT.count(each) for each in set("the cat and the end. "))
    theirs = AutoTokenizer.from_pretrained(root / "pieces")
    assert pieces.tokens == len(theirs.encode(TEXT))
    assert pieces.whole_words == sum(
        min(len(theirs.encode(word)), len(theirs.encode(f" {word}"))) == 1 for word in WORDS if word not in unknown
    )


def test_a_tokenizer_is_best_on_its_own_text(root: Path) -> None:
    own, gpt2 = measure(root, str(root / "bpe"), "gpt2", text="hindi.txt")
    assert own.bytes_per_token > 2 * gpt2.bytes_per_token
    assert own.whole_rate > gpt2.whole_rate


@pytest.mark.parametrize(
    ("names", "text", "message"),
    [
        (("gpt3",), "text.txt", "TOKENIZER gpt3: neither gpt2 or bytes nor an existing"),
        (("gpt2",), "none.txt", "none.txt: no such file"),
    ],
)
def test_what_cannot_be_measured_is_refused(root: Path, names: tuple[str, ...], text: str, message: str) -> None:
    with pytest.raises(QuillError, match=message):
        measure(root, *names, text=text)


def test_the_plot_is_a_picture(root: Path, tmp_path: Path) -> None:
    rows = measure(root, "gpt2", "bytes", "char", str(root / "bpe"), str(root / "pieces"))
    path = tmp_path / "plot.png"
    plot_analyses(rows, path)
    picture = imread(path)  # [height, width, RGBA] between 0 and 1
    assert picture.shape[1] > 1000
    bars = (picture[..., :3] * 255).round() == (0x42, 0x69, 0xA5)
    assert bars.all(-1).sum() > 10_000
    with pytest.raises(QuillError, match="must end in"):
        check_plot_path(tmp_path / "plot.txt")
    with pytest.raises(QuillError, match="does not exist"):
        check_plot_path(tmp_path / "none" / "plot.png")


def test_a_plot_that_finds_no_room_is_named(root: Path, tmp_path: Path, full_disk: Path) -> None:
    (tmp_path / "plot.png").symlink_to(full_disk)
    with pytest.raises(RecipeError, match=r"plot\.png cannot be written: No space left"):
        plot_analyses(measure(root, "bytes"), tmp_path / "plot.png")


# Show


def test_pieces_have_the_places_of_the_text(root: Path) -> None:
    text = "नदी का जल <|endoftext|> 日"
    tokenizer = Tokenizer.load(root / "bpe")
    shown = walk_through(tokenizer, text)
    assert [piece.token_id for piece in shown.pieces] == tokenizer.encode_template(text)
    assert b"".join(piece.data for piece in shown.pieces) == text.encode()
    [special] = [piece for piece in shown.pieces if piece.is_special]
    assert (special.text, text[special.start : special.end]) == ("<|endoftext|>", "<|endoftext|>")
    for piece in shown.pieces:
        if "\\x" not in piece.text:
            assert piece.text == text[piece.start : piece.end]
    last = shown.pieces[-1]
    assert (last.start, last.end) == (len(text) - 1, len(text))
    assert last.literal == "b'\\xa5'"
    assert shown.round_trip
    plain = walk_through(tokenizer, text, read_special=False)
    assert not any(piece.is_special for piece in plain.pieces)
    assert plain.decoded == text


def test_what_is_lost_is_told(root: Path) -> None:
    shown = walk_through(Tokenizer.load(root / "pieces"), "the 日 end")
    assert [piece.text for piece in shown.pieces if piece.is_special] == ["[UNK]"]
    assert not shown.round_trip
    assert shown.decoded == "the end"


def test_any_tokenizer_file_can_be_shown(tmp_path: Path) -> None:
    oracle = train_metaspace()
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, oracle))
    encoding: tokenizers.Encoding = oracle.encode("the king's men")
    shown = walk_through(tokenizer, "the king's men")
    assert [(piece.token_id, piece.spelling, (piece.start, piece.end)) for piece in shown.pieces] == list(
        zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
    )
    assert shown.round_trip


def test_the_command_lines(root: Path, command: Command) -> None:
    call = partial(command, "tokenizer")
    table = ("analyze", "gpt2", root / "bpe", "--input", root / "hindi.txt", "--plot", root / "plot.svg")
    status, out, err = call(*table)
    assert (status, err) == (0, "")
    assert out.splitlines()[1].split() == [
        "tokenizer", "vocabulary", "tokens", "tokens/word", "chars/token", "bytes/token", "unknown", "whole"
    ]  # fmt: skip
    assert (root / "plot.svg").read_text(encoding="utf-8").startswith("<?xml")
    values = json.loads(call(*table[:-2], "--json")[1])
    assert [row["tokenizer"] for row in values["tokenizers"]] == ["gpt2", str(root / "bpe")]
    assert values["tokenizers"][1]["tokens_per_word"] < values["tokenizers"][0]["tokens_per_word"]
    assert call("analyze", "gpt2")[::2] == (
        1, "error: --input names no text: give a file, a folder, a URL, hf:OWNER/NAME or a short name\n"
    )  # fmt: skip

    status, out, err = call("show", "bytes", "Hi न")
    assert (status, err) == (0, "")
    assert "b'\\xe0'" in out
    assert out.splitlines()[-1] == "round trip: ok"
    values = json.loads(call("show", "gpt2", "Hi<|endoftext|>", "--json")[1])
    assert [(piece["id"], piece["special"]) for piece in values["pieces"]] == [(17_250, False), (50_256, True)]
    values = json.loads(call("show", "bytes", "Hi<|endoftext|>", "--as-text", "--json")[1])
    assert 256 not in [piece["id"] for piece in values["pieces"]]
    assert values["round_trip"] is values["exact"] is True
    assert "not ok, the tokens decode to ''" in call("show", root / "pieces", "日 日")[1]
