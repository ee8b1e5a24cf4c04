"""Small tokenizers of every family, made with the `tokenizers` library, which is also the oracle for their text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The king's men said they'd go; we won't, don't you see? I'm not, it's 42 or 1234 things!",
    "Wherefore art thou? O, speak again, bright angel! (quoth he) -- and so the tale goes on...",
    "नमस्ते दुनिया, यह एक परीक्षा है। नमस्ते फिर से दुनिया।",
    "日本語のテキストと中文文本。 naïve café Ünïcödé ½ ² ∑",
    "👩‍🚀 🙂🙂 🇮🇳 👍🏽 emoji 🙂 again 👩‍🚀",
    "  leading and   inner    spaces\tand\ttabs\n\nnew lines \n",
]


def train_byte_bpe(vocab_size: int = 600) -> Tokenizer:
    """GPT-2's kind: byte-level BPE with `<|endoftext|>` as id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def train_regex_byte_bpe() -> Tokenizer:
    """Llama 3's kind: byte-level BPE after a regular expression of its own, BOS added, a tool token that is text."""
    tokenizer = train_byte_bpe(500)
    pattern = Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


def train_word_piece() -> Tokenizer:
    """BERT's kind, with its clean-up of spaces before punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def train_metaspace() -> Tokenizer:
    """SentencePiece's kind as T5 has it: a visible mark for spaces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def train_byte_fallback() -> Tokenizer:
    """Llama 2's kind: marks for spaces, byte tokens for what the vocabulary lacks, one leading space stripped."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    trained.train_from_iterator([line for line in CORPUS if line.isascii()], trainer)
    document = json.loads(trained.to_str())
    document["added_tokens"] = document["added_tokens"][:3]  # the byte tokens are ordinary ones
    document["model"] |= {"byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def train_word_end() -> Tokenizer:
    """GPT-1's kind: lower-cased words that end in a mark."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def make_word_level() -> Tokenizer:
    """Whole words and no decoder, which joins them with spaces."""
    words = sorted({word for line in CORPUS for word in line.split()})
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {word: i + 1 for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def train_unusual() -> Tokenizer:
    """A decoder that only the library can run: a regular expression over each token."""
    tokenizer = train_metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.Replace(Regex("[0-9]"), "#")])
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte_bpe": train_byte_bpe,
    "regex_byte_bpe": train_regex_byte_bpe,
    "word_piece": train_word_piece,
    "metaspace": train_metaspace,
    "byte_fallback": train_byte_fallback,
    "word_end": train_word_end,
    "word_level": make_word_level,
    "unusual": train_unusual,
}


def write_tokenizer(folder: Path, document: Any, config: dict[str, object] | None = None) -> Path:
    """Write a tokenizer (an oracle's, or a plain JSON value) as tokenizer.json, and return the folder."""
    text = document.to_str() if isinstance(document, Tokenizer) else json.dumps(document)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
