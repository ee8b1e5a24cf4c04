"""The gate and the watcher over scripted engines: every verdict, what is remembered, what is tried again."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from model.hf_config import load_config
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.engine.config import EngineConfig
from server.engine.interface import EngineUnavailableError
from server.engine.messages import FAILED, SelfCheckResult, WeightsLoaded
from server.memory import available_memory
from server.reload_gate import Gate, Judgement, Measured, Sample, measure
from server.reloads import Reloads
from server.watch import FoundCheckpoint, WatchedFolder
from server.watcher import Watcher
from tests.server.checkpoints import save_step, touch_later
from tests.server.fake_engine import FakeEngine, Plan, fake_prompt_logprob, says

pytestmark = pytest.mark.anyio

SAMPLE = Sample(windows=[[1, 2, 3, 4], [5, 6]], canary=[1, 2])
LIVELY = says("the canary sings a song of thirty-two tokens and more")
LIVE = Measured(100.0, [1, 2, 3])


class Candidate(FakeEngine):
    """An engine that takes weights."""

    def __init__(self, script: Callable[[list[int], SamplingParams], Plan] = LIVELY, **values: Any) -> None:
        super().__init__(script, **values)
        self.loads: list[str] = []
        self.load_result: str | None = None

    async def load_weights(self, model: str, folder: str, weights: str, self_check: SelfCheckResult) -> WeightsLoaded:
        self.loads.append(weights)
        if self.load_result is None:
            models = [msgspec.structs.replace(self._info.models[0], weights_digest=weights, self_check=self_check)]
            self._info = msgspec.structs.replace(self._info, models=models)
        return WeightsLoaded(model, weights, self.load_result, 0.1)


def run(scenario: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await scenario

    return asyncio.run(main())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_step(tmp_path / "run" / "checkpoints" / "last", 1, sharpness=1.0)


def found(folder: Path) -> FoundCheckpoint:
    checkpoint = WatchedFolder(folder).newest()
    assert checkpoint is not None
    return checkpoint


@dataclass
class Setup:
    gate: Gate
    configs: list[EngineConfig]


def gate(folder: Path, make: Callable[[], FakeEngine] = Candidate, *, tolerance: float = 0.01, size: int = 10) -> Setup:
    configs: list[EngineConfig] = []

    def start(config: EngineConfig) -> FakeEngine:
        configs.append(config)
        engine = make()
        if engine.state == "ready":
            engine._state = "loading"
        return engine

    config = EngineConfig("live", "tiny", device="cpu", quantization="int8", num_threads=3, strict_self_check=True)
    made = Gate(config, load_config(folder), size, Tokenizer.bytes(), SAMPLE, tolerance, start)
    return Setup(made, configs)


def test_the_loss_is_the_mean_over_all_predictions() -> None:
    measured = run(measure(FakeEngine(LIVELY), SAMPLE))
    values = [fake_prompt_logprob(window, i) for window in SAMPLE.windows for i in range(1, len(window))]
    assert measured.loss == pytest.approx(-sum(values) / len(values))
    assert measured.canary == list(b"the canary sings a song of thirt")


def test_a_candidate_that_is_no_worse_may_take_over(folder: Path) -> None:
    setup = gate(folder)
    loss = run(measure(FakeEngine(LIVELY), SAMPLE)).loss
    judgement = run(setup.gate.judge(found(folder), Measured(loss - 0.009, [1, 2])))
    assert (judgement.verdict, judgement.reason) == ("swapped", None)
    assert judgement.measured.loss == loss
    [config] = setup.configs
    # The kernels and types that will serve it, and little room.
    assert (config.model_path, config.quantization, config.num_threads) == (str(folder), "int8", 3)
    assert (config.strict_self_check, config.max_model_len) == (False, 36)
    worse = run(setup.gate.judge(found(folder), Measured(loss - 0.011, [1, 2])))
    assert worse.verdict == "worse"
    assert worse.measured.loss == loss


def refusing(**values: Any) -> Callable[[], FakeEngine]:
    return lambda: Candidate(**values)


def failed_check() -> FakeEngine:
    engine = Candidate()
    check = SelfCheckResult(FAILED, 0.7, 0.1, "its logits are off")
    models = [msgspec.structs.replace(engine._info.models[0], self_check=check)]
    engine._info = msgspec.structs.replace(engine._info, models=models)
    return engine


def no_numbers() -> FakeEngine:
    return Candidate(lambda prompt, params: Plan([[1]], fail_after=0))


def one_token() -> FakeEngine:
    return Candidate(lambda prompt, params: Plan([[7]] * params.max_tokens))


@pytest.mark.parametrize(
    ("make", "verdict", "words"),
    [
        (refusing(load_error="x/model.safetensors lacks a tensor", state="loading"), "damaged", "lacks a tensor"),
        (failed_check, "self_check_failed", "its logits are off"),
        (no_numbers, "canary_failed", "no numbers"),
        (one_token, "canary_failed", "one token over and over"),
    ],
)
def test_what_a_running_candidate_is_turned_down_for(
    folder: Path, make: Callable[[], FakeEngine], verdict: str, words: str
) -> None:
    judgement = run(gate(folder, make).gate.judge(found(folder), LIVE))
    assert judgement.verdict == verdict
    assert words in str(judgement.reason)


def test_one_token_over_and_over_is_let_pass_where_the_live_model_does_so_too(folder: Path) -> None:
    assert run(gate(folder, one_token).gate.judge(found(folder), Measured(100.0, [3, 3, 3]))).verdict == "swapped"


def test_what_the_files_tell_needs_no_engine(folder: Path, tmp_path: Path) -> None:
    setup = gate(folder)

    def verdict(folder: Path) -> Judgement:
        judgement: Judgement = run(setup.gate.judge(found(folder), LIVE))
        return judgement

    other = save_step(tmp_path / "other", 2, sharpness=1.0, tokenizer=Tokenizer.characters("ab"))
    assert verdict(other).verdict == "incompatible"
    missing = tmp_path / "missing"
    shutil.copytree(folder, missing)
    (missing / "tokenizer.json").unlink()
    assert verdict(missing).verdict == "damaged"
    assert "tokenizer.json" in str(verdict(missing).reason)
    (missing / "manifest.json").write_text("{")
    assert verdict(missing).verdict == "damaged"
    assert run(gate(folder, size=1 << 50).gate.judge(found(folder), LIVE)).verdict == "no_memory"
    assert setup.configs == []


def watcher(folder: Path, engine: Candidate, setup: Setup) -> tuple[Watcher, Reloads]:
    reloads = Reloads("tiny", "run")
    return Watcher(engine, WatchedFolder(folder.parent.parent), setup.gate, SAMPLE, reloads, 0.01), reloads


async def test_a_checkpoint_takes_over_once(folder: Path) -> None:
    engine, setup = Candidate(), gate(folder)
    watch, reloads = watcher(folder, engine, setup)
    attempt = await watch.poll()
    assert attempt is not None
    assert (attempt.verdict, attempt.checkpoint, attempt.step) == ("swapped", "last", 1)
    assert engine.loads == [attempt.weights] == [reloads.live_weights]
    assert reloads.live is not None
    assert reloads.live.loss == attempt.loss == attempt.live_loss
    assert await watch.poll() is None
    assert len(setup.configs) == 1


async def test_the_rejected_are_remembered_until_there_is_something_else(folder: Path) -> None:
    engine, setup = Candidate(), gate(folder, tolerance=-50.0)  # no candidate is so much better
    watch, reloads = watcher(folder, engine, setup)
    for _ in range(3):
        await watch.poll()
    assert reloads.counts["worse"] == 1
    link = folder.with_name("step-1")
    shutil.copytree(folder, link)
    touch_later(link, 5)
    assert await watch.poll() is None  # the same weights under another name
    save_step(folder, 2, sharpness=0.5)
    touch_later(folder, 10)
    assert (await watch.poll()) is not None
    assert reloads.counts["worse"] == 2
    assert engine.loads == []


async def test_a_copy_in_progress_is_tried_again_when_it_is_whole(folder: Path) -> None:
    engine, setup = Candidate(), gate(folder)
    watch, reloads = watcher(folder, engine, setup)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    for _ in range(3):
        await watch.poll()
    assert reloads.counts["damaged"] == 1
    assert reloads.last_attempt is not None
    assert "last/model.safetensors" in str(reloads.last_attempt.reason)
    assert str(folder) not in str(reloads.last_attempt.reason)
    (folder / "model.safetensors").write_bytes(whole)
    attempt = await watch.poll()
    assert attempt is not None
    assert attempt.verdict == "swapped"


async def test_what_fails_while_loading_is_tried_again_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, setup = Candidate(), gate(folder)
    watch, reloads = watcher(folder, engine, setup)
    engine.load_result = "no memory"
    assert (await watch.poll()) is not None
    assert reloads.counts["failed"] == 1
    assert await watch.poll() is None
    assert reloads.live_weights == "sha256:abc"
    monkeypatch.setattr(watch, "_retry_at", 0.0)
    engine.load_result = None
    attempt = await watch.poll()
    assert attempt is not None
    assert attempt.verdict == "swapped"


async def test_nothing_stops_the_watcher(folder: Path) -> None:
    engine, setup = Candidate(state="loading"), gate(folder)
    watch, reloads = watcher(folder, engine, setup)
    with pytest.raises(EngineUnavailableError):
        await watch.poll()
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(0.05)
    engine._state = "ready"
    async with asyncio.timeout(10):
        while reloads.counts["swapped"] == 0:  # noqa: ASYNC110 — what is awaited is a number
            await asyncio.sleep(0.01)
    task.cancel()


def test_memory_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  1000 kB\nMemAvailable:     600 kB\n")
    assert available_memory(meminfo, tmp_path) == 600 << 10
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_memory(meminfo, tmp_path) == 600 << 10
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 500\n")
    assert available_memory(meminfo, tmp_path) == 4500
    assert available_memory(tmp_path / "no", tmp_path / "such") is None
