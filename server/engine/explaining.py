"""What the filters did to the distributions behind tokens of a prompt, told while the prompt is scored.

A text that was generated once is scored as a prompt: its logits are those that it was drawn from, and the sampler's own
parts say what the request's parameters made of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from model.sampling import Sampler, SamplingRow
from model.sampling.explain import Explanation, explain_token
from server.engine.messages import Explain, FilterEffect, TokenAlternative, TokenExplanation
from server.engine.scheduled_batch import ScheduledBatch
from server.engine.sequence import PromptScore, Sequence

ComputeLogits = Callable[[Tensor], Tensor]


class Explainer:
    """Looks at a step's logits as they are made for scoring; `found` holds explanations by request id."""

    def __init__(self, batch: ScheduledBatch, sampler: Sampler) -> None:
        self.found: dict[int, list[TokenExplanation]] = {}
        self._sampler = sampler
        self._rows = deque(_scored_rows(batch))

    @staticmethod
    def is_wanted(batch: ScheduledBatch) -> bool:
        return any(seq.explain is not None for seq in batch.sequences)

    def watch(self, compute_logits: ComputeLogits) -> ComputeLogits:
        """The same function, whose rows [R, V] are looked at on their way. All rows that are to be scored must come, in
        their order."""

        def compute(hidden: Tensor) -> Tensor:
            logits = compute_logits(hidden)
            for index in range(len(hidden)):
                seq, row = self._rows.popleft()
                if seq.explain is not None and seq.prompt_score is not None:
                    told = _explain(self._sampler, logits[index : index + 1], seq.explain, seq.prompt_score, row)
                    self.found.setdefault(seq.request_id, []).append(told)
            return logits

        return compute


def _scored_rows(batch: ScheduledBatch) -> list[tuple[Sequence, int]]:
    """Sequences and their rows, in the order in which a step scores them."""
    return [
        (seq, row)
        for seq, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True)
        if seq.prompt_score is not None
        for row in seq.prompt_score.rows(seq.num_computed_tokens, count)
    ]


def _explain(sampler: Sampler, logits: Tensor, wanted: Explain, score: PromptScore, row: int) -> TokenExplanation:
    """Of the token behind the prompt's token `row`. The first token of a prompt is behind none, so it is no target."""
    prompt, output = score.targets[: wanted.num_prompt_tokens - 1], score.targets[wanted.num_prompt_tokens - 1 : row]
    sampling_row = SamplingRow(wanted.params, (wanted.first_token_id, *prompt), output)
    return _message(explain_token(sampler, logits, sampling_row, score.targets[row], wanted.num_top))


def _message(told: Explanation) -> TokenExplanation:
    return TokenExplanation(
        told.token_id,
        told.drawn_id,
        [TokenAlternative(each.token_id, each.probability, each.final_probability) for each in told.alternatives],
        [
            FilterEffect(each.name, each.removed_tokens, each.removed_mass, each.moved_mass, each.cut)
            for each in told.filters
        ],
    )
