"""Weights that are replaced in the engine's process while it answers: nobody notices, nobody gets a mixture."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import torch

from model.checkpoint import load_model, save_model
from model.generate import generate
from model.manifest import weights_digest
from model.packed_model import pack_model
from model.sampling_params import SamplingParams
from server.engine.client import AsyncEngine
from server.engine.config import EngineConfig
from server.engine.interface import EngineUnavailableError
from server.engine.leases import WeightsLeases
from server.engine.messages import PASSED, EngineInfo, SelfCheckResult, WeightsLoaded
from tests.engine.conftest import MODELS, make_checkpoint
from tests.server.fake_engine import fake_info

PATIENCE = 60.0
NAME = "test"
CHECK = SelfCheckResult(PASSED, 0.0, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one shape."""
    root = tmp_path_factory.mktemp("reload")
    old = make_checkpoint(MODELS["llama"], root / "old")
    model = load_model(old)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1).add_(0.01)
    save_model(root / "new", model, dtype=torch.float32)
    return old, root / "new"


def run(folder: Path, scenario: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        config = EngineConfig(str(folder), NAME, device="cpu", dtype="float32", num_threads=1, max_num_seqs=64)
        engine = AsyncEngine(config, 64, niceness=1)
        await engine.start()
        try:
            async with asyncio.timeout(PATIENCE):
                await engine.wait_ready()
                await scenario(engine)
        finally:
            await engine.close()

    asyncio.run(main())


async def load(engine: AsyncEngine, folder: Path) -> WeightsLoaded:
    return await engine.load_weights(NAME, str(folder), weights_digest(folder), CHECK)


def served(engine: AsyncEngine) -> str:
    assert engine.info is not None
    return engine.info.models[0].weights_digest


@dataclass
class Stream:
    """One request and what came of it; `weights` are those it names, None for whatever is served."""

    prompt: list[int]
    params: SamplingParams
    weights: str | None = None

    async def collect(self, engine: AsyncEngine) -> list[int]:
        tokens: list[int] = []
        async for output in engine.submit(self.prompt, self.params, weights=self.weights):
            assert output.finish_reason in (None, "length")
            tokens += output.token_ids
        return tokens


def stream(number: int, max_tokens: int = 100) -> Stream:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.8, seed=number, ignore_eos=True)
    return Stream([number + 1, 7, (3 * number + 2) % 200], params)


def alone(folder: Path, streams: list[Stream]) -> list[list[int]]:
    model = pack_model(load_model(folder, dtype=torch.float32))
    return [generate(model, each.prompt, each.params).token_ids for each in streams]


def test_every_stream_is_entirely_of_one_set_of_weights(folders: tuple[Path, Path]) -> None:
    """32 under way when the new weights arrive, 24 started while they load, and 8 after the swap."""
    old, new = folders
    before = [stream(number, 120) for number in range(32)]
    during = [stream(100 + number, 30) for number in range(24)]
    after = [replace(each) for each in before[:8]]
    answers: dict[str, list[list[int]]] = {}

    async def scenario(engine: AsyncEngine) -> None:
        running = [asyncio.create_task(each.collect(engine)) for each in before]
        await asyncio.sleep(0.05)
        loading = asyncio.create_task(load(engine, new))
        during_tasks = []
        for each in during:
            each.weights = served(engine)  # what the client knows at this moment
            during_tasks.append(asyncio.create_task(each.collect(engine)))
            await asyncio.sleep(0.003)
        assert (await loading).error is None
        assert sum(not each.done() for each in running) > 0, "streams must be under way when weights are swapped"
        assert served(engine) == weights_digest(new)
        assert engine.info is not None
        assert engine.info.models[0].self_check == CHECK
        answers["after"] = await asyncio.gather(*(each.collect(engine) for each in after))
        answers["during"] = await asyncio.gather(*during_tasks)
        answers["before"] = await asyncio.gather(*running)
        assert engine.stats.num_free_blocks == engine.stats.num_blocks

    run(old, scenario)
    assert answers["before"] == alone(old, before)
    assert answers["after"] == alone(new, after)
    assert answers["after"] != answers["before"][:8]
    digests = {weights_digest(folder): folder for folder in (old, new)}
    for each, tokens in zip(during, answers["during"], strict=True):
        assert each.weights is not None
        assert [tokens] == alone(digests[each.weights], [each])


def test_weights_that_are_held_can_be_named_until_they_are_released(folders: tuple[Path, Path]) -> None:
    old, new = folders
    request = stream(3, 12)
    [expected_old], [expected_new] = alone(old, [request]), alone(new, [request])

    async def scenario(engine: AsyncEngine) -> None:
        lease = engine.hold_weights()
        assert lease.weights == weights_digest(old)
        assert (await load(engine, new)).error is None
        named = replace(request, weights=lease.weights)
        assert await named.collect(engine) == expected_old
        assert await request.collect(engine) == expected_new
        lease.release()
        assert await named.collect(engine) == expected_new  # the old ones are gone

    run(old, scenario)


def test_what_cannot_be_loaded_leaves_all_as_it_is(folders: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = folders
    request = stream(5, 12)
    [expected] = alone(old, [request])
    broken = tmp_path / "broken"
    shutil.copytree(new, broken)
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-3] ^= 0xFF
    (broken / "model.safetensors").write_bytes(data)
    other = make_checkpoint(MODELS["gpt2"], tmp_path / "other")

    async def scenario(engine: AsyncEngine) -> None:
        damaged = await load(engine, broken)
        assert "differs from its sha256" in str(damaged.error)
        assert "another shape" in str((await load(engine, other)).error)
        exchanged = await engine.load_weights(NAME, str(new), "sha256:of-what-was-judged", CHECK)
        assert "was replaced while it was being loaded" in str(exchanged.error)
        missing = await engine.load_weights(NAME, str(tmp_path / "nowhere"), "sha256:0", CHECK)
        assert "is not a folder" in str(missing.error)
        assert served(engine) == weights_digest(old)
        assert await request.collect(engine) == expected

    run(old, scenario)


def test_a_load_ends_when_the_engine_does(folders: tuple[Path, Path]) -> None:
    old, new = folders

    async def scenario(engine: AsyncEngine) -> None:
        loading = asyncio.create_task(load(engine, new))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineUnavailableError):
            await loading
        with pytest.raises(EngineUnavailableError):
            await load(engine, new)

    run(old, scenario)


def info_with(**weights: str) -> EngineInfo:
    info = fake_info(64, 257)
    models = [
        msgspec.structs.replace(info.models[0], name=name, weights_digest=digest) for name, digest in weights.items()
    ]
    return msgspec.structs.replace(info, models=models)


def test_replaced_weights_are_released_once_and_when_nobody_holds_them() -> None:
    released: list[tuple[str, str]] = []
    leases = WeightsLeases(lambda *which: released.append(which))
    assert leases.current(None) is None
    assert leases.hold().weights is None
    leases.update(info_with(a="1", b="7"))
    assert (leases.current(None), leases.current("b"), leases.current("c")) == ("1", "7", None)
    first, second = leases.hold(), leases.hold("a")
    leases.update(info_with(a="2", b="7"))
    first.release()
    first.release()
    assert released == []
    second.release()
    assert released == [("a", "1")]
    leases.hold("b").release()  # still served
    leases.update(info_with(a="3", b="8"))
    assert released == [("a", "1"), ("a", "2"), ("b", "7")]
