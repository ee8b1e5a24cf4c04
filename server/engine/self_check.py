"""Does this engine compute the model that training saved? Its logits beside those stored in the manifest.

Runs through the runner's own kernels and cache, in the type and quantisation it serves with: a prefill and the decode
steps behind it, which is a few milliseconds for a small model. See model/self_check.py.
"""

from __future__ import annotations

import torch

from model.errors import CheckpointError
from model.sampling_params import SamplingParams
from model.self_check import SelfCheck, tolerance
from server.engine.messages import FAILED, PASSED, ModelInfo, SelfCheckResult
from server.engine.model_runner import ModelRunner
from server.engine.scheduler import ScheduledBatch
from server.engine.sequence import Sequence

# No request and no other check has this number.
_REQUEST_ID = -(2**40)


def run_self_check(runner: ModelRunner, expected: SelfCheck | None, quantization: str) -> SelfCheckResult:
    """Compare a runner, whose cache nobody uses yet, with what is stored; without anything stored it is unchecked."""
    if expected is None:
        return SelfCheckResult(reason="the checkpoint stores no logits to compare with")
    bound = tolerance(str(runner.dtype).removeprefix("torch."), quantization)
    config = runner.model_config
    if max(*expected.prompt, *expected.token_ids) >= config.vocab_size or len(expected.prompt) >= config.max_seq_len:
        reason = "the logits in its manifest are those of a model with another vocabulary or context"
        return SelfCheckResult(FAILED, None, bound, reason)
    error = expected.error(_logits(runner, expected))
    if error <= bound:
        return SelfCheckResult(PASSED, error, bound)
    reason = f"its logits are off by {error:.2g} of their spread, where rounding explains {bound:g} at most"
    return SelfCheckResult(FAILED, error, bound, reason)


def require_no_failure(model: ModelInfo) -> None:
    """Raises CheckpointError for a model that failed its check."""
    check = model.self_check
    if check.status == FAILED:
        raise CheckpointError(
            f"{model.name} does not compute what was stored with its weights ({check.reason}); restore the folder from"
            " its source, or start without strict_self_check"
        )


def _logits(runner: ModelRunner, expected: SelfCheck) -> list[list[float]]:
    """[positions][ids], after the prompt's last positions: a prefill up to the first of them, then decodes."""
    length = len(expected.prompt) - len(expected.logits) + 1
    limits = runner.limits
    seq = Sequence(_REQUEST_ID, list(expected.prompt[:length]), SamplingParams(), (), limits.max_model_len, 0.0)
    seq.block_table.extend(range(-(-len(expected.prompt) // limits.block_size)))
    while seq.num_computed_tokens < length:
        count = min(limits.max_num_batched_tokens, length - seq.num_computed_tokens)
        logits = [_step(runner, seq, count, is_decode=False)]
    for token_id in expected.prompt[length:]:
        seq.token_ids.append(token_id)
        logits.append(_step(runner, seq, 1, is_decode=True))
    columns = list(expected.token_ids)
    return [row[columns].tolist() for row in logits]


def _step(runner: ModelRunner, seq: Sequence, count: int, *, is_decode: bool) -> torch.Tensor:
    """Logits [V] in float32, on the CPU, after the next `count` tokens."""
    batch = ScheduledBatch(
        sequences=[seq],
        num_scheduled_tokens=[count],
        needs_sample=[True],
        num_decodes=int(is_decode),
        num_tokens=count,
    )
    logits = runner.compute_logits(batch)
    assert logits is not None, "the row asked for logits"
    seq.num_computed_tokens += count
    return logits[0].float().cpu()
