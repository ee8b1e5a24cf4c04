"""How well a model predicts a text: the windows in which it is read, and the figures that come out. Free of torch.

The tokens are read in windows of `seq_len` predictions, one behind the other, so that every token but the first is
predicted exactly once; the last window may be shorter. With `stride` below `seq_len` windows overlap and only the
last `stride` predictions of each count, which gives every token at least seq_len − stride tokens of context: a lower
and more expensive figure. No start token is put before a text. Bits per byte = nats per token · tokens per byte / ln 2,
where the bytes are those of the UTF-8 text, so models with different tokenizers can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`loss` is in nats per token, over `tokens` predictions."""

    loss: float
    tokens: int
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.loss / self.bytes_per_token / math.log(2) if self.bytes_per_token else math.inf

    def values(self) -> dict[str, float | int | None]:
        """For JSON, which has no infinity."""
        return {
            "loss": self.loss,
            "perplexity": _finite(self.perplexity),
            "bits_per_byte": _finite(self.bits_per_byte),
            "tokens": self.tokens,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Window:
    """Predictions [start, start + length) of a run of tokens, of which those from `skip` on count.

    Prediction i is that of token i + 1; the window's inputs are the tokens [start, start + length).
    """

    start: int
    length: int
    skip: int


def prediction_windows(predictions: int, seq_len: int, stride: int) -> Iterator[Window]:
    """The first window counts whole; each later one starts so that its last `stride` predictions are new."""
    yield Window(0, min(seq_len, predictions), 0)
    done = min(seq_len, predictions)
    while done < predictions:
        new = min(stride, predictions - done)
        start = done + new - min(seq_len, done + new) if stride < seq_len else done
        yield Window(start, done + new - start, done - start)
        done += new
