"""SelfCheck: a few logits of a fixed prompt, stored with the weights, by which whoever loads them can tell whether it
computes the same model.

Free of torch. A checksum of the files says that the weights arrived; this says that they are understood: that names,
layouts, positions and the kernels of the machine at hand give what training meant. Bits cannot be compared between
machines and types, so a few values are kept, computed in float32, and each type has its tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import CheckpointError
from model.json_file import JsonFields

NUM_POSITIONS = 3
"""The logits are those after each of the prompt's last positions: the first comes out of a prefill, the others of
decode steps."""
MAX_PROMPT = 16
_MAX_IDS = 16
_MAX_STORED = 64
# Of the spread of the logits. Rounding costs some 1e-6 in float32, and on the bundled model 2e-3 to 5e-3 in bfloat16
# and 6e-3 in eight bits; deeper models lose more. Weights that are misread are off by a tenth and more.
_TOLERANCES = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 0.05, "int8": 0.1}
# Logits that differ by less than a thousandth are the same to a sampler: a flat distribution is no reason to fail.
_LEAST_SPREAD = 0.01


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """`logits` [positions][ids]: those of `token_ids` after each of the last positions of `prompt`, in float32."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]

    def error(self, found: Sequence[Sequence[float]]) -> float:
        """How far `found`, in the shape of `logits`, is from them: the root mean square of the differences over that
        of the stored values around their mean. Infinite where a value is no number."""
        wanted = [value for row in self.logits for value in row]
        values = [value for row in found for value in row]
        assert len(values) == len(wanted), "one value for each stored one"
        if not all(map(math.isfinite, values)):
            return math.inf
        mean = math.fsum(wanted) / len(wanted)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in wanted) / len(wanted))
        difference = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(values, wanted, strict=True)) / len(wanted))
        return difference / max(spread, _LEAST_SPREAD)

    def values(self) -> dict[str, object]:
        """For JSON."""
        return {"prompt": list(self.prompt), "token_ids": list(self.token_ids), "logits": [*map(list, self.logits)]}


def tolerance(dtype: str, quantization: str = "none") -> float:
    """The largest `SelfCheck.error` that rounding explains: by the type that computes (as torch names it) and by the
    weights' quantisation."""
    return _TOLERANCES["int8" if quantization != "none" else dtype]


def choose_ids(vocab_size: int, max_seq_len: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(prompt, ids whose logits are kept), both spread over the vocabulary, its first and last ids among them.

    The prompt leaves room in the context for one more token, as engines ask; in a context of one token it is empty.
    """
    return _spread(vocab_size, min(MAX_PROMPT, max_seq_len - 1)), tuple(sorted({*_spread(vocab_size, _MAX_IDS)}))


def _spread(vocab_size: int, count: int) -> tuple[int, ...]:
    return tuple(round(index * (vocab_size - 1) / max(1, count - 1)) for index in range(count))


def self_check_from_json(fields: JsonFields, source: str) -> SelfCheck | None:
    """The manifest's field `self_check`; None where it has none. Raises CheckpointError."""
    if not fields.has("self_check"):
        return None
    inner = JsonFields(fields.mapping("self_check"), f"{source}: self_check", CheckpointError)
    prompt, token_ids = _ids(inner, "prompt"), _ids(inner, "token_ids")
    rows = inner.value("logits")
    if not isinstance(rows, list) or not 1 <= len(rows) <= min(NUM_POSITIONS, len(prompt)):
        inner.fail("logits", f"must hold a row for each of the prompt's last 1 to {NUM_POSITIONS} positions")
    return SelfCheck(prompt, token_ids, tuple(_logits(inner, row, len(token_ids)) for row in rows))


def _ids(fields: JsonFields, name: str) -> tuple[int, ...]:
    values = fields.value(name)
    if not isinstance(values, list) or not 1 <= len(values) <= _MAX_STORED:
        fields.fail(name, f"must be a list of 1 to {_MAX_STORED} token ids")
    if not all(type(value) is int and 0 <= value < 2**31 for value in values):
        fields.fail(name, "must hold token ids")
    return tuple(values)


def _logits(fields: JsonFields, row: object, count: int) -> tuple[float, ...]:
    if not isinstance(row, list) or len(row) != count:
        fields.fail("logits", "must have a value for each of token_ids in every row")
    if not all(type(value) in (int, float) and abs(value) < 1e30 for value in row):
        fields.fail("logits", "must hold finite numbers")
    return tuple(float(value) for value in row)
