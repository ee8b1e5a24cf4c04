"""Tokenizer against tiktoken, tokenizers and transformers."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from model.tokenizer.byte_bpe import BYTE_ALPHABET, read_spelling, spell_bytes, split_pair
from tests.model.tokenizer_samples import (
    CORPUS,
    make_word_level,
    train_byte_bpe,
    train_byte_fallback,
    train_metaspace,
    train_regex_byte_bpe,
    train_word_piece,
    write_tokenizer,
)

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    Tokenizer.gpt2().save(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2_oracle(gpt2_folder):
    return tokenizers.Tokenizer.from_file(str(gpt2_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_bpe_document():
    return json.loads(train_byte_bpe().to_str())


def test_gpt2_ids_are_openais():
    tokenizer = Tokenizer.gpt2()
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    assert tokenizer.encode("") == []
    assert tokenizer.vocab_size == 50_257
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 50_256
    assert tokenizer.token_bytes(995) == b" world"


def test_the_ranks_come_with_their_licence():
    notice = Path(sys.modules[Tokenizer.__module__].__file__).parents[1] / "data" / "gpt2.tiktoken.LICENSE"
    assert "openai-whisper" in notice.read_text()
    assert "Copyright (c) 2022 OpenAI" in notice.read_text()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT)
def test_gpt2_round_trips_and_agrees_with_its_tokenizer_json(gpt2_oracle, text):
    tokenizer = Tokenizer.gpt2()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    if EOT not in text:
        assert ids == gpt2_oracle.encode(text).ids


@pytest.mark.parametrize(
    "make",
    [Tokenizer.gpt2, Tokenizer.bytes, lambda: Tokenizer.characters("".join(CORPUS) + "\r\x00\u0301")],
    ids=["gpt2", "bytes", "characters"],
)
def test_transformers_reads_what_we_save(make, tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.eos_token_id
    assert theirs.bos_token_id == tokenizer.bos_token_id
    for text in [*CORPUS, " ".join(CORPUS), "\r\n \n\n\t ", "e\u0301\x00 .", " n't , ."]:
        if tokenizer.kind == "characters" and not set(text) <= {*"".join(CORPUS), *"\r\x00\u0301"}:
            continue
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text == tokenizer.decode(ids)
    assert theirs.decode([tokenizer.eos_token_id]) == EOT


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_transformers_reads_it_beside_a_model_config(model_type, tmp_path):
    tokenizer = Tokenizer.characters("".join(CORPUS))
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.encode(line) for line in CORPUS] == tokenizer.encode_batch(CORPUS)


@pytest.mark.parametrize(
    "make",
    [
        Tokenizer.gpt2,
        Tokenizer.bytes,
        lambda: Tokenizer.characters("hello world"),
        lambda: Tokenizer.characters("abc", end_of_text=False),
    ],
)
def test_a_saved_tokenizer_loads_as_itself(make, tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.kind, loaded.vocab_size, loaded.digest) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.digest)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert loaded.special_tokens == tokenizer.special_tokens


def test_files_read_are_saved_unchanged(tmp_path):
    source, copied = tmp_path / "source", tmp_path / "copied"
    source.mkdir()
    copied.mkdir()
    write_tokenizer(source, train_word_piece(), {"eos_token": "[SEP]", "extra": 1})
    (source / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.load(source).save(copied)
    for path in source.iterdir():
        assert (copied / path.name).read_bytes() == path.read_bytes()


def test_digests_tell_tokenizers_apart(tmp_path):
    tokenizers_here = [
        Tokenizer.gpt2(),
        Tokenizer.bytes(),
        Tokenizer.characters("abc"),
        Tokenizer.characters("abd"),
        Tokenizer.characters("abc", end_of_text=False),
        *(Tokenizer.load(write_tokenizer(tmp_path, train())) for train in (train_byte_bpe, train_word_piece)),
    ]
    digests = {tokenizer.digest for tokenizer in tokenizers_here}
    assert len(digests) == len(tokenizers_here)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


# Special tokens


@pytest.mark.parametrize("make", [Tokenizer.gpt2, Tokenizer.bytes, lambda: Tokenizer.characters("a" + EOT)])
def test_special_tokens_in_user_text_are_text(make):
    tokenizer = make()
    eot = tokenizer.eos_token_id
    text = f"a{EOT}{EOT}a"
    assert eot not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_template(text) == [*tokenizer.encode("a"), eot, eot, *tokenizer.encode("a")]
    assert tokenizer.decode([eot, *tokenizer.encode("a"), eot]) == "a"
    assert tokenizer.token_bytes(eot) == EOT.encode()


def test_special_tokens_in_user_text_are_text_to_the_library_too(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, train_regex_byte_bpe()))
    assert tokenizer.kind == "library"
    ids = tokenizer.encode(f"art {EOT} thou", add_special=False)
    assert 0 not in ids
    assert tokenizer.decode(ids) == f"art {EOT} thou"
    assert tokenizer.encode_template(f"{EOT}art")[0] == 0
    assert 0 not in tokenizer.encode(EOT, add_special=False)  # the template's copy has not changed this one


def test_the_post_processor_adds_bos_unless_told_not_to(tmp_path):
    oracle = train_byte_fallback()
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, oracle))
    bare = oracle.encode("the king", add_special_tokens=False).ids
    assert tokenizer.encode("the king") == [1, *bare] == oracle.encode("the king").ids
    assert tokenizer.encode("the king", add_special=False) == bare
    assert tokenizer.encode_batch(["the king"] * 2) == [[1, *bare]] * 2
    assert tokenizer.encode_batch(["the king"], add_special=False) == [bare]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)  # by their customary names


@pytest.mark.parametrize("eos", ["[SEP]", {"content": "[SEP]", "lstrip": False}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_companion_files_name_the_special_tokens(eos, file, tmp_path):
    write_tokenizer(tmp_path, train_word_piece())
    (tmp_path / file).write_text(json.dumps({"eos_token": eos}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 1)


def test_a_named_token_is_special_though_the_file_does_not_mark_it(tmp_path):
    oracle = make_word_level()
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, oracle, {"eos_token": "king's", "bos_token": "absent"}))
    eos = oracle.token_to_id("king's")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, eos)
    assert tokenizer.decode(oracle.encode("The king's men").ids) == "The men"


def test_added_tokens_that_are_not_special_are_text(tmp_path):
    oracle = train_regex_byte_bpe()
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, oracle))
    ids = tokenizer.encode("do <tool call> now", add_special=False)
    assert oracle.token_to_id("<tool call>") in ids
    assert tokenizer.decode(ids) == "do <tool call> now"


# Byte-level BPE through tiktoken


def test_the_byte_alphabet_is_the_librarys():
    assert set(BYTE_ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in CORPUS:
        assert splitter.pre_tokenize_str(text)[0][0] == spell_bytes(text.encode())
    assert read_spelling(spell_bytes(bytes(range(256)))) == bytes(range(256))
    assert read_spelling("a b") is read_spelling("日") is None


def test_merges_rebuilt_from_ranks_are_the_trainers(byte_bpe_document):
    model = byte_bpe_document["model"]
    ranks = {read_spelling(spelling): i for spelling, i in model["vocab"].items() if spelling != EOT}
    merges = [split_pair(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    assert [list(map(spell_bytes, pair)) for pair in merges] == model["merges"]


def test_a_trained_byte_bpe_runs_through_tiktoken(byte_bpe_document, tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, byte_bpe_document))
    oracle = tokenizers.Tokenizer.from_str(json.dumps(byte_bpe_document))
    assert tokenizer.kind == "byte_bpe"
    assert isinstance(tokenizer._parts.encoder._encoding, tiktoken.Encoding)
    for text in [*CORPUS, *(f"{left}{right}" for left in CORPUS for right in CORPUS)]:
        assert tokenizer.encode(text) == oracle.encode(text).ids
    assert tokenizer.eos_token_id == 0


@st.composite
def merge_lists(draw):
    """Any list of merges over a few letters, sensible or not."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(1, 8))):
        pair = [draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))]
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
            merges.append(pair)
    return merges


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(merges=merge_lists(), texts=st.lists(st.text("abc", min_size=1, max_size=12), min_size=5, max_size=20))
def test_whatever_the_merges_the_ids_are_the_librarys(merges, texts, byte_bpe_document, tmp_path):
    document = copy.deepcopy(byte_bpe_document)
    vocab = {character: i for i, character in enumerate(BYTE_ALPHABET)}
    document["added_tokens"][0]["id"] = 256
    vocab |= {"".join(pair): 257 + i for i, pair in enumerate(merges)}
    document["model"] |= {"vocab": vocab, "merges": merges}
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, document))
    oracle = tokenizers.Tokenizer.from_str(json.dumps(document))
    for text in texts:
        assert tokenizer.encode(text) == oracle.encode(text).ids


