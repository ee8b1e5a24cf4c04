"""The SelfCheck of weights that are about to be saved: their logits in float32, by torch's own operators."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.self_check import NUM_POSITIONS, SelfCheck, choose_ids
from model.transformer import Transformer

# Enough to tell two models apart, and little beside the names and digests of the files.
_SIGNIFICANT_DIGITS = 7


@torch.inference_mode()
def make_self_check(
    model: Transformer, state: Mapping[str, Tensor], *, dtype: torch.dtype, vocab_size: int
) -> SelfCheck | None:
    """Of the weights `state` under our names as they will be read from a file of type `dtype`, over the first
    `vocab_size` outputs. None where a logit is no number, which is not for this to judge, and in a context of one.

    `model` has no weights yet and is used up. Takes memory for them in float32 unless they are in it already.
    """
    prompt, token_ids = choose_ids(vocab_size, model.config.max_seq_len)
    if not prompt:
        return None
    names = model.state_dict().keys()
    weights = {name: state[name].detach().to("cpu", dtype).float() for name in names}
    model.load_state_dict(weights, assign=True)
    model.eval()
    hidden = model(torch.tensor([prompt]))[0, -NUM_POSITIONS:]
    logits = model.compute_logits(hidden)[:, list(token_ids)]
    if not logits.isfinite().all():
        return None
    rows = tuple(tuple(_short(value) for value in row) for row in logits.tolist())
    return SelfCheck(prompt, token_ids, rows)


def _short(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
