"""ClassificationEngine: texts in, probabilities of labels out; a step is one batch of what waits.

It takes the requests that LLMEngine takes and answers each with one output, which holds the scores and no tokens.
Sampling parameters have no meaning here. Nothing outlives a step, so there is no cache and nothing to preempt.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from pathlib import Path

import torch

from model.classifier import load_classifier
from model.classifier_config import load_classifier_config
from model.errors import ConfigError
from model.manifest import read_manifest, weights_digest
from server.engine.config import EngineConfig
from server.engine.messages import (
    CLASSIFICATION,
    AddRequest,
    EngineInfo,
    EngineStats,
    ModelInfo,
    RequestTimings,
    SequenceOutput,
    StepOutput,
)
from server.engine.sequence import InvalidSequenceError
from server.engine.sizing import device_name, resolve_batch, resolve_device, resolve_dtype, resolve_threads

logger = logging.getLogger(__name__)


class ClassificationEngine:
    """One classifier on one device. Raises ConfigError or CheckpointError for what cannot be run."""

    def __init__(self, config: EngineConfig) -> None:
        started = time.monotonic()
        if config.quantization != "none":
            raise ConfigError("quantization is not available for classifiers; use none")
        self.config = config
        folder = Path(config.model_path)
        device = resolve_device(config.device)
        self._dtype = resolve_dtype(config.dtype, device)
        self.classifier_config = load_classifier_config(folder)
        torch.set_num_threads(resolve_threads(config.num_threads, self.classifier_config.base))
        self._classifier = load_classifier(folder, dtype=self._dtype, device=device)
        num_parameters = sum(parameter.numel() for parameter in self._classifier.parameters())
        self._device = device
        if device.type == "cpu":
            self._classifier.pack_for_cpu()
        self._max_num_seqs, self._max_num_batched_tokens = resolve_batch(config, device)
        self._waiting: deque[AddRequest] = deque()
        self._num_steps = self._num_tokens = 0
        self.info = self._describe(folder, num_parameters, time.monotonic() - started)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting)

    def add(self, request: AddRequest) -> None:
        """Queue a text. Raises InvalidSequenceError, naming the field, for one that cannot be run."""
        ids, base = request.prompt_token_ids, self.classifier_config.base
        if not 1 <= len(ids) <= self.classifier_config.context:
            raise InvalidSequenceError(f"prompt must hold 1 to {self.classifier_config.context} tokens")
        if not (min(ids) >= 0 and max(ids) < base.vocab_size):
            raise InvalidSequenceError(f"prompt holds a token id outside 0 … {base.vocab_size - 1}")
        self._waiting.append(request)

    def abort(self, request_id: int) -> None:
        """Forget a text that waits; harmless for any other id."""
        self._waiting = deque(request for request in self._waiting if request.request_id != request_id)

    def step(self) -> StepOutput:
        """Label the texts that have waited longest, as many as fit a batch."""
        started = time.monotonic()
        batch = self._next_batch()
        if not batch:
            return StepOutput([], self.stats())
        try:
            scores = self._classifier.probabilities([request.prompt_token_ids for request in batch]).tolist()
        except (torch.OutOfMemoryError, MemoryError):
            logger.exception("a batch of %d texts ran out of memory; its requests are ended", len(batch))
            failed = [SequenceOutput(request.request_id, [], finish_reason="error") for request in batch]
            return StepOutput(failed, self.stats())
        num_tokens = sum(len(request.prompt_token_ids) for request in batch)
        self._num_steps += 1
        self._num_tokens += num_tokens
        finished = time.monotonic()
        outputs = [
            SequenceOutput(
                request.request_id, [], finish_reason="stop", scores=row,
                timings=RequestTimings(request.arrival_time, started, finished, finished, 0),
            )
            for request, row in zip(batch, scores, strict=True)
        ]  # fmt: skip
        return StepOutput(outputs, self.stats(), num_tokens)

    def stats(self) -> EngineStats:
        return EngineStats(num_waiting=len(self._waiting), num_steps=self._num_steps, prompt_tokens=self._num_tokens)

    def _next_batch(self) -> list[AddRequest]:
        """In order of arrival; the rows are filled up to the longest, and all of that counts as tokens of the step."""
        batch: list[AddRequest] = []
        longest = 0
        while self._waiting and len(batch) < self._max_num_seqs:
            longest = max(longest, len(self._waiting[0].prompt_token_ids))
            if batch and longest * (len(batch) + 1) > self._max_num_batched_tokens:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _describe(self, folder: Path, num_parameters: int, load_seconds: float) -> EngineInfo:
        manifest, config = read_manifest(folder), self.classifier_config
        digest = weights_digest(folder) if manifest is None else manifest.weights
        model = ModelInfo(
            name=self.config.model_name,
            config=dataclasses.asdict(config.base),
            num_parameters=num_parameters,
            weights_digest=digest,
            provenance={"weights": digest} if manifest is None else manifest.describe(),
            task=CLASSIFICATION,
            labels=list(config.labels),
            pad_token_id=config.pad_token_id,
        )
        return EngineInfo(
            models=[model],
            device=self._device.type,
            device_name=device_name(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
            attention_backend="dense",
            block_size=self.config.block_size,
            num_blocks=0,
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            max_model_len=config.context,
            torch_version=str(torch.__version__),
            load_seconds=load_seconds,
        )
