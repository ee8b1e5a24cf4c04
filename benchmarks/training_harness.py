"""One training step of one model under chosen settings, and the clock: what ladder, grid and memory table share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from benchmarks.summary import median
from model.config import ModelConfig
from model.transformer import Transformer
from training.loss import summed_cross_entropy

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


class BenchmarkError(Exception):
    """A measurement that cannot be made as it was asked for; the message says what to do."""


@dataclass(frozen=True)
class Shape:
    """A batch: sequences, and tokens in each."""

    batch_size: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len

    def __str__(self) -> str:
        return f"{self.batch_size} x {self.seq_len}"


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed. `dtype` is the autocast type; weights and optimiser stay float32."""

    dtype: Dtype = "float32"
    compile: bool = False
    fused: bool = True
    recompute: bool = False


class TrainingStep:
    """Forward, backward, clipping and AdamW on one batch of random tokens; calling it is one step.

    The same batch every time: what a step costs does not depend on what the tokens say. `token_ids` bounds the ids
    where the model's vocabulary is padded beyond the tokenizer's. The sum of losses is chunked as in training, so
    the logits of a large batch are not what fills the memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: Shape,
        settings: StepSettings,
        device: torch.device,
        *,
        token_ids: int | None = None,
    ) -> None:
        self.model = Transformer(config)
        self.model.init_weights(0)
        self.model.to(device).train()
        self.model.recompute_layers = settings.recompute
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(token_ids or config.vocab_size, (shape.batch_size, shape.seq_len + 1), generator=generator)
        self.inputs, self.targets = ids[:, :-1].to(device), ids[:, 1:].to(device)
        self.device, self.settings = device, settings
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=settings.fused
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "float16")
        self._loss = torch.compile(self._mean_loss) if settings.compile else self._mean_loss

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self._scaler.scale(self.loss()))
        self._scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def loss(self) -> Tensor:
        """Mean cross-entropy, nats per token."""
        return self._loss(self.inputs, self.targets)

    def _mean_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        dtype = self.settings.dtype
        with torch.autocast(self.device.type, DTYPES[dtype], enabled=dtype != "float32"):
            total = summed_cross_entropy(
                self.model.compute_logits, self.model(inputs), targets, vocab_size=self.model.config.vocab_size
            )
        return total / targets.numel()


def without_dropout(config: ModelConfig) -> ModelConfig:
    return replace(config, dropout=0.0)


def padded(config: ModelConfig, multiple: int = 128) -> ModelConfig:
    """The same model with a vocabulary that is a whole multiple; GPT-2's 50,257 becomes 50,304."""
    return replace(config, vocab_size=-(-config.vocab_size // multiple) * multiple)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(run: Callable[[], object], device: torch.device, *, warmup: int, repeats: int) -> float:
    """Median over `repeats` calls, each waited for, after `warmup` untimed ones."""
    for _ in range(warmup):
        run()
    synchronize(device)
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        run()
        synchronize(device)
        seconds.append(perf_counter() - start)
    return median(seconds)


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 0.4) -> float:
    """FLOP/s of the fastest of the size x size products that fit in `seconds`: 2·size³ per product."""
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, end = float("inf"), perf_counter() + seconds
    for number in range(1_000_000):
        start = perf_counter()
        torch.mm(left, right)
        synchronize(device)
        stop = perf_counter()
        if number:  # the first call sets libraries up
            best = min(best, stop - start)
        if number > 1 and stop > end:
            break
    return 2.0 * size**3 / best


@contextmanager
def float32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Within it float32 products are exact ("highest") or, on CUDA, TF32 ("high")."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def release_memory() -> None:
    """Between measurements, so that one does not pay for the last one's garbage."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
