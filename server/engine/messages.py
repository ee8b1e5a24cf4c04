"""What crosses the process boundary, as msgpack: requests one way, one message per step the other way.

Structs are encoded as arrays with a tag, so that a token costs a few bytes. Exceptions cross as values.
Times are `time.monotonic()` seconds: both processes run on one machine and share that clock.
"""

from __future__ import annotations

import msgspec

from model.sampling_params import SamplingParams

GENERATION, CLASSIFICATION = "generation", "classification"
"""What a model is served for."""
YES, NO, UNCHECKED = "yes", "no", "unchecked"
"""Whether tokens are known not to depend on what else the engine runs: see server/engine/invariance.py."""
PASSED, FAILED = "passed", "failed"
"""What the check of a loaded model came to, beside UNCHECKED: see server/engine/self_check.py."""


class Explain(msgspec.Struct, frozen=True, array_like=True):
    """Which distributions to take apart: those behind the tokens of a prompt that are scored. The first
    `num_prompt_tokens` of it, from `first_token_id` on, were the prompt once, and the others were drawn after it with
    `params`. `num_top` is how many alternatives to tell of."""

    params: SamplingParams
    first_token_id: int
    num_prompt_tokens: int
    num_top: int


class AddRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """`prompt_logprobs`, its start, `pool` and `explain` are those of `server.engine.sequence.Sequence`. `model` is the
    name of one of the engine's models, None for the first, and `weights` the digest of those that it has to be answered
    by where they were replaced a moment ago; None for those that are served."""

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float
    deadline: float | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 1
    pool: int = 0
    explain: Explain | None = None
    model: str | None = None
    weights: str | None = None


class LoadWeights(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Load a checkpoint of the same shape beside a served model and serve it instead. `weights` is the digest that the
    folder must have, `self_check` what the check of these weights came to elsewhere. Answered by WeightsLoaded."""

    model: str
    folder: str
    weights: str
    self_check: SelfCheckResult


class ReleaseWeights(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """No request will name these replaced weights any more: they go when the last that did has ended."""

    model: str
    weights: str


class AbortRequests(msgspec.Struct, frozen=True, array_like=True, tag=True):
    request_ids: list[int]


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Raw-distribution log-probability of one token, generated or of the prompt, and the best ones in its place, best
    first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class RequestTimings(msgspec.Struct, frozen=True, array_like=True):
    """Seconds on the monotonic clock, 0.0 for what has not come yet; sent with a request's first token and with its
    last output."""

    arrival: float
    first_scheduled: float
    first_token: float
    finished: float
    num_preemptions: int


class RequestTrace(msgspec.Struct, array_like=True):
    """What a request has met so far: the steps that it was in and how many sequences these computed at once, and the
    tokens that it guessed and guessed right. Kept and sent with each output where EngineConfig.trace_requests is on."""

    num_steps: int = 0
    min_batch_size: int = 0
    max_batch_size: int = 0
    sum_batch_sizes: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class FilterEffect(msgspec.Struct, frozen=True, array_like=True):
    """What a filter did to the distribution before it. `removed_tokens` lost all their probability, `removed_mass` in
    total; `moved_mass` went from some tokens to others (the total variation distance, at least what was removed).
    `cut` are those of the alternatives that it removed."""

    name: str
    removed_tokens: int
    removed_mass: float
    moved_mass: float
    cut: list[int]


class TokenAlternative(msgspec.Struct, frozen=True, array_like=True):
    """`probability` in the raw distribution, `final_probability` in the one that is drawn from."""

    token_id: int
    probability: float
    final_probability: float


class TokenExplanation(msgspec.Struct, frozen=True, array_like=True):
    """One generated token. `drawn_id` is what the seed draws at its place. `alternatives` hold the token itself, the
    most probable ones of both distributions, in the order of the raw one."""

    token_id: int
    drawn_id: int
    alternatives: list[TokenAlternative]
    filters: list[FilterEffect]


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request. `finish_reason` is set on the last one: see server/engine/sequence.py.

    A stop token or EOS that ended the sequence is among `token_ids`; `stop_token_id` names it
    when it came from `stop_token_ids` and is None for EOS. With `keeps_last` a grammar's end ended the sequence, and
    its last token is text. A classifier gives `scores`, the labels' probabilities.
    `prompt_logprobs` are those of the prompt's next tokens: they arrive in order, over several outputs that may have
    no token, and all before the first generated token or with it. `explained` goes with them.
    """

    request_id: int
    token_ids: list[int]
    finish_reason: str | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    timings: RequestTimings | None = None
    scores: list[float] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    trace: RequestTrace | None = None
    explained: list[TokenExplanation] | None = None
    keeps_last: bool = False


class ModelStats(msgspec.Struct, frozen=True, array_like=True):
    """One model's part of EngineStats, under the same names."""

    name: str
    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot after a step. Gauges are current, the rest count from the engine's start. `models` has an entry for
    each where there are several."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    models: list[ModelStats] = []


class StepOutput(msgspec.Struct, frozen=True, array_like=True, tag=True):
    outputs: list[SequenceOutput]
    stats: EngineStats
    step_tokens: int = 0


class SelfCheckResult(msgspec.Struct, frozen=True):
    """Whether the model's logits here are those that were stored with its weights: passed, failed, or unchecked for
    want of stored ones. `error` and `tolerance` are those of `model.self_check`; `reason` is a sentence."""

    status: str = UNCHECKED
    error: float | None = None
    tolerance: float | None = None
    reason: str | None = None


class ModelInfo(msgspec.Struct, frozen=True):
    """What the engine knows of a loaded checkpoint. `config` is the ModelConfig as plain values.

    `labels` are a classifier's, in the order of its scores, and `pad_token_id` is what ends its padded texts.
    """

    name: str
    config: dict[str, object]
    num_parameters: int
    weights_digest: str
    provenance: dict[str, object]
    task: str = GENERATION
    labels: list[str] = []
    pad_token_id: int | None = None
    max_model_len: int | None = None
    self_check: SelfCheckResult = SelfCheckResult()


class EngineInfo(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Sent when the engine is ready to take requests, and again once it knows whether it is `deterministic`."""

    models: list[ModelInfo]
    device: str
    device_name: str
    dtype: str
    attention_backend: str
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    torch_version: str
    load_seconds: float
    deterministic: str = UNCHECKED


class EngineFault(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine cannot go on (or could not start). `message` is safe to log; `user_error` marks a fault of the
    configuration or the model folder, whose message is one sentence meant for the operator."""

    message: str
    user_error: bool


class WeightsLoaded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The end of a LoadWeights: with the first EngineInfo that names them the weights are served, or `error` says why
    they are not. The text may name paths, and is for the log."""

    model: str
    weights: str
    error: str | None
    seconds: float


EngineInput = AddRequest | AbortRequests | LoadWeights | ReleaseWeights | Shutdown
EngineOutput = EngineInfo | StepOutput | EngineFault | WeightsLoaded
