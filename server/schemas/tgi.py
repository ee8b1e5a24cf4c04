"""The bodies of Text Generation Inference, whose clients are served too.

Names, bounds and defaults are those of TGI's last release, but that unknown fields are refused, and that some upper
bounds are Quill's. Each field's description is also the rule that its error message states.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from model.sampling_params import MAX_LOGPROBS, MAX_SEED
from server.schemas.sampling import MAX_CHOICES, MAX_STOP_LENGTH, MAX_STOPS, MAX_TOKEN_ID, Stop
from server.schemas.tokenize import MAX_CHARACTERS

_YES_NO = "true, false or null"


class TgiParameters(BaseModel):
    """Every field may be null, which leaves it at its default."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description=f"an integer from 1 to {MAX_CHOICES}, or null")
    temperature: float | None = Field(None, gt=0, le=2, description="a number above 0 and up to 2, or null")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="a number above 0 and up to 10, or null")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="a number from -2 to 2, or null")
    top_k: int | None = Field(None, ge=1, le=MAX_TOKEN_ID, description="an integer of at least 1, or null")
    top_p: float | None = Field(None, gt=0, lt=1, description="a number between 0 and 1, without these, or null")
    typical_p: float | None = Field(None, gt=0, lt=1, description="a number between 0 and 1, without these, or null")
    do_sample: bool | None = Field(None, description=_YES_NO)
    max_new_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKEN_ID, description="an integer of at least 1, or null for the rest of the context"
    )
    return_full_text: bool | None = Field(None, description=_YES_NO)
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = Field(
        None, description=f"a list of up to {MAX_STOPS} strings, each of 1 to {MAX_STOP_LENGTH} characters, or null"
    )
    truncate: int | None = Field(None, ge=1, le=MAX_TOKEN_ID, description="an integer of at least 1, or null")
    watermark: bool | None = Field(None, description=_YES_NO)
    details: bool | None = Field(None, description=_YES_NO)
    decoder_input_details: bool | None = Field(None, description=_YES_NO)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="an integer from 0 to 2^63 - 1, or null")
    top_n_tokens: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"an integer from 0 to {MAX_LOGPROBS}, or null"
    )
    grammar: dict[str, Any] | None = Field(None, description="an object with type and value, or null")
    adapter_id: str | None = Field(None, description="a string or null")


class TgiRequest(BaseModel):
    """POST /generate, POST /generate_stream and POST /."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    inputs: str = Field(min_length=1, description="a string that is not empty")
    parameters: TgiParameters | None = Field(None, description="an object of parameters, or null")
    stream: bool | None = Field(None, description=_YES_NO)
    model: str | None = Field(None, max_length=200, description="the name of a served model")
    options: dict[str, Any] | None = Field(None, description="an object, which has no effect here, or null")


class TgiTokenizeRequest(TgiRequest):
    """POST /tokenize with TGI's body, of which only the text counts."""

    inputs: str = Field(max_length=MAX_CHARACTERS, description=f"a string of up to {MAX_CHARACTERS} characters")
