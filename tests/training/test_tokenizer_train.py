"""`tokenizer train`: what it writes, read by this package, by tokenizers and by transformers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from model.errors import QuillError, TokenizerError
from model.tokenizer import StreamDecoder, Tokenizer
from model.tokenizer.encoders import TiktokenEncoder
from tests.training.conftest import Command, make_text
from tests.training.hindi import SAMPLE, hindi_text
from training.tokenizers.corpus import CorpusRequest
from training.tokenizers.train import Trained, TrainRequest, train_tokenizer

TEXT = SAMPLE + hindi_text(150) + make_text(400) + "\n\tDon't  (x) [y] ##z #tag a1b2 e\u0301 Ａ ﬁ\r\n"
EOT = "<|endoftext|>"
OPTIONS: dict[str, dict[str, Any]] = {
    "bpe": {"kind": "bpe", "vocab_size": 500},
    "bpe-hindi": {"kind": "bpe", "vocab_size": 500, "pretokenizer": "devanagari", "normalize": "nfc"},
    "bpe-lower": {"kind": "bpe", "vocab_size": 450, "pretokenizer": "whitespace", "normalize": "nfkc",
                  "lowercase": True},
    "wordpiece": {"kind": "wordpiece", "vocab_size": 700, "pretokenizer": "devanagari"},
    "wordpiece-nfc": {"kind": "wordpiece", "vocab_size": 600, "normalize": "nfc", "lowercase": True},
    "char": {"kind": "char"},
    "char-nfkc": {"kind": "char", "normalize": "nfkc"},
    "bytes": {"kind": "bytes", "special": ("<|a|>", "<|ab|>")},
    "bpe-special": {"kind": "bpe", "vocab_size": 400, "special": ("<|theme:वर्षा|>", "<user>")},
    "wordpiece-special": {"kind": "wordpiece", "vocab_size": 700, "special": ("<|theme:वर्षा|>",)},
    "char-special": {"kind": "char", "special": ("<|theme:वर्षा|>", "<user>")},
}  # fmt: skip
RUNS_THROUGH = {"bpe": "tiktoken", "wordpiece": "tokenizers", "char": "quill", "bytes": "quill"}


def train(folder: Path, text: str = TEXT, notices: list[str] | None = None, **options: Any) -> Trained:
    source = folder.with_suffix(".txt")
    source.write_bytes(text.encode())
    request = TrainRequest(corpus=CorpusRequest((str(source),)), out=folder, **options)
    return train_tokenizer(request, on_notice=lambda line: None if notices is None else notices.append(line))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Trained]]:
    root = tmp_path_factory.mktemp("trained")
    return {name: (root / name, train(root / name, **options)) for name, options in OPTIONS.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_others_read_it_as_it_was_meant(trained, name: str) -> None:
    folder, result = trained[name]
    tokenizer, oracle = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(folder)
    options = OPTIONS[name]
    assert len(theirs) == tokenizer.vocab_size <= options.get("vocab_size", 1 << 24)
    assert theirs.eos_token == theirs.bos_token == EOT
    assert theirs.eos_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id
    lossless = "NFKC" if options.get("normalize") == "nfkc" else "char"
    expected = "tokenizers" if (lossless, options["kind"]) == ("NFKC", "char") else RUNS_THROUGH[options["kind"]]
    assert result.runs_through == expected
    assert tokenizer.digest == result.tokenizer.digest
    for text in [TEXT, *TEXT.splitlines(keepends=True)[:40]]:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text).ids == theirs.encode(text)
        assert tokenizer.decode(ids) == theirs.decode(ids) == tokenizer.normalize(text)
    assert tokenizer.encode_batch([TEXT, "एक"])[0] == tokenizer.encode(TEXT)
    assert result.characters == len(TEXT)
    assert result.tokens == len(tokenizer.encode(TEXT))


@pytest.mark.parametrize("name", ["bpe", "bpe-hindi", "bpe-lower", "wordpiece", "wordpiece-nfc"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.text(st.sampled_from(sorted(set(TEXT))), max_size=40),
))  # fmt: skip
def test_any_text_has_the_librarys_ids_and_comes_back(trained, name: str, text: str) -> None:
    folder, result = trained[name]
    tokenizer = result.tokenizer
    oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    oracle.encode_special_tokens = True
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text).ids
    decoder = StreamDecoder(tokenizer)
    streamed = "".join(decoder.push([i]) for i in ids) + decoder.finish()
    assert streamed == tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    if tokenizer.unk_token_id not in ids:
        assert streamed == tokenizer.normalize(text)


def test_the_same_text_gives_the_same_files(trained, tmp_path: Path) -> None:
    for name in ("bpe-hindi", "wordpiece", "char"):
        again = tmp_path / name
        train(again, **OPTIONS[name])
        assert (again / "tokenizer.json").read_bytes() == (trained[name][0] / "tokenizer.json").read_bytes()


def test_ascii_merges_are_the_librarys_own(tmp_path: Path) -> None:
    """Text without wide characters is counted as the library's byte-level trainer counts it."""
    text = "".join(each for each in make_text(3_000) if each.isascii())
    tokenizer = train(tmp_path / "bpe", text, kind="bpe", vocab_size=330).tokenizer
    oracle = tokenizers.ByteLevelBPETokenizer()
    oracle.train_from_iterator([text], vocab_size=330, min_frequency=2, special_tokens=[EOT], show_progress=False)
    ours = len(tokenizer.encode(text))
    assert ours == pytest.approx(len(oracle.encode(text).ids), rel=0.01)  # ties are broken by another order


