"""Does a model compute what it should? Checks that need no data and no other implementation.

    python -m training selftest runs/shakespeare/checkpoints/best

Everything runs in float32: what is compared differs then by rounding only.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model.checkpoint import load_model, save_model
from model.generate import generate
from model.generate_batch import generate_batch
from model.presets import create_config
from model.sampling_params import SamplingParams
from model.tokenizer import StreamDecoder, Tokenizer
from model.transformer import Transformer
from training.build import resolve_device

_MAX_TOKENS = 32
_ROUNDING = 1e-4
"""Of the largest logit: sums over thousands of terms in another order, in float32, stay far below it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table. `detail` is what was measured, or what is wrong."""

    name: str
    passed: bool
    detail: str


class _FailedError(Exception):
    """What a check found wrong."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The model under test, in eval mode, its tokenizer, and token ids [2, T] to try it on."""

    model: Transformer
    tokenizer: Tokenizer
    input_ids: Tensor

    @classmethod
    def of(cls, model: Transformer, tokenizer: Tokenizer) -> Subject:
        vocab_size = min(model.config.vocab_size, tokenizer.vocab_size)
        length = min(_MAX_TOKENS, model.config.max_seq_len - 1)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (2, length), generator=generator)
        return cls(model, tokenizer, ids.to(model.device))

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        return self.model.compute_logits(self.model(input_ids)).float()


def load_subject(checkpoint: Path | None, preset: str, device: str) -> Subject:
    """A checkpoint, or a freshly initialised preset with the tokenizer of bytes.

    Raises CheckpointError, TokenizerError, ConfigError or RecipeError.
    """
    place = resolve_device(device)
    if checkpoint is not None:
        model = load_model(checkpoint, dtype=torch.float32, device=place)
        return Subject.of(model, Tokenizer.load(checkpoint))
    tokenizer = Tokenizer.bytes()
    end = tokenizer.eos_token_id
    config = create_config(preset, vocab_size=tokenizer.vocab_size, bos_token_id=end, eos_token_id=end, dropout=0.0)
    with torch.device(place):
        model = Transformer(config).eval()
    model.init_weights()
    return Subject.of(model, tokenizer)


def run_checks(subject: Subject) -> list[Check]:
    """Every check, whatever the others found. A check that raises has failed."""
    return [_run(name, check, subject) for name, check in CHECKS.items()]


def _run(name: str, check: Callable[[Subject], str], subject: Subject) -> Check:
    try:
        return Check(name, True, check(subject))
    except _FailedError as problem:
        return Check(name, False, str(problem))
    except Exception as problem:  # the table tells of what breaks, whatever it is
        return Check(name, False, f"{type(problem).__name__}: {problem}")


def _forward(subject: Subject) -> str:
    logits = subject.logits(subject.input_ids)
    expected = (*subject.input_ids.shape, subject.model.config.vocab_size)
    _require(tuple(logits.shape) == expected, f"logits have the shape {tuple(logits.shape)}, not {expected}")
    _require(bool(logits.isfinite().all()), f"{int((~logits.isfinite()).sum())} logits are not finite")
    return f"logits {list(logits.shape)}, from {logits.min():.3g} to {logits.max():.3g}"


def _vocabulary(subject: Subject) -> str:
    tokens, rows = subject.tokenizer.vocab_size, subject.model.config.vocab_size
    _require(tokens <= rows, f"the tokenizer has {tokens} ids and the model {rows}")
    return f"{tokens:,} ids of the tokenizer, {rows:,} of the model"


def _causal(subject: Subject) -> str:
    """Another token in the middle changes what follows, and nothing before it."""
    ids = subject.input_ids
    place = ids.shape[1] // 2
    changed = ids.clone()
    changed[:, place] = (ids[:, place] + 1) % min(subject.tokenizer.vocab_size, subject.model.config.vocab_size)
    before, after = subject.logits(ids), subject.logits(changed)
    leaked = _difference(before[:, :place], after[:, :place])
    seen = _difference(before[:, place:], after[:, place:])
    _require(leaked <= _ROUNDING, f"logits before a changed token differ by {leaked:.2g} of the largest")
    _require(seen > leaked, "logits behind a changed token stay as they were")
    return f"a changed token changes {seen:.2g} behind it, {leaked:.2g} before it"