def test_a_merge_that_tiktoken_would_add_is_noticed(byte_bpe_document, tmp_path):
    """`abc` is listed as ab+c, but bc merges first; tiktoken alone would join a+bc, which the file does not allow."""
    document = copy.deepcopy(byte_bpe_document)
    vocab = {character: i for i, character in enumerate(BYTE_ALPHABET)} | {"bc": 257, "ab": 258, "abc": 259}
    document["added_tokens"][0]["id"] = 256
    document["model"] |= {"vocab": vocab, "merges": [["b", "c"], ["a", "b"], ["ab", "c"]]}
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, document))
    assert tokenizer.kind == "library"
    assert tokenizer.encode("abc") == [vocab["a"], vocab["bc"]]


def replaced(document, path, value):
    document = copy.deepcopy(document)
    *parents, last = path
    target = document
    for key in parents:
        target = target[key]
    target[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("pre_tokenizer", "add_prefix_space"), True),
        (("pre_tokenizer", "use_regex"), False),
        (("normalizer",), {"type": "StripAccents"}),
        (("normalizer",), {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "StripAccents"}]}),
        (("added_tokens", 0, "special"), False),
        (("added_tokens", 0, "rstrip"), True),
        (("model", "unk_token"), EOT),
        (("model", "byte_fallback"), True),
        (("model", "ignore_merges"), True),
        (("post_processor",), {"type": "BertProcessing", "sep": [EOT, 0], "cls": [EOT, 0]}),
    ],
)
def test_a_file_that_may_differ_from_gpt2s_kind_runs_through_the_library(path, value, byte_bpe_document, tmp_path):
    document = replaced(byte_bpe_document, path, value)
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, document))
    assert tokenizer.kind == "library"
    oracle = tokenizers.Tokenizer.from_str(json.dumps(document))
    assert [tokenizer.encode(line) for line in CORPUS] == [encoding.ids for encoding in oracle.encode_batch(CORPUS)]


