"""The body of POST /explain: that of POST /generate, of which one choice is taken apart."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from server.schemas.native import GenerateRequest
from server.schemas.sampling import MAX_TOKEN_ID, TokenId

MAX_EXPLAINED = 64
DEFAULT_ALTERNATIVES = 5


class ExplainRequest(GenerateRequest):
    """Unknown fields are refused. `logprobs` is how many alternatives to tell of."""

    model_config = ConfigDict(extra="forbid")

    tokens: Annotated[list[TokenId], Field(min_length=1)] | None = Field(
        None, description="a non-empty list of token ids that were generated, or null to generate them"
    )
    start: int = Field(0, ge=0, le=MAX_TOKEN_ID, description="the index of the first generated token to explain")
    count: int = Field(MAX_EXPLAINED, ge=1, le=MAX_EXPLAINED, description=f"an integer from 1 to {MAX_EXPLAINED}")
    n: Literal[1] = Field(1, description="1: one choice is explained at a time")
    stream: Literal[False] = Field(False, description="false: explanations come as one answer")
    grammar: None = Field(None, description="null: what a grammar allows is not explained")
    echo: Literal[False] = Field(False, description="false: the answer has no text of the prompt's")
