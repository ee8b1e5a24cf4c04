"""The gate that a new checkpoint passes before it serves: readable, of the same tokenizer, itself, and no worse.

The candidate runs in an engine process of its own, at a low priority, which ends afterwards: whatever a damaged
checkpoint does there, the process that answers requests is not in it. Free of torch.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from model.config import ModelConfig
from model.errors import QuillError
from model.hf_config import load_config
from model.manifest import verify_files
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.engine.client import AsyncEngine
from server.engine.config import EngineConfig
from server.engine.interface import EngineClient, EngineRequestError, EngineUnavailableError
from server.engine.messages import FAILED, EngineInfo, SelfCheckResult
from server.memory import available_memory
from server.watch import FoundCheckpoint

SWAPPED, WORSE, DAMAGED, INCOMPATIBLE = "swapped", "worse", "damaged", "incompatible"
SELF_CHECK, CANARY, NO_MEMORY, FAILED_TO_LOAD = "self_check_failed", "canary_failed", "no_memory", "failed"
VERDICTS = (SWAPPED, WORSE, DAMAGED, INCOMPATIBLE, SELF_CHECK, CANARY, NO_MEMORY, FAILED_TO_LOAD)
"""What an attempt to serve a checkpoint came to. The last two may end differently when it is tried again."""

_CANARY_TOKENS = 32
_NICENESS = 10  # a tenth of a core that streams keep busy
_GATE_TOKENS = 256  # in a step
_START_SECONDS = 300.0
# What a process takes beside the weights, and what is left to others.
_SPARE_BYTES = 512 << 20
_MakeEngine = Callable[[EngineConfig], EngineClient]


@dataclass(frozen=True, slots=True)
class Sample:
    """What a model is measured by: windows of held-out text, each of at least two tokens, and the canary's prompt."""

    windows: list[list[int]]
    canary: list[int]


@dataclass(frozen=True, slots=True)
class Measured:
    """`loss` in nats per token of the sample's windows; `canary` what the model says greedily after its prompt."""

    loss: float
    canary: list[int]


@dataclass(frozen=True, slots=True)
class Judgement:
    """`reason` is a sentence, None for SWAPPED: it then only says that the candidate may be swapped in."""

    verdict: str
    reason: str | None = None
    measured: Measured | None = None
    self_check: SelfCheckResult = field(default_factory=SelfCheckResult)


async def measure(engine: EngineClient, sample: Sample, model: str | None = None) -> Measured:
    """One window at a time, with a pause as long as each took, so that an engine that serves is not held up.

    Raises EngineRequestError where the model's logits are no numbers, EngineUnavailableError, QueueFullError.
    """
    loop = asyncio.get_running_loop()
    total, count = 0.0, 0
    for window in sample.windows:
        started = loop.time()
        stream = engine.submit(window, SamplingParams(max_tokens=0), prompt_logprobs=0, model=model)
        async for output in stream:
            entries = output.prompt_logprobs or []
            total -= math.fsum(entry.logprob for entry in entries)
            count += len(entries)
        await asyncio.sleep(loop.time() - started)
    return Measured(total / count, await _say(engine, sample.canary, model))


async def _say(engine: EngineClient, prompt: list[int], model: str | None) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=_CANARY_TOKENS, ignore_eos=True)
    said: list[int] = []
    async for output in engine.submit(prompt, params, model=model):
        said += output.token_ids
    return said


