"""Text and tokens as clients see them: ids of a field's text, texts of tokens, their places."""

from __future__ import annotations

import msgspec

from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from server.errors import InvalidRequestError
from server.prompts import off_loop


class PlacedToken(msgspec.Struct):
    """A token in TGI's shape: its bytes lie between `start` and `stop` of the UTF-8 text."""

    id: int
    text: str
    start: int
    stop: int


async def encode_text(text: str, field: str, tokenizer: Tokenizer, *, add_special: bool = True) -> list[int]:
    """The ids. Raises InvalidRequestError, naming the field, for what the tokenizer cannot express."""
    try:
        return await off_loop(len(text), lambda: tokenizer.encode(text, add_special=add_special))
    except TokenizerError:
        message = f"{field} holds characters that this model's tokenizer does not know"
        raise InvalidRequestError(message, param=field) from None


def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    """One token by itself; bytes that are no whole character become U+FFFD."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def place_tokens(text: bytes, ids: list[int], tokenizer: Tokenizer) -> list[PlacedToken]:
    """Where each token lies in the text. A special token that was added lies nowhere; under a tokenizer that
    changes the text none has a place, and like TGI we then give ids alone."""
    special = set(tokenizer.special_tokens.values())
    pieces = [b"" if token_id in special else tokenizer.token_bytes(token_id) for token_id in ids]
    if b"".join(pieces) != text:
        return [PlacedToken(token_id, "", 0, 0) for token_id in ids]
    tokens, start = [], 0
    for token_id, piece in zip(ids, pieces, strict=True):
        stop = start + len(piece)
        tokens.append(PlacedToken(token_id, piece.decode("utf-8", "replace"), start, stop))
        start = stop
    return tokens
