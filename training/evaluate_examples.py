"""The loss of a model on the counted tokens of examples: answers, given their prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from model.evaluation import Evaluation
from model.transformer import Transformer
from training.data.examples import ExampleRows, ExampleSplit
from training.distributed import Distributed
from training.loss import summed_cross_entropy


@torch.no_grad()
def evaluate_answers(
    model: Transformer, split: ExampleSplit, *, seq_len: int, batch_size: int = 16, autocast: torch.dtype | None = None
) -> Evaluation:
    """`evaluate_examples` of a model alone, in eval mode; the mode is restored."""
    precision = torch.autocast(model.device.type, autocast) if autocast else contextlib.nullcontext()

    def summed_loss(inputs: Tensor, targets: Tensor, skip: int) -> Tensor:
        with precision:
            return summed_cross_entropy(
                model.compute_logits, model(inputs), targets, vocab_size=model.config.vocab_size
            )

    was_training = model.training
    model.eval()
    result = evaluate_examples(summed_loss, split, Distributed(model.device), seq_len=seq_len, batch_size=batch_size)
    model.train(was_training)
    return result


def evaluate_examples(
    summed_loss: Callable[[Tensor, Tensor, int], Tensor],
    split: ExampleSplit,
    distributed: Distributed,
    *,
    seq_len: int,
    batch_size: int = 16,
    max_tokens: int = 0,
) -> Evaluation:
    """The mean of `summed_loss(inputs, targets, 0)` over all counted targets, which the ranks share out. Collective.

    Each example is read by itself, also where training packs several into a row, so that the figure is that of
    answering one. `max_tokens` > 0 reads the first examples that have so many targets. All ranks call the function
    equally often, as FSDP demands: what the last round has too few batches for is computed and not counted.
    """
    rows = ExampleRows(split, seq_len, packing=False)
    used = len(rows)
    if max_tokens:
        used = min(used, int(np.searchsorted(np.cumsum(rows.targets), max_tokens)) + 1)
    batches = list(_batches(rows, used, batch_size))
    total = torch.zeros((), dtype=torch.float64, device=distributed.device)
    for first in range(0, len(batches), distributed.world_size):
        is_mine = first + distributed.rank < len(batches)
        batch = batches[first + distributed.rank if is_mine else first]
        inputs, targets = (torch.from_numpy(each).to(distributed.device) for each in rows.stack(batch))
        loss = summed_loss(inputs, targets, 0)
        if is_mine:
            total += loss
    counted = int(rows.targets[:used].sum())
    return Evaluation(distributed.sum(total).item() / counted, counted, split.answer_bytes / split.num_targets)


def _batches(rows: ExampleRows, used: int, size: int) -> Iterator[list[int]]:
    """Neighbours by length, so that little is computed for filling up."""
    order = np.argsort(rows.lengths[:used], kind="stable").tolist()
    for first in range(0, used, size):
        yield order[first : first + size]