class Gate:
    """Judges candidates for one served model, by its tokenizer and its configuration."""

    def __init__(
        self, config: EngineConfig, model: ModelConfig, num_parameters: int, tokenizer: Tokenizer, sample: Sample,
        tolerance: float, make_engine: _MakeEngine | None = None,
    ) -> None:  # fmt: skip
        """`config` is the live engine's, `tolerance` by how many nats per token a candidate may be worse."""
        self._config, self._model, self._tokenizer = config, model, tokenizer
        self._sample, self._tolerance = sample, tolerance
        # At 4 bytes a parameter and twice for a moment, while weights are laid out for the kernels.
        self._needed_bytes = 2 * 4 * num_parameters + _SPARE_BYTES
        self._make_engine = make_engine or _low_priority_engine

    async def judge(self, found: FoundCheckpoint, live: Measured) -> Judgement:
        """SWAPPED where the candidate may take over."""
        early = await asyncio.to_thread(self._look, found)
        return early or await self._try(found, live)

    def _look(self, found: FoundCheckpoint) -> Judgement | None:
        """What the files alone tell."""
        if found.manifest is None:
            return Judgement(DAMAGED, found.problem)
        try:
            verify_files(found.folder, found.manifest)
            model, tokenizer = load_config(found.folder), Tokenizer.load(found.folder)
        except (QuillError, OSError) as error:
            return Judgement(DAMAGED, str(error))
        if tokenizer.digest != self._tokenizer.digest or tokenizer.eos_token_id != self._tokenizer.eos_token_id:
            return Judgement(INCOMPATIBLE, "its tokenizer is not the one that is served; restart to serve it")
        if dataclasses.replace(model, dropout=self._model.dropout) != self._model:
            return Judgement(INCOMPATIBLE, "its shape is not that of the model that is served; restart to serve it")
        return self._memory_problem()

    def _memory_problem(self) -> Judgement | None:
        free, needed = available_memory(), self._needed_bytes
        if free is None or needed <= free:
            return None
        reason = f"loading it beside the live weights takes up to {needed >> 20}MiB, and {free >> 20}MiB are free"
        return Judgement(NO_MEMORY, reason)

    async def _try(self, found: FoundCheckpoint, live: Measured) -> Judgement:
        engine = self._make_engine(self._candidate_config(found.folder))
        try:
            await engine.start()
            async with asyncio.timeout(_START_SECONDS):
                await engine.wait_ready()
            assert engine.info is not None, "an engine that is ready has said what it serves"
            return await self._examine(engine, engine.info, live)
        except EngineUnavailableError:
            return Judgement(DAMAGED, engine.fault)
        except (EngineRequestError, TimeoutError):
            return Judgement(CANARY, "it does not answer: its logits are no numbers, or it takes too long")
        finally:
            await engine.close()

    async def _examine(self, engine: EngineClient, info: EngineInfo, live: Measured) -> Judgement:
        check = info.models[0].self_check
        if check.status == FAILED:
            return Judgement(SELF_CHECK, check.reason, None, check)
        measured = await measure(engine, self._sample)
        if not math.isfinite(measured.loss) or len(measured.canary) < _CANARY_TOKENS:
            return Judgement(CANARY, "its logits are no numbers", None, check)
        if measured.loss > live.loss + self._tolerance:
            reason = f"its loss of {measured.loss:.4f} is worse than the live one's {live.loss:.4f}"
            return Judgement(WORSE, f"{reason} by more than {self._tolerance:g}", measured, check)
        if len(set(measured.canary)) == 1 < len(set(live.canary)):
            return Judgement(CANARY, "after the canary's prompt it says one token over and over", measured, check)
        return Judgement(SWAPPED, None, measured, check)

    def _candidate_config(self, folder: Path) -> EngineConfig:
        """The live engine's kernels and types, in little room."""
        context = max(len(window) for window in (*self._sample.windows, self._sample.canary)) + _CANARY_TOKENS
        return dataclasses.replace(
            self._config,
            model_path=str(folder),
            further_models=(),
            max_model_len=min(context, self._model.max_seq_len),
            max_num_seqs=4,
            max_num_batched_tokens=_GATE_TOKENS,
            kv_cache_memory=None,
            prefix_caching=False,
            cuda_graphs=False,
            speculation=False,
            deterministic=False,
            strict_self_check=False,
        )


def _low_priority_engine(config: EngineConfig) -> EngineClient:
    return AsyncEngine(config, max_queued_requests=1, niceness=_NICENESS)
