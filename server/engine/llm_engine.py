"""LLMEngine: requests in, tokens out, one step at a time. Synchronous; knows token ids only."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from model.errors import ConfigError
from model.manifest import read_manifest, weights_digest
from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig
from server.engine.counters import Counters
from server.engine.grammar_queue import GrammarQueue
from server.engine.invariance import InvarianceCheck
from server.engine.launched_step import LaunchedStep, RunOutput
from server.engine.messages import (
    NO,
    UNCHECKED,
    YES,
    AddRequest,
    EngineInfo,
    EngineStats,
    ModelInfo,
    ModelStats,
    RequestTrace,
    SequenceOutput,
    StepOutput,
)
from server.engine.model_runner import ModelRunner
from server.engine.outputs import finished_output, logprobs_by_request, make_output, trace_step
from server.engine.runners import Runners, load_runners
from server.engine.scheduler import ScheduledBatch, Scheduler
from server.engine.self_check import require_no_failure, run_self_check
from server.engine.sequence import InvalidSequenceError, Sequence

logger = logging.getLogger(__name__)

# Seconds to wait for a grammar in a step that has nothing else to do; requests that arrive wait with it.
_GRAMMAR_WAIT = 0.005
# Steps in a row in which every request failed; then something is wrong with more than the requests.
_MAX_FAILED_STEPS = 3


@dataclass(frozen=True, slots=True)
class _Step:
    """One generation's part of a step, under way; `launched` is None where that failed."""

    batch: ScheduledBatch
    runner: ModelRunner
    launched: LaunchedStep | None


