"""Texts that are to be scored: their tokens, their log-probabilities as they arrive, the figures in the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from model.errors import TokenizerError
from model.evaluation import Evaluation, Window, prediction_windows
from model.tokenizer import Tokenizer
from server.errors import InvalidRequestError
from server.prompts import ServedModel, off_loop
from server.schemas.score import ScoreRequest

# Tokens that a request may have computed: what a body of the default limit holds where a token is a byte, read once.
MAX_COMPUTED_TOKENS = 1 << 20


@dataclass(slots=True)
class ScoredText:
    """`logprobs[i]` is that of token i given those before it in its window; None until it is known, and for the
    first token, which nothing predicts: as in training's `evaluate`, no start token is put before a text.

    `num_bytes` is the size of the text in UTF-8.
    """

    token_ids: list[int]
    num_bytes: int
    logprobs: list[float | None] = field(init=False)

    def __post_init__(self) -> None:
        self.logprobs = [None] * len(self.token_ids)

    @property
    def num_predictions(self) -> int:
        return max(0, len(self.token_ids) - 1)

    def windows(self, context: int, stride: int) -> Iterator[Window]:
        """None for a text of fewer than two tokens."""
        if self.num_predictions:
            yield from prediction_windows(self.num_predictions, context, stride)

    @property
    def nll(self) -> float:
        """Negative log-likelihood in nats, of all tokens but the first."""
        return -math.fsum(value for value in self.logprobs if value is not None)

    def evaluation(self) -> Evaluation | None:
        """What `python -m training evaluate` tells of the text; None where nothing is predicted."""
        if not self.num_predictions:
            return None
        return Evaluation(self.nll / self.num_predictions, self.num_predictions, self.num_bytes / len(self.token_ids))


async def read_texts(body: ScoreRequest, model: ServedModel) -> list[ScoredText]:
    """The texts of a request. Raises InvalidRequestError for what the model cannot read, or not in one request."""
    stride = window_stride(body, model)
    num_characters = sum(len(text) for text in body.texts)
    texts = await off_loop(num_characters, lambda: [_read(text, model) for text in body.texts])
    computed = sum(_num_computed(text.num_predictions, model.max_model_len, stride) for text in texts)
    if computed > MAX_COMPUTED_TOKENS:
        raise InvalidRequestError(
            f"texts take {computed} tokens of computing at this stride, more than the {MAX_COMPUTED_TOKENS} that one"
            " request may ask for; send less text, or raise stride",
            param="texts",
        )
    return texts


def window_stride(body: ScoreRequest, model: ServedModel) -> int:
    """Raises InvalidRequestError for one beyond the model's context, which is also the default."""
    if body.stride is not None and body.stride > model.max_model_len:
        raise InvalidRequestError(
            f"stride must be an integer from 1 to the model's context of {model.max_model_len}", param="stride"
        )
    return body.stride or model.max_model_len


def _read(text: str | list[int], model: ServedModel) -> ScoredText:
    if isinstance(text, list):
        if text and max(text) >= model.output_width:
            message = f"texts holds a token id that is not below {model.output_width}"
            raise InvalidRequestError(message, param="texts")
        return ScoredText(text, _num_bytes(text, model.tokenizer))
    try:
        return ScoredText(model.tokenizer.encode(text, add_special=False), len(text.encode()))
    except TokenizerError:
        message = "texts holds characters that this model's tokenizer does not know"
        raise InvalidRequestError(message, param="texts") from None


def _num_bytes(token_ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """Of the text that the ids stand for: special tokens and ids without a token add nothing to it."""
    special = set(tokenizer.special_tokens.values())
    collector = tokenizer.collector()
    plain = [token_id for token_id in token_ids if token_id not in special and tokenizer.token_bytes(token_id)]
    return len(collector.push(plain)) + len(collector.finish())


def _num_computed(predictions: int, context: int, stride: int) -> int:
    """Tokens in all windows of a text, at most: where windows overlap, each further one is a full context."""
    further = max(0, predictions - context)
    return min(predictions, context) + (further if stride == context else -(-further // stride) * context)
