"""The bodies of POST /tokenize and POST /detokenize. Each field's description is also its error's rule."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from server.schemas.sampling import TokenId

MAX_CHARACTERS = MAX_TOKENS = 2**18
"""Far beyond any context, and little enough that answers, many times as large as their bodies, do not fill memory."""


class TokenizeRequest(BaseModel):
    """Strict: no coercion, no unknown field. One of `text` and `prompt` is given, which the route checks."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    text: str | None = Field(
        None, max_length=MAX_CHARACTERS, description=f"a string of up to {MAX_CHARACTERS} characters"
    )
    prompt: str | None = Field(
        None, max_length=MAX_CHARACTERS, description=f"a string of up to {MAX_CHARACTERS} characters: the text"
    )
    model: str | None = Field(None, max_length=200, description="the name of a served model")
    add_special_tokens: bool = Field(
        True, description="true or false; true adds what the tokenizer puts around a text, such as BOS"
    )
    return_token_strs: bool = Field(False, description="true or false; true gives each token's text as well")


class DetokenizeRequest(BaseModel):
    """Strict: no coercion, no unknown field."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    tokens: list[TokenId] = Field(max_length=MAX_TOKENS, description=f"a list of up to {MAX_TOKENS} token ids")
    model: str | None = Field(None, max_length=200, description="the name of a served model")
