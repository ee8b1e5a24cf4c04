"""generate(): one sequence at a time, a forward pass per token and nothing clever.

The engine is tested against it, and training shows samples with it. The model should be in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.dense_cache import DenseKVCache
from model.errors import CheckpointError, QuillError
from model.paged_attention import PagedBatch
from model.sampling import Sampler, SamplerOutput, SamplingRow
from model.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


class PromptError(QuillError):
    """A prompt that cannot be continued."""


class CausalModel(Protocol):
    """What generating needs of a model; Transformer and PackedModel have it."""

    config: ModelConfig

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, input_ids: Tensor, cache: DenseKVCache | None = None) -> Tensor: ...

    def forward_paged(self, input_ids: Tensor, positions: Tensor, paged: PagedBatch) -> Tensor: ...

    def compute_logits(self, hidden: Tensor) -> Tensor: ...

    def new_dense_cache(self, batch_size: int = 1, max_len: int | None = None) -> DenseKVCache: ...


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Raw-distribution log-probability of a generated token, and its best alternatives as (id, value), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """`finish_reason` is set on the last token; `logprobs` when the parameters ask for them."""

    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """`token_ids` holds the generated tokens; an EOS or stop token that ended them is among them."""

    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None

    @classmethod
    def of(cls, tokens: Sequence[GeneratedToken], params: SamplingParams) -> GenerationOutput:
        """What the tokens of one sequence, all of them, come to."""
        logprobs = [token.logprobs for token in tokens if token.logprobs is not None]
        return cls(
            token_ids=[token.token_id for token in tokens],
            finish_reason=tokens[-1].finish_reason or "length",
            logprobs=logprobs if params.logprobs is not None else None,
        )


def generate(
    model: CausalModel,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    use_cache: bool = True,
    eos_token_ids: Sequence[int] | None = None,
    valid_vocab_size: int | None = None,
) -> GenerationOutput:
    """Continue a prompt to its end. Arguments, ends and errors are those of `stream_generate`."""
    tokens = list(
        stream_generate(
            model,
            prompt_token_ids,
            params,
            use_cache=use_cache,
            eos_token_ids=eos_token_ids,
            valid_vocab_size=valid_vocab_size,
        )
    )
    return GenerationOutput.of(tokens, params)


def stream_generate(
    model: CausalModel,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    use_cache: bool = True,
    eos_token_ids: Sequence[int] | None = None,
    valid_vocab_size: int | None = None,
) -> Iterator[GeneratedToken]:
    """Yield tokens as they are generated.

    Ends with "stop" at a token of `eos_token_ids` (default: the config's; not with ignore_eos) or of
    `params.stop_token_ids`, with "length" at max_tokens or when prompt and output fill the context.
    Ids from `valid_vocab_size` on are never sampled. Without `use_cache` every step recomputes the whole sequence.

    Raises PromptError for a prompt that is empty, fills the context or has an id outside the vocabulary,
    InvalidSamplingParamsError for max_tokens 0.
    """
    config = model.config
    check_prompt(prompt_token_ids, config)
    params.require_tokens()
    eos = config.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
    sampler = Sampler(config.vocab_size, valid_vocab_size=valid_vocab_size, eos_token_ids=eos, device=model.device)
    return _tokens(model, list(prompt_token_ids), params, sampler, use_cache)


def check_prompt(prompt_token_ids: Sequence[int], config: ModelConfig) -> None:
    """Raises PromptError for a prompt that is empty, fills the context or has an id outside the vocabulary."""
    if not prompt_token_ids:
        raise PromptError("the prompt must hold at least one token")
    if len(prompt_token_ids) >= config.max_seq_len:
        raise PromptError(
            f"the prompt has {len(prompt_token_ids)} tokens and must leave room in the context of {config.max_seq_len}"
        )
    if not all(0 <= token_id < config.vocab_size for token_id in prompt_token_ids):
        raise PromptError(f"the prompt must use token ids from 0 to {config.vocab_size - 1}")


def _tokens(
    model: CausalModel, prompt: list[int], params: SamplingParams, sampler: Sampler, use_cache: bool
) -> Iterator[GeneratedToken]:
    limit = min(params.max_tokens, model.config.max_seq_len - len(prompt))
    ends = end_ids(params, sampler.eos_token_ids)
    batch = sampler.build_batch([SamplingRow(params, prompt)])
    cache = model.new_dense_cache(batch_size=1, max_len=len(prompt) + limit) if use_cache else None
    sequence, pending = list(prompt), list(prompt)
    for position in range(limit):
        with torch.no_grad():
            input_ids = torch.tensor([pending if use_cache else sequence], dtype=torch.int64, device=model.device)
            logits = model.compute_logits(model(input_ids, cache)[:, -1])
            output = sampler.sample(logits, batch, torch.tensor([position], device=model.device))
            batch.record(output.token_ids)
        token_id = drawn_id(int(output.token_ids[0]))
        pending = [token_id]
        sequence.append(token_id)
        finish_reason = finish_reason_of(token_id in ends, position + 1 == limit)
        yield GeneratedToken(token_id, token_logprobs(output, 0, params), finish_reason)
        if finish_reason:
            return


def end_ids(params: SamplingParams, eos_token_ids: Sequence[int]) -> set[int]:
    """The ids that end a sequence with these parameters."""
    return {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}


def drawn_id(token_id: int) -> int:
    """A sampler's token. Raises CheckpointError for -1, which says that no number came out of the model."""
    if token_id < 0:
        raise CheckpointError("the model's logits are not numbers: its weights are damaged, or need dtype float32")
    return token_id


def finish_reason_of(ended: bool, is_last: bool) -> FinishReason | None:
    """Of a token: whether it `ended` the sequence, and whether it is the last for which there is room."""
    if ended:
        return "stop"
    return "length" if is_last else None


def token_logprobs(output: SamplerOutput, row: int, params: SamplingParams) -> TokenLogprobs | None:
    """What row `row` of a batch asked for."""
    if output.logprobs is None or params.logprobs is None:
        return None
    ids = output.logprobs.top_ids[row, : params.logprobs].tolist()
    values = output.logprobs.top_logprobs[row, : params.logprobs].tolist()
    return TokenLogprobs(float(output.logprobs.chosen[row]), tuple(zip(ids, values, strict=True)))
