"""LaunchedStep: a step that was handed to the device, and what it tells once it is over."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field

from torch import Tensor

from model.sampling.logprobs import Logprobs
from server.engine.messages import TokenExplanation, TokenLogprobs
from server.engine.prompt_scoring import NOTHING_SCORED, Scored
from server.engine.sequence import Sequence
from server.engine.transfer import HostCopy


@dataclass(frozen=True, slots=True)
class RunOutput:
    """One entry per token that was drawn, in order: None where its logits were not numbers.
    `prompt_logprobs` and `explained` by request id, of the sequences whose prompts were scored in part."""

    token_ids: list[int | None]
    logprobs: list[list[TokenLogprobs] | None]
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    explained: dict[int, list[TokenExplanation]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """`sampled` are the sequences of its drawn tokens, in order; `copy` holds these ids [samples], -1 where the logits
    were not numbers, and with `has_logprobs` the three tensors of Logprobs."""

    sampled: List[Sequence]
    copy: HostCopy | None
    scored: Scored
    has_logprobs: bool = False

    @classmethod
    def begin(
        cls,
        sampled: List[Sequence],
        token_ids: Tensor,
        logprobs: Logprobs | None = None,
        scored: Scored = NOTHING_SCORED,
    ) -> LaunchedStep:
        """Of results that are still being computed; the buffers that hold them may be used again."""
        extra = () if logprobs is None else (logprobs.chosen, logprobs.top_ids, logprobs.top_logprobs)
        return cls(sampled, HostCopy.begin([token_ids, *extra]), scored, logprobs is not None)

    @classmethod
    def without_samples(cls, scored: Scored) -> LaunchedStep:
        return cls((), None, scored)

    def wait(self) -> RunOutput:
        """The step's results: its one wait for the device."""
        if self.copy is None:
            return RunOutput([], [], *self.scored)
        token_ids, *logprobs = self.copy.wait()
        ids = token_ids.tolist()
        tokens = [_checked(seq, token_id) for seq, token_id in zip(self.sampled, ids, strict=True)]
        if not self.has_logprobs:
            return RunOutput(tokens, [None] * len(ids), *self.scored)
        return RunOutput(tokens, _logprobs(self.sampled, ids, Logprobs(*logprobs)), *self.scored)


def _checked(seq: Sequence, token_id: int) -> int | None:
    """The token, None where it could not be drawn."""
    return None if token_id < 0 or (seq.grammar is not None and seq.grammar.has_failed) else token_id


def _logprobs(sampled: List[Sequence], ids: list[int], logprobs: Logprobs) -> list[list[TokenLogprobs] | None]:
    chosen, top_ids, top = logprobs.chosen.tolist(), logprobs.top_ids.tolist(), logprobs.top_logprobs.tolist()
    result: list[list[TokenLogprobs] | None] = []
    for row, seq in enumerate(sampled):
        count = seq.params.logprobs
        if count is None:
            result.append(None)
            continue
        best = list(zip(top_ids[row][:count], top[row][:count], strict=True))
        result.append([TokenLogprobs(ids[row], chosen[row], best)])
    return result
