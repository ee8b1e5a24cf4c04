"""The body of POST /score. Each field's description is also the rule that its error message states."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from server.schemas.sampling import TokenId

MAX_TEXTS = 256


class ScoreRequest(BaseModel):
    """Strict: no coercion, no unknown field."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    texts: Annotated[list[str | list[TokenId]], Field(min_length=1, max_length=MAX_TEXTS)] = Field(
        description=f"a list of 1 to {MAX_TEXTS} texts, each a string or a list of token ids",
        examples=[["ROMEO: But soft, what light through yonder window breaks?"]],
    )
    model: str | None = Field(None, max_length=200, description="the name of a served model")
    stride: int | None = Field(
        None,
        ge=1,
        description="an integer from 1 to the model's context, or null for the context: a longer text is read in"
        " windows that begin so far apart",
    )
    return_tokens: bool = Field(False, description="true or false; true gives each token's id and text as well")
