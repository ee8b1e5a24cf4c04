"""ScheduledBatch: what one step computes. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.sequence import Sequence


@dataclass(slots=True)
class ScheduledBatch:
    """One step's work: row i computes the next `num_scheduled_tokens[i]` tokens of `sequences[i]` after its
    `num_computed_tokens`, and its block table has room for them.

    The first `num_decodes` rows are decodes: exactly one token, past the prompt. `needs_sample[i]` says that the
    row reaches the end of its sequence's tokens, so that a next token is to be drawn. Of a sequence with a
    `prompt_score`, its `rows` of the row's tokens are to be scored. A sequence with a `draft` computes its last token
    and the draft's, and a next token is to be drawn behind each of them.
    `expired` are sequences that ended because their deadline passed; they are in no later batch or update.
    """

    sequences: list[Sequence] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    needs_sample: list[bool] = field(default_factory=list)
    num_decodes: int = 0
    num_tokens: int = 0
    expired: list[Sequence] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not self.sequences

    @property
    def waits_for_tokens(self) -> bool:
        """Whether the next step cannot be prepared before this one's tokens are known."""
        return any(seq.waits_for_tokens for seq in self.sequences)

    @property
    def num_samples(self) -> int:
        """Tokens to be drawn."""
        return sum(self.needs_sample) + sum([len(seq.draft) for seq in self.sequences])

    def row(self, index: int) -> ScheduledBatch:
        """The step of one of the sequences alone."""
        return self._rows([index])

    def by_generation(self) -> list[tuple[int, ScheduledBatch]]:
        """The step as one for each set of weights, in the order of their numbers; rows keep theirs. Expired sequences
        are left out."""
        rows: dict[int, list[int]] = {}
        for index, seq in enumerate(self.sequences):
            rows.setdefault(seq.generation, []).append(index)
        if len(rows) == 1:
            return [(self.sequences[0].generation, self)]
        return [(generation, self._rows(rows[generation])) for generation in sorted(rows)]

    def _rows(self, indices: list[int]) -> ScheduledBatch:
        counts = [self.num_scheduled_tokens[index] for index in indices]
        return ScheduledBatch(
            sequences=[self.sequences[index] for index in indices],
            num_scheduled_tokens=counts,
            needs_sample=[self.needs_sample[index] for index in indices],
            num_decodes=sum(index < self.num_decodes for index in indices),
            num_tokens=sum(counts),
        )


def is_decode(seq: Sequence) -> bool:
    """One token to compute, past the prompt."""
    computed = seq.num_computed_tokens
    return computed >= seq.num_prompt_tokens and len(seq.token_ids) + seq.num_pending - computed == 1


def schedule_prefill(seq: Sequence, budget: int) -> int:
    seq.num_scheduled_tokens = min(budget, len(seq.token_ids) - seq.num_computed_tokens)
    return seq.num_scheduled_tokens


def make_batch(decodes: list[Sequence], prefills: list[Sequence], expired: list[Sequence]) -> ScheduledBatch:
    counts = [1] * len(decodes) + [seq.num_scheduled_tokens for seq in prefills]
    ends = [
        seq.num_computed_tokens + seq.num_scheduled_tokens >= len(seq.token_ids) and not seq.score_only
        for seq in prefills
    ]
    return ScheduledBatch(
        sequences=decodes + prefills,
        num_scheduled_tokens=counts,
        needs_sample=[True] * len(decodes) + ends,
        num_decodes=len(decodes),
        num_tokens=sum(counts),
        expired=expired,
    )
