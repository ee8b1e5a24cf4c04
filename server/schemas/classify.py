"""The body of POST /classify. Each field's description is also the rule that its error message states."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_TEXTS = 64


class ClassifyRequest(BaseModel):
    """Strict: no coercion, no unknown field. One of `text` and `texts` is given, which the route checks."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    text: str | None = Field(None, description="a string, where there are no texts")
    texts: Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)] | None = Field(
        None, description=f"a list of 1 to {MAX_TEXTS} strings"
    )
    model: str | None = Field(None, max_length=200, description="the name of a served model")
    truncate: bool = Field(
        False, description="true or false; true cuts texts that are longer than the model reads, at their end"
    )
