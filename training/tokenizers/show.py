"""What a tokenizer does to a text, piece by piece.

    python -m training tokenizer show gpt2 "Hello, नमस्ते"

Free of torch.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from model.errors import TokenizerError
from model.file_errors import naming_file
from model.tokenizer import Tokenizer
from model.tokenizer.files import TOKENIZER_FILE


@dataclass(frozen=True, slots=True)
class ShownPiece:
    """One token. `data` is what it adds to the text, and `spelling` how the vocabulary writes it. `start` and `end`
    count characters of the text as it was typed: of a character that several tokens share, each covers all."""

    token_id: int
    data: bytes
    spelling: str
    start: int
    end: int
    is_special: bool

    @property
    def text(self) -> str:
        """The bytes as text; bytes that are no character alone are written as \\xNN."""
        return self.data.decode("utf-8", "backslashreplace")

    @property
    def literal(self) -> str:
        """The text between quotes, or b'…' for bytes that are no text alone."""
        try:
            return repr(self.data.decode())
        except UnicodeDecodeError:
            return repr(self.data)


@dataclass(frozen=True, slots=True)
class Walkthrough:
    """`plain` is the text without special tokens, which decoding leaves out, `normalized` what the pieces stand for,
    `decoded` what they give back."""

    text: str
    plain: str
    normalized: str
    decoded: str
    pieces: tuple[ShownPiece, ...]

    @property
    def round_trip(self) -> bool:
        return self.decoded == self.normalized


def walk_through(tokenizer: Tokenizer, text: str, *, read_special: bool = True) -> Walkthrough:
    """`read_special`: special tokens written in the text become their ids, as in a chat template; else they are text,
    as in what a user sends.

    Raises TokenizerError for text that the vocabulary cannot express.
    """
    import tokenizers

    ids = tokenizer.encode_template(text) if read_special else tokenizer.encode(text, add_special=False)
    with tempfile.TemporaryDirectory(prefix="quill-tokenizer-") as folder:
        with naming_file(folder, "written"):
            tokenizer.save(Path(folder))
        library = tokenizers.Tokenizer.from_file(str(Path(folder) / TOKENIZER_FILE))
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = not read_special
    encoding = library.encode(text, add_special_tokens=False)
    if encoding.ids != ids:  # only the library knows the places
        raise TokenizerError("tiktoken and tokenizers read this text differently; report it with the tokenizer's files")
    special_ids = set(tokenizer.special_tokens.values())
    pieces = tuple(
        ShownPiece(i, tokenizer.token_bytes(i), spelling, start, end, i in special_ids)
        for i, spelling, (start, end) in zip(ids, encoding.tokens, encoding.offsets, strict=True)
    )
    parts = _plain_parts(tokenizer, text) if read_special else [text]
    normalized = "".join(map(tokenizer.normalize, parts))
    return Walkthrough(text, "".join(parts), normalized, tokenizer.decode(ids), pieces)


def _plain_parts(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text between its special tokens."""
    longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
    return re.split("|".join(map(re.escape, longest_first)), text) if longest_first else [text]