def test_tokens_hold_whole_characters(trained) -> None:
    for name in ("bpe", "bpe-hindi"):
        tokenizer = trained[name][1].tokenizer
        pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode(TEXT)]
        assert "".join(piece.decode() for piece in pieces) == tokenizer.normalize(TEXT)  # each of them decodes alone


def test_devanagari_words_make_longer_tokens_than_gpt2s(tmp_path: Path) -> None:
    notices: list[str] = []
    text = hindi_text(300)
    gpt2 = train(tmp_path / "gpt2", text, notices, kind="bpe", vocab_size=360)
    assert [notice for notice in notices if "--pretokenizer devanagari keeps them together" in notice]
    notices.clear()
    devanagari = train(tmp_path / "devanagari", text, notices, kind="bpe", vocab_size=360, pretokenizer="devanagari")
    assert devanagari.tokens < 0.9 * gpt2.tokens
    assert notices == []


def test_word_pieces_know_the_unknown_and_keep_signs_apart(trained) -> None:
    tokenizer = trained["wordpiece"][1].tokenizer
    oracle = tokenizers.Tokenizer.from_file(str(trained["wordpiece"][0] / "tokenizer.json"))
    assert oracle.encode("किसान 日").tokens[-1] == "[UNK]"
    assert tokenizer.encode("日") == [tokenizer.unk_token_id]
    assert tokenizer.decode(tokenizer.encode("किसान 日।")) == "किसान।"
    assert any(token.startswith("##") for token in oracle.encode("किसानदादी").tokens)
    for text in ("the #tag ##z (x) [y]!", "##", "a ## b", " ##z", "# # #"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.unk_token_id not in tokenizer.encode("[UNK]".replace("UNK", "y"))
    assert tokenizer.special_tokens[EOT] not in tokenizer.encode(EOT)


def test_characters_that_have_no_room_become_unknown(tmp_path: Path) -> None:
    notices: list[str] = []
    wide = "".join(map(chr, range(0x4E00, 0x4E80)))
    tokenizer = train(tmp_path / "few", "aa bb aa " * 50 + wide, notices, kind="wordpiece", vocab_size=60).tokenizer
    assert tokenizer.vocab_size <= 60
    assert "become [UNK]" in notices[0]
    assert tokenizer.unk_token_id not in tokenizer.encode("aa bb")


@pytest.mark.parametrize("name", [name for name in OPTIONS if "special" in OPTIONS[name]])
def test_special_tokens_are_control_tokens(trained, name: str) -> None:
    tokenizer = trained[name][1].tokenizer
    special = (EOT, *OPTIONS[name]["special"])
    assert set(special) <= tokenizer.special_tokens.keys()
    for token in special:
        token_id = tokenizer.special_tokens[token]
        assert tokenizer.encode_template(token) == [token_id]
        assert tokenizer.decode([token_id]) == ""
        if OPTIONS[name]["kind"] in ("bpe", "bytes"):
            assert token_id not in tokenizer.encode(token)
            assert tokenizer.decode(tokenizer.encode(token)) == token
    theirs = AutoTokenizer.from_pretrained(trained[name][0])
    assert theirs.decode([tokenizer.special_tokens[token] for token in special], skip_special_tokens=True) == ""


def test_rows_of_compressed_json_lines_are_read(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl.gz"
    source.write_bytes(gzip.compress("\n".join(json.dumps({"body": line}) for line in TEXT.splitlines()).encode()))
    request = TrainRequest(CorpusRequest((str(source),), text_keys=("body",)), tmp_path / "out", "bpe", 300)
    assert train_tokenizer(request).characters == sum(map(len, TEXT.splitlines()))


def test_a_difference_is_told_and_the_library_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken is made to differ; nothing known does."""
    notices: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(TiktokenEncoder, "encode_batch", lambda self, texts, add_special: [[1, 2, 3] for _ in texts])
        result = train(tmp_path / "bpe", TEXT, notices, kind="bpe", vocab_size=400)
    assert result.runs_through == "tokenizers"
    assert "the tokenizers library runs this vocabulary" in notices[0]
    loaded = Tokenizer.load(tmp_path / "bpe")
    assert loaded.kind == "library"
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert AutoTokenizer.from_pretrained(tmp_path / "bpe").encode(TEXT) == loaded.encode(TEXT)


def test_texts_are_cut_small_and_whole(tmp_path: Path) -> None:
    """A large file does not become one large string; its tokens are those of the whole."""
    text = hindi_text(3_000)
    assert len(text) > 1 << 16
    result = train(tmp_path / "bpe", text, kind="bpe", vocab_size=500, pretokenizer="devanagari")
    assert result.tokens == len(result.tokenizer.encode(text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bpe"}, "--kind bpe needs --vocab-size"),
        ({"kind": "bpe", "vocab_size": 200}, "--vocab-size is 200 but must be at least 257"),
        ({"kind": "char", "vocab_size": 20}, "--vocab-size is 20 but must be at least"),
        ({"kind": "bytes", "vocab_size": 256}, "--vocab-size is 256 but must be at least 257"),
        ({"kind": "wordpiece", "vocab_size": 3}, "--vocab-size is 3 but must be at least 5"),
        ({"kind": "bpe", "vocab_size": 0}, "--vocab-size is 0 but must lie between"),
        ({"kind": "bpe", "vocab_size": 300, "min_frequency": 0}, "--min-frequency is 0 but must lie between"),
        ({"kind": "char", "pretokenizer": "gpt2"}, "--pretokenizer is for --kind bpe and wordpiece"),
        ({"kind": "bytes", "min_frequency": 2}, "--min-frequency is for --kind bpe and wordpiece"),
        ({"kind": "char", "special": ("x",)}, "--special 'x' must be printable text of two characters or more"),
        ({"kind": "char", "special": ("a\nb",)}, "must be printable text"),
        ({"kind": "wordpiece", "vocab_size": 500, "special": ("[UNK]",)}, "is the mark of the unknown"),
        ({"kind": "wordpiece", "vocab_size": 500, "pretokenizer": "devanagari", "special": ("किसान",)},
         "a word of the text reads the same"),
        ({"kind": "bpe", "vocab_size": 500, "special": ("the",)}, "a word of the text reads the same"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_and_nothing_written(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(QuillError, match=message):
        train(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folders_are_replaced_only_when_told_to(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = train(out, kind="char").tokenizer
    with pytest.raises(QuillError, match="holds a tokenizer already; choose another folder or pass --force"):
        train(out, "abc", kind="char")
    assert train(out, "abc", kind="char", force=True).tokenizer.vocab_size == 4 != first.vocab_size
    (out / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(QuillError, match="holds more than a tokenizer"):
        train(out, "abc", kind="char", force=True)
    assert (out / "model.safetensors").read_bytes() == b"weights"


def test_the_command_line(tmp_path: Path, command: Command) -> None:
    (tmp_path / "hindi.txt").write_text(TEXT, encoding="utf-8")
    make = ("tokenizer", "train")
    words = (*make, "--input", tmp_path / "hindi.txt", "--kind", "bpe", "--pretokenizer", "devanagari")
    status, out, err = command(*words, "--vocab-size", 400, "--out", tmp_path / "a", "--special", "<x>", "--json")
    assert (status, err) == (0, "")
    values = json.loads(out)
    assert values["vocab_size"] == 400
    assert values["special_tokens"] == {EOT: 0, "<x>": 1}
    assert values["runs_through"] == "tiktoken"
    status, out, err = command(*words, "--vocab-size", 9000, "--out", tmp_path / "b")
    assert status == 0
    assert "runs through tiktoken, with the ids of tokenizers on the whole text" in out
    assert "notice: the text gives only" in err
    assert command(*words, "--vocab-size", 100, "--out", tmp_path / "c")[::2] == (
        1, "error: --vocab-size is 100 but must be at least 257: 256 bytes and the special tokens\n"
    )  # fmt: skip
    status, out, err = command(*make, "--kind", "bytes", "--out", tmp_path / "d")
    assert (status, err) == (0, "")
    assert command(*make, "--kind", "char", "--out", tmp_path / "e")[::2] == (
        1, "error: --input names no text: give a file, a folder, a URL, hf:OWNER/NAME or a short name\n"
    )  # fmt: skip


def test_a_text_that_does_not_come_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "another text")
    monkeypatch.setattr(Tokenizer, "check_round_trip", lambda self: None)
    with pytest.raises(TokenizerError, match="does not give its text back"):
        train(tmp_path / "out", kind="bpe", vocab_size=300)
    assert not (tmp_path / "out").exists()
