"""The body of POST /generate. Each field's description is also the rule that its error message states."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from model.grammar import GrammarType
from model.sampling_params import MAX_LOGPROBS
from server.schemas.sampling import MAX_TOKEN_ID, SamplingFields, TokenId


class _PromptFields(BaseModel):
    prompt: str | Annotated[list[TokenId], Field(min_length=1)] = Field(
        description="a string or a non-empty list of token ids"
    )
    max_tokens: int | None = Field(
        128, ge=1, le=MAX_TOKEN_ID, description="an integer of at least 1, or null for the rest of the context"
    )


class GrammarFields(BaseModel):
    """The language that a text has to be of."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: GrammarType = Field(description="regex, json_schema, choice or lark")
    value: Any = Field(description="a pattern, a JSON schema, a list of strings or the text of a Lark grammar")


# pydantic lists the fields of the last base first: the prompt belongs at the top.
class GenerateRequest(SamplingFields, _PromptFields):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"an integer from 0 to {MAX_LOGPROBS}, or null"
    )
    echo: bool = Field(False, description="true or false")
    grammar: GrammarFields | None = Field(None, description='an object, {"type": …, "value": …}, or null')
