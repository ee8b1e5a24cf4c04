"""A field's text as token ids, off the event loop where it is long."""

from __future__ import annotations

from model.errors import TokenizerError
from model.tokenizer import Tokenizer
from server.errors import InvalidRequestError
from server.prompts import off_loop


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