@pytest.mark.parametrize("train", [train_byte_bpe, train_metaspace])
def test_truncation_and_padding_of_the_file_lose_no_text(train, tmp_path):
    oracle = train()
    whole = [encoding.ids for encoding in oracle.encode_batch(CORPUS)]
    oracle.enable_truncation(5)
    oracle.enable_padding(length=200)
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, oracle))
    assert [tokenizer.encode(line) for line in CORPUS] == tokenizer.encode_batch(CORPUS) == whole


# Refusals


def test_an_unknown_character_is_named():
    tokenizer = Tokenizer.characters("hello")
    with pytest.raises(TokenizerError, match=r"U\+1F642"):
        tokenizer.encode("hello🙂")
    with pytest.raises(TokenizerError, match=r"U\+0020"):
        tokenizer.encode_batch(["hello", "o l"])


@pytest.mark.parametrize("chars", [[], ["ab"], ["a", "\ud800"], [""]])
def test_characters_must_be_characters(chars):
    with pytest.raises(TokenizerError, match="chars must hold"):
        Tokenizer.characters(chars)


@pytest.mark.parametrize("method", ["encode", "encode_template", "encode_batch"])
@pytest.mark.parametrize("name", ["gpt2", "bytes", "metaspace"])
def test_a_lone_surrogate_is_refused(method, name, tmp_path):
    made = {"gpt2": Tokenizer.gpt2, "bytes": Tokenizer.bytes}
    tokenizer = made[name]() if name in made else Tokenizer.load(write_tokenizer(tmp_path, train_metaspace()))
    text = "a\ud800b"
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D800"):
        getattr(tokenizer, method)([text] if method == "encode_batch" else text)


@pytest.mark.parametrize("bad_id", [-1, 50_257, 50_303, 2**63])
def test_decoding_an_id_that_is_no_token_is_refused(bad_id):
    with pytest.raises(TokenizerError, match=f"token id {bad_id} is not in"):
        Tokenizer.gpt2().decode([995, bad_id])
    assert Tokenizer.gpt2().token_bytes(bad_id) == b""  # padded ids of a model's output have no bytes


def test_text_that_the_vocabulary_cannot_express_is_refused(tmp_path):
    oracle = tokenizers.Tokenizer(models.WordLevel({"a": 0}, "absent"))
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, oracle))
    assert tokenizer.encode("a") == [0]
    for encode in (tokenizer.encode, tokenizer.encode_template, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot encode this text"):
            encode("b")


DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("", "not valid JSON"),
        ('{"model": {"type": "BPE"', "not valid JSON"),
        ("\xff\xfe{}", "not valid JSON"),
        (DEEP, "not valid JSON"),
        ('{"model": ' + DEEP + "}", "not valid JSON"),
        ('{"a": ' + "9" * 5_000 + "}", "not valid JSON"),
        ("[1, 2]", "must hold a JSON object"),
        ("null", "must hold a JSON object"),
        ("{}", "not a tokenizer"),
        ('{"version": "1.0", "model": {}}', "not a tokenizer"),
        ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "not a tokenizer"),
        ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "z"]]}}', "not a tokenizer"),
        ('{"added_tokens": 3}', "added_tokens must be a list"),
        ('{"added_tokens": [{"id": "x", "content": "y"}]}', "needs content and id"),
        ('{"added_tokens": [7]}', "needs content and id"),
    ],
)
def test_a_malformed_file_is_refused_by_name(content, rule, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(TokenizerError, match=rule) as caught:
        Tokenizer.load(tmp_path)
    message = str(caught.value)
    assert message.startswith("tokenizer.json")
    assert str(tmp_path.parent) not in message
    assert len(message) < 200


def test_absent_files_and_broken_companions_are_refused_by_name(tmp_path):
    with pytest.raises(TokenizerError, match=r"^tokenizer\.json does not exist in "):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match=r"^tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").rmdir()
    write_tokenizer(tmp_path, train_word_piece())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"^tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(tmp_path)