def _cache(subject: Subject) -> str:
    """A prompt and then one token at a time, through the KV cache, against the whole sequence at once."""
    ids, model = subject.input_ids, subject.model
    cache = model.new_dense_cache(batch_size=ids.shape[0], max_len=ids.shape[1])
    half, length = ids.shape[1] // 2, ids.shape[1]
    pieces = [ids[:, :half], *(ids[:, place : place + 1] for place in range(half, length))]
    with torch.no_grad():
        stepped = torch.cat([model.compute_logits(model(piece, cache)).float() for piece in pieces if piece.numel()], 1)
    difference = _difference(subject.logits(ids), stepped)
    _require(difference <= _ROUNDING, f"logits with the cache differ by {difference:.2g} of the largest")
    return f"logits with and without differ by {difference:.2g} of the largest"


def _gradients(subject: Subject) -> str:
    """The loss reaches every weight."""
    ids, model = subject.input_ids, subject.model
    with torch.enable_grad():
        logits = model.compute_logits(model(ids[:, :-1])).float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    bad = [name for name, grad in zip(parameters, grads, strict=True) if grad is None or not grad.isfinite().all()]
    _require(math.isfinite(loss.item()), f"the loss is {loss.item()}")
    _require(not bad, f"no finite gradient for {', '.join(bad[:3])}")
    return f"loss {loss.item():.3f} nats on random tokens, {len(grads)} finite gradients"


def _sampling(subject: Subject) -> str:
    """The same seed gives the same tokens, all of them the tokenizer's."""
    params = SamplingParams(max_tokens=_MAX_TOKENS, seed=1, ignore_eos=True)
    first, again = _generate(subject, params), _generate(subject, params)
    _require(first == again, "the same seed gave other tokens")
    _require(max(first) < subject.tokenizer.vocab_size, f"token {max(first)} is none of the tokenizer's")
    return f"{len(first)} tokens, the same for the same seed"


def _batching(subject: Subject) -> str:
    """Sequences of several lengths together are what they are alone."""
    prompts = [row[:length].tolist() for row in subject.input_ids for length in (1, row.shape[0] // 2 + 1)]
    params = [SamplingParams(max_tokens=8, seed=seed, ignore_eos=True) for seed in range(len(prompts))]
    size = subject.tokenizer.vocab_size
    together = generate_batch(subject.model, prompts, params, valid_vocab_size=size)
    alone = [generate(subject.model, *pair, valid_vocab_size=size) for pair in zip(prompts, params, strict=True)]
    different = sum(a.token_ids != b.token_ids for a, b in zip(alone, together, strict=True))
    _require(different == 0, f"{different} of {len(prompts)} sequences are other ones in a batch")
    return f"{len(prompts)} sequences, together as alone"


def _streaming(subject: Subject) -> str:
    ids = _generate(subject, SamplingParams(max_tokens=_MAX_TOKENS, seed=2, ignore_eos=True))
    decoder = StreamDecoder(subject.tokenizer)
    streamed = "".join([decoder.push([token_id]) for token_id in ids]) + decoder.finish()
    _require(streamed == subject.tokenizer.decode(ids), "the streamed text is not the decoded one")
    return f"{len(streamed)} characters in pieces are the whole text"


def _saving(subject: Subject) -> str:
    """Written and read again, every weight is the same to the bit."""
    model = subject.model
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_model(folder, model, tokenizer=subject.tokenizer)
        loaded, tokenizer = load_model(folder, device=model.device), Tokenizer.load(folder)
    state = model.state_dict()
    changed = [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, state[name])]
    _require(not changed, f"{len(changed)} tensors changed, {', '.join(changed[:3])}")
    _require(tokenizer.digest == subject.tokenizer.digest, "the tokenizer changed")
    return f"{len(state)} tensors and the tokenizer are as they were"


def _generate(subject: Subject, params: SamplingParams) -> list[int]:
    prompt = subject.input_ids[0, :1].tolist()
    return generate(subject.model, prompt, params, valid_vocab_size=subject.tokenizer.vocab_size).token_ids


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item() if a.numel() else 0.0


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise _FailedError(problem)


CHECKS: dict[str, Callable[[Subject], str]] = {
    "forward": _forward,
    "vocabulary": _vocabulary,
    "causality": _causal,
    "KV cache": _cache,
    "gradients": _gradients,
    "generate": _sampling,
    "batch": _batching,
    "streaming": _streaming,
    "save and load": _saving,
}
