"""HellaSwag: which of several endings continues a context (Zellers et al. 2019).

    python -m training evaluate CHECKPOINT --hellaswag hellaswag_val.jsonl

A row holds `ctx`, `endings` and `label`, the number of the right ending. The model chooses the ending that it finds
most likely behind the context: by the sum of its tokens' cross-entropies (`acc`), or by their mean, which does not
prefer short endings (`acc_norm`). Context and " " + ending are encoded apart. GPT-2 with 124M parameters reaches 0.2859
and 0.2955 on the 10,042 rows of the validation split; guessing reaches 0.25.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.tokenizer import Tokenizer
from model.transformer import Transformer
from training.evaluation.hellaswag_rows import Item
from training.evaluation.progress import OnProgress, silent
from training.loss import max_logits


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """Shares of `items` that were answered rightly. Of `cut` items the context's beginning did not fit the model."""

    acc: float
    acc_norm: float
    items: int
    cut: int

    @property
    def acc_stderr(self) -> float:
        return _standard_error(self.acc, self.items)

    @property
    def acc_norm_stderr(self) -> float:
        return _standard_error(self.acc_norm, self.items)

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"acc_stderr": self.acc_stderr, "acc_norm_stderr": self.acc_norm_stderr}


@dataclass(frozen=True, slots=True)
class _Ending:
    """The tokens of context and ending, of which the last `scored` are the ending's."""

    item: int
    tokens: Sequence[int]
    scored: int
    is_cut: bool


@torch.no_grad()
def multiple_choice(
    model: Transformer,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    *,
    batch_size: int = 16,
    on_progress: OnProgress = silent,
) -> MultipleChoice:
    """Scores every ending, `batch_size` of them at a time, those of similar length together.

    What is longer than the model's context loses its beginning. The model should be in eval mode.
    Raises TokenizerError for text that the tokenizer cannot express.
    """
    endings = [
        ending
        for number, item in enumerate(items)
        for ending in _encode(number, item, tokenizer, model.config.max_seq_len)
    ]
    # Longest first: what does not fit the memory fails at once.
    order = sorted(range(len(endings)), key=lambda place: len(endings[place].tokens), reverse=True)
    losses: list[tuple[float, float]] = [(0.0, 0.0)] * len(endings)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        sums = ending_losses(model, [(endings[place].tokens, endings[place].scored) for place in chosen])
        for place, total in zip(chosen, sums, strict=True):
            losses[place] = total, total / endings[place].scored
        on_progress("scoring endings", start + len(chosen), len(endings))
    sums_right, means_right = (_right_choices(items, [pair[kind] for pair in losses]) for kind in (0, 1))
    cut = len({ending.item for ending in endings if ending.is_cut})
    return MultipleChoice(sums_right / len(items), means_right / len(items), len(items), cut)


def ending_losses(model: Transformer, sequences: Sequence[tuple[Sequence[int], int]]) -> list[float]:
    """For each (tokens, scored): the summed cross-entropy in nats of its last `scored` tokens, given those before.

    One forward pass; shorter sequences are padded at their end, which causal attention does not look at.
    """
    longest = max(len(tokens) for tokens, _ in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    is_scored = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, (tokens, scored) in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        is_scored[row, len(tokens) - scored : len(tokens)] = True
    ids, is_scored = ids.to(model.device), is_scored[:, 1:].to(model.device)
    losses = _token_losses(model, model(ids[:, :-1])[is_scored], ids[:, 1:][is_scored])
    counts = [scored for _, scored in sequences]
    return [part.sum().item() for part in torch.split(losses.double().cpu(), counts)]


def _token_losses(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """Float32 [N] of hidden [N, D] and targets [N], with a bounded number of logits at once."""
    rows = max(1, max_logits(model.device) // model.config.vocab_size)
    parts = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    return torch.cat([F.cross_entropy(model.compute_logits(h).float(), t, reduction="none") for h, t in parts])


def _encode(number: int, item: Item, tokenizer: Tokenizer, context: int) -> Iterator[_Ending]:
    before = tokenizer.encode(item.context)
    for text in item.endings:
        ending = tokenizer.encode(" " + text, add_special=False)
        tokens = (before + ending)[-(context + 1) :]
        is_cut = len(before) + len(ending) > len(tokens)
        yield _Ending(number, tokens, min(len(ending), len(tokens) - 1), is_cut)


def _right_choices(items: Sequence[Item], losses: Sequence[float]) -> int:
    """How often the least loss is the labelled ending's; of equal ones the first counts."""
    right = start = 0
    for item in items:
        own = losses[start : start + len(item.endings)]
        right += own.index(min(own)) == item.label
        start += len(item.endings)
    return right


def _standard_error(share: float, count: int) -> float:
    """Of a share of `count` independent answers."""
    return math.sqrt(share * (1 - share) / count)
