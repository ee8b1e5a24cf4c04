"""The fields that every body asking for text has. Each field's description is also the rule that its error states."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from model.sampling_params import MAX_SEED

MAX_TOKEN_ID = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_CHOICES = 16
MAX_DEADLINE_MS = 24 * 3600 * 1000


def _plain_id(key: object) -> object:
    """Keys of a JSON object are strings; pydantic would read 1.0 and 01 as ids too."""
    if not isinstance(key, str):
        return key
    if not re.fullmatch("0|[1-9][0-9]{0,9}", key):
        raise ValueError("a token id is written in digits alone")
    return int(key)


TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIdKey = Annotated[TokenId, BeforeValidator(_plain_id)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingFields(BaseModel):
    """Strict: no coercion, no NaN or infinity."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)

    model: str | None = Field(None, max_length=200, description="the name of a served model")
    min_tokens: int = Field(0, ge=0, le=MAX_TOKEN_ID, description="an integer between 0 and max_tokens")
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 to 2; 0 is greedy")
    top_k: int = Field(0, ge=0, le=MAX_TOKEN_ID, description="an integer from 0 (off) to the vocabulary's size")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0 and up to 1")
    min_p: float = Field(0.0, ge=0, le=1, description="a number from 0 to 1")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="a number above 0 and up to 10")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    logit_bias: dict[TokenIdKey, Bias] = Field(
        default={},
        max_length=MAX_LOGIT_BIAS,
        description=f"an object of up to {MAX_LOGIT_BIAS} token ids, each with a number from -100 to 100",
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="an integer from 0 to 2^63 - 1, or null")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = Field(
        None, description=f"a string or a list of up to {MAX_STOPS}, each of 1 to {MAX_STOP_LENGTH} characters"
    )
    stop_token_ids: list[TokenId] = Field(
        default=[], max_length=MAX_STOP_TOKEN_IDS, description=f"a list of up to {MAX_STOP_TOKEN_IDS} token ids"
    )
    ignore_eos: bool = Field(False, description="true or false")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description=f"an integer from 1 to {MAX_CHOICES}")
    deadline_ms: int | None = Field(
        None, ge=1, le=MAX_DEADLINE_MS, description="an integer number of milliseconds of at least 1, or null"
    )
    stream: bool = Field(False, description="true or false")

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop
