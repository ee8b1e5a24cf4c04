"""GrammarMasks: which tokens the grammars of a step's sequences allow, as one tensor."""

from __future__ import annotations

from collections.abc import Sequence as List

import torch

from model.sampling.masks import AllowedTokens
from server.engine.grammar_matcher import mask_words
from server.engine.sequence import Sequence


class GrammarMasks:
    """Written anew each step into one buffer, pinned for CUDA; a step ends after the device has read it."""

    def __init__(self, max_num_seqs: int, vocabulary_size: int, device: torch.device) -> None:
        self._shape = max_num_seqs, mask_words(vocabulary_size)
        self._size = vocabulary_size
        self._device = device
        self._bits: torch.Tensor | None = None

    def fill(self, sampled: List[Sequence]) -> AllowedTokens | None:
        """What the rows with a grammar may draw, or None where none has one. A grammar that fails says so itself."""
        rows = [row for row, seq in enumerate(sampled) if seq.grammar is not None]
        if not rows:
            return None
        if self._bits is None:
            self._bits = torch.empty(self._shape, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        masks = self._bits.numpy()
        for place, row in enumerate(rows):
            seq = sampled[row]
            assert seq.grammar is not None, "chosen by it"
            seq.grammar.fill(masks[place], [i for i in seq.eos_token_ids if i < self._size])
        bits = self._bits[: len(rows)].to(self._device, non_blocking=True)
        everyone = len(rows) == len(sampled)
        return AllowedTokens(bits, None if everyone else torch.tensor(rows, dtype=torch.int64, device=self._device))