def test_ids_outside_the_vocabulary_are_noticed_at_load(tmp_path):
    processor = {"type": "BertProcessing", "sep": ["[SEP]", 9_999], "cls": ["[CLS]", 9_998]}
    document = json.loads(train_word_piece().to_str()) | {"post_processor": processor}
    with pytest.raises(TokenizerError, match=r"tokenizer\.json gives ids that its vocabulary lacks"):
        Tokenizer.load(write_tokenizer(tmp_path, document))


def test_a_prefix_that_would_make_the_library_end_the_process_is_refused(byte_bpe_document, tmp_path):
    document = replaced(byte_bpe_document, ("model", "continuing_subword_prefix"), "x")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: merges do not fit continuing_subword_prefix"):
        Tokenizer.load(write_tokenizer(tmp_path, document))


def test_subwords_with_a_prefix_run(tmp_path):
    oracle = tokenizers.Tokenizer(models.BPE(continuing_subword_prefix="##", unk_token="?"))
    oracle.pre_tokenizer = pre_tokenizers.Whitespace()
    oracle.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=200, continuing_subword_prefix="##", show_progress=False)
    )
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, oracle))
    assert any(token.startswith("##") for token in oracle.encode(CORPUS[0]).tokens)
    assert tokenizer.encode(CORPUS[0]) == oracle.encode(CORPUS[0]).ids


def all_paths(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(children)[:12]:
        yield from all_paths(child, (*path, key))


JUNK = [None, True, -1, 0, 3, 2**40, 1.5, "", "x", "▁", [], [1], ["a", "b"], {}, {"type": "x"}]


@pytest.mark.parametrize("train", [train_byte_bpe, train_byte_fallback, train_word_piece])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_runs(train, data, tmp_path):
    document = json.loads(train().to_str()) if train not in _DOCUMENTS else _DOCUMENTS[train]
    _DOCUMENTS[train] = document
    path = data.draw(st.sampled_from([path for path in all_paths(document) if path]))
    write_tokenizer(tmp_path, replaced(document, path, data.draw(st.sampled_from(JUNK))))
    try:
        tokenizer = Tokenizer.load(tmp_path)
        ids = tokenizer.encode("the king's men")
    except TokenizerError as problem:
        message = str(problem)
    else:
        assert isinstance(tokenizer.decode(ids), str)
        assert {type(tokenizer.token_bytes(i)) for i in range(300)} == {bytes}
        message = "tokenizer.json was usable"
    assert message.startswith("tokenizer.json")


_DOCUMENTS: dict[object, object] = {}


# Cost


def test_simple_tokenizers_need_no_library(tmp_path):
    Tokenizer.characters("abc").save(tmp_path)
    program = (
        "import sys; from pathlib import Path; from model.tokenizer import StreamDecoder, Tokenizer\n"
        "tokenizer = Tokenizer.load(Path(sys.argv[1])); assert tokenizer.encode('abc') == [0, 1, 2]\n"
        "heavy = {'torch', 'tiktoken', 'tokenizers', 'transformers'} & sys.modules.keys(); assert not heavy, heavy"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=root, timeout=60)


def test_a_tokenizer_may_be_shared_between_threads(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, train_regex_byte_bpe()))
    plain, template = tokenizer.encode(EOT), tokenizer.encode_template(EOT)
    with ThreadPoolExecutor(4) as pool:
        plains = pool.map(tokenizer.encode, [EOT] * 200)
        templates = pool.map(tokenizer.encode_template, [EOT] * 200)
    assert all(ids == plain for ids in plains)
    assert all(ids == template for ids in templates)
    assert plain != template


def test_a_lossy_normalizer_is_no_fault(tmp_path):
    oracle = train_word_piece()
    oracle.normalizer = normalizers.Lowercase()
    assert Tokenizer.load(write_tokenizer(tmp_path, oracle)).decode(oracle.encode("The KING").ids) == "the king"