class LLMEngine:
    """One scheduler over the model runners of one or several checkpoints, which share the memory of the KV cache.

    Raises QuillError (ConfigError, CheckpointError, …) for a folder or a setting that cannot be run.
    """

    def __init__(self, config: EngineConfig) -> None:
        started = time.monotonic()
        self.config = config
        self.runners = Runners(load_runners(config))
        limits = self.runner.limits
        self.block_manager = BlockManager(limits.num_blocks, limits.block_size, config.prefix_caching)
        self.scheduler = Scheduler(
            self.block_manager,
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            limits.max_model_len,
            max_draft_rows=self._max_draft_rows(self.runner),
        )
        # What the device still computes while the next step is scheduled.
        self._under_way: list[_Step] = []
        self._grammars = GrammarQueue(time.monotonic)
        for name in self.runners.names[1:]:
            self._add_generation(self.runners.current[name])
        self._checks = [
            InvarianceCheck(self.runners[generation], self.block_manager, generation)
            for generation in self.runners.current.values()
        ]
        self._answers: list[str] = []
        self.info = self._describe(time.monotonic() - started)
        self._num_failed_steps = 0
        if config.strict_self_check:
            for model in self.info.models:
                require_no_failure(model)
        if config.deterministic:
            self._require_determinism()

    @property
    def runner(self) -> ModelRunner:
        """That of the model which requests get that name none."""
        return self.runners.first

    @property
    def invariance(self) -> InvarianceCheck:
        """The check that is under way."""
        return self._checks[0]

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished or len(self._grammars) > 0 or bool(self._under_way)

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises InvalidSequenceError, naming the field, for one that cannot be run."""
        generation = self.runners.generation(request.model, request.weights)
        runner = self.runners[generation]
        vocab_size = runner.model_config.vocab_size
        ids = request.prompt_token_ids
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            raise InvalidSequenceError(f"prompt holds a token id outside 0 … {vocab_size - 1}")
        if any(not 0 <= token_id < vocab_size for token_id in request.params.logit_bias):
            raise InvalidSequenceError(f"logit_bias holds a token id outside 0 … {vocab_size - 1}")
        seq = Sequence(
            request.request_id,
            ids,
            request.params,
            runner.model_config.eos_token_ids,
            runner.limits.max_model_len,
            request.arrival_time,
            request.deadline,
            request.prompt_logprobs,
            request.prompt_logprobs_start,
            generation,
        )
        seq.pool, seq.explain = request.pool, request.explain
        if self.config.trace_requests:
            seq.trace = RequestTrace()
        if request.params.grammar is None or seq.score_only:
            self.scheduler.add(seq)
        else:
            self._grammars.add(seq, runner.grammars)

    def abort(self, request_id: int) -> None:
        """End a request in any state; its blocks are free at once. Harmless for unknown ids."""
        self._grammars.discard(request_id)
        self.scheduler.abort(request_id)

    def step(self) -> StepOutput:
        """Run one step. Requests that ended or got tokens are in its outputs.

        Where the engine runs ahead, the step is only launched, on tokens that may still be on the device, and the
        outputs are those of the step before it. A sequence whose last token turns out to be its end has then been
        computed once too often, which nobody sees.
        """
        ended = self._admit_grammars()
        batch = self.scheduler.schedule()
        outputs = [finished_output(seq) for seq in [*ended, *batch.expired]]
        before, self._under_way = self._under_way, []
        if not batch.is_empty:
            for generation, part in batch.by_generation():
                self._under_way.append(self._launch(part, self.runners[generation]))
        for step in before:
            outputs += self._settle(step)
        if not self._may_run_ahead(batch):
            before, self._under_way = self._under_way, []
            for step in before:
                outputs += self._settle(step)
        self._drop_replaced()
        return StepOutput(outputs, self.stats(), batch.num_tokens)

    def _may_run_ahead(self, batch: ScheduledBatch) -> bool:
        if any(step.launched is None for step in self._under_way):
            return False
        return self.runner.runs_ahead and not batch.waits_for_tokens

    def _admit_grammars(self) -> list[Sequence]:
        """Queue the sequences whose grammars are compiled; those that ended before their turn."""
        ready, ended = self._grammars.take(0.0 if self.scheduler.has_unfinished else _GRAMMAR_WAIT)
        for seq in ready:
            self.scheduler.add(seq)
        return ended

    def advance_check(self) -> bool:
        """Run one step of the check whether tokens depend on their load, between requests only: the engine must have
        none. True when `info` has its answer."""
        assert not self.has_unfinished, "the check needs the blocks that requests would hold"
        answer = self.invariance.advance()
        if answer is None:
            return False
        self._answers.append(answer)
        if len(self._checks) > 1:
            del self._checks[0]
            return False
        worst = next((each for each in (NO, UNCHECKED) if each in self._answers), YES)
        self.info = msgspec.structs.replace(self.info, deterministic=worst)
        return True

    def replace_runner(self, name: str, runner: ModelRunner, info: ModelInfo | None = None) -> None:
        """Between two steps, answer for `name` with other weights, as `runners.load_beside` loads them. Sequences that
        have been added finish on the old ones; nothing that these computed is found by later ones.

        With `info`, which then describes the new weights, requests may still name the old ones until they are released.
        Raises InvalidSequenceError for a name that is not served.
        """
        described = info or self.describe_model(name, runner)
        old, new = self.runners.replace(name, runner)
        self._add_generation(new)
        self.block_manager.retire_generation(old)
        replaced = next(each for each in self.info.models if each.name == name)
        if info is not None:
            self.runners.hold(old, replaced.weights_digest)
        models = [described if each is replaced else each for each in self.info.models]
        self.info = msgspec.structs.replace(self.info, models=models)
        self._drop_replaced()

    def release_weights(self, name: str, weights: str) -> None:
        """No request will name these replaced weights any more."""
        self.runners.release(name, weights)
        self._drop_replaced()

    def describe_model(self, name: str, runner: ModelRunner) -> ModelInfo:
        """What `info` says of a model. Raises CheckpointError for a folder that changed since it was loaded."""
        folder = Path(runner.config.model_path)
        manifest = read_manifest(folder)
        digest = weights_digest(folder) if manifest is None else manifest.weights
        return ModelInfo(
            name=name,
            config=dataclasses.asdict(runner.model_config),
            num_parameters=runner.num_parameters,
            weights_digest=digest,
            provenance={"weights": digest} if manifest is None else manifest.describe(),
            max_model_len=runner.limits.max_model_len,
        )

    def _add_generation(self, generation: int) -> None:
        runner = self.runners[generation]
        self.block_manager.add_generation(generation, runner.limits.block_size)
        self.scheduler.add_generation(generation, runner.limits.max_model_len, self._max_draft_rows(runner))

    def _max_draft_rows(self, runner: ModelRunner) -> int:
        """Guesses need the tokens before them."""
        return runner.max_draft_rows if self.config.speculation and not runner.runs_ahead else 0

    def _drop_replaced(self) -> None:
        for generation in self.runners.replaced:
            if generation not in self._grammars.generations and not any(self.scheduler.count_unfinished(generation)):
                self.runners.drop(generation)

    def stats(self) -> EngineStats:
        scheduler, blocks = self.scheduler, self.block_manager
        total = scheduler.total()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free_blocks,
            num_steps=scheduler.num_steps,
            num_preemptions=total.num_preemptions,
            prompt_tokens=total.prompt_tokens,
            generation_tokens=total.generation_tokens,
            prefix_cache_queries=blocks.prefix_cache_queries,
            prefix_cache_hits=blocks.prefix_cache_hits,
            spec_decode_num_drafts=total.num_drafts,
            spec_decode_num_draft_tokens=total.num_draft_tokens,
            spec_decode_num_accepted_tokens=total.num_accepted_tokens,
            models=[self._model_stats(name) for name in self.runners.names] if len(self.runners.names) > 1 else [],
        )

    def _model_stats(self, name: str) -> ModelStats:
        total, num_running, num_waiting = Counters(), 0, 0
        generations = self.runners.generations(name)
        for generation in generations:
            total.add(self.scheduler.counters[generation])
            running, waiting = self.scheduler.count_unfinished(generation)
            num_running, num_waiting = num_running + running, num_waiting + waiting
        return ModelStats(
            name,
            num_running=num_running,
            num_waiting=num_waiting,
            prefix_cache_queries=sum(self.block_manager.queries[each] for each in generations),
            prefix_cache_hits=sum(self.block_manager.hits[each] for each in generations),
            num_preemptions=total.num_preemptions,
            prompt_tokens=total.prompt_tokens,
            generation_tokens=total.generation_tokens,
            spec_decode_num_drafts=total.num_drafts,
            spec_decode_num_draft_tokens=total.num_draft_tokens,
            spec_decode_num_accepted_tokens=total.num_accepted_tokens,
        )

    def _launch(self, batch: ScheduledBatch, runner: ModelRunner) -> _Step:
        try:
            launched = runner.launch(batch)
        except Exception as error:
            if not self._is_survivable(error):
                raise
            logger.exception("a step of %d tokens failed; its requests are run one by one", batch.num_tokens)
            return _Step(batch, runner, None)
        self.scheduler.advance(batch)
        return _Step(batch, runner, launched)

    def _settle(self, step: _Step) -> list[SequenceOutput]:
        """Wait for a step and take in what it computed."""
        if step.launched is None:
            return self._run_one_by_one(step.batch, step.runner)
        result = step.launched.wait()
        self._num_failed_steps = 0
        return self._take(step.batch, result)

    def _run_one_by_one(self, batch: ScheduledBatch, runner: ModelRunner) -> list[SequenceOutput]:
        """After a step that failed: whoever fails alone too is ended, the others lose nothing."""
        outputs: list[SequenceOutput] = []
        num_failed = 0
        for row, seq in enumerate(batch.sequences):
            if seq.is_finished:
                continue
            runner.forget_sampling()
            alone = batch.row(row)
            try:
                launched = runner.launch(alone)
                self.scheduler.advance(alone)
                outputs += self._take(alone, launched.wait())
            except Exception as error:
                if not self._is_survivable(error):
                    raise
                logger.exception("request %d is ended: its step failed", seq.request_id)
                self.scheduler.abort(seq.request_id, "error")
                outputs.append(finished_output(seq))
                num_failed += 1
        runner.forget_sampling()
        self._num_failed_steps = self._num_failed_steps + 1 if num_failed == len(batch.sequences) else 0
        return outputs

    def _is_survivable(self, error: Exception) -> bool:
        """Whether to go on: not on a device that may be in any state, nor when nothing at all works any more."""
        if self._num_failed_steps >= _MAX_FAILED_STEPS:
            return False
        return self.runner.device.type == "cpu" or isinstance(error, (torch.OutOfMemoryError, MemoryError))

    def _take(self, batch: ScheduledBatch, result: RunOutput) -> list[SequenceOutput]:
        logprobs = logprobs_by_request(batch, result.logprobs)
        guessing = trace_step(batch) if self.config.trace_requests else []
        updates = self.scheduler.settle(batch, result.token_ids)
        for seq, tokens, _ in updates:
            if seq.trace is not None and seq.request_id in guessing:
                seq.trace.num_accepted_tokens += max(0, len(tokens) - 1)
        return [
            make_output(
                seq,
                tokens,
                finished,
                logprobs[seq.request_id][: len(tokens)] if seq.request_id in logprobs else None,
                result.prompt_logprobs.get(seq.request_id),
                result.explained.get(seq.request_id),
            )
            for seq, tokens, finished in updates
        ]

    def _require_determinism(self) -> None:
        """Raises ConfigError unless the check answers yes."""
        while not self.advance_check():
            pass
        if self.info.deterministic == NO:
            raise ConfigError("deterministic cannot be had here: a larger step gave other logits; start without it")
        if self.info.deterministic != YES:
            raise ConfigError("deterministic cannot be checked: raise max_num_seqs to 4, max_num_batched_tokens to 64")

    def _describe(self, load_seconds: float) -> EngineInfo:
        runner, limits = self.runner, self.runner.limits
        models = []
        for name, generation in self.runners.current.items():
            each = self.runners[generation]
            manifest = read_manifest(Path(each.config.model_path))
            expected = None if manifest is None else manifest.self_check
            check = run_self_check(each, expected, self.config.quantization)
            models.append(msgspec.structs.replace(self.describe_model(name, each), self_check=check))
        return EngineInfo(
            models=models,
            device=runner.device.type,
            device_name=runner.device_name,
            dtype=str(runner.dtype).removeprefix("torch."),
            attention_backend=runner.backend.name,
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            torch_version=str(torch.__version__),
            load_seconds=load_seconds,
        )
