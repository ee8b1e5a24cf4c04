"""Which texts go through the model together: those of like length, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from model.classifier import Classifier, pad
from training.tasks.classification_metrics import ClassificationReport, make_report

# Training batches are cut from this many batches of neighbours in the shuffled order, sorted by length.
_POOL = 32


def training_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Every text once, in an order that seed and epoch decide, texts of like length together."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), _POOL * batch_size):
        pool = sorted(order[start : start + _POOL * batch_size], key=lambda index: lengths[index])
        batches += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def scoring_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Every text once, shortest first."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


@torch.inference_mode()
def log_probabilities(
    classifier: Classifier, token_ids: Sequence[Sequence[int]], *, batch_size: int, dtype: torch.dtype
) -> Tensor:
    """log softmax of the logits, float32 [texts, labels] on the CPU; products in `dtype`, in eval mode."""
    result = torch.empty(len(token_ids), len(classifier.config.labels))
    device = classifier.device
    for batch in scoring_batches([len(ids) for ids in token_ids], batch_size):
        input_ids, lengths = pad([token_ids[index] for index in batch], device)
        with torch.autocast(device.type, dtype, enabled=dtype not in (torch.float32, classifier.dtype)):
            logits = classifier(input_ids, lengths)
        result[batch] = logits.float().log_softmax(-1).cpu()
    return result


def report_on(labels: Sequence[str], log_probs: Tensor, true: Sequence[int]) -> ClassificationReport:
    """The report of texts with log probabilities [texts, labels]; the likeliest label is the one given."""
    targets = torch.tensor(true)
    loss = -log_probs.gather(1, targets[:, None]).mean().item()
    return make_report(labels, true, log_probs.argmax(-1).tolist(), loss)
