"""Several models in one engine: each answers as if it were alone, to the bit, from one KV cache."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import gpt2_config, llama_config
from model.errors import ConfigError
from model.sampling_params import SamplingParams
from server.engine.block_manager import BlockManager
from server.engine.config import EngineConfig, ModelSource
from server.engine.llm_engine import LLMEngine
from server.engine.messages import YES, AddRequest
from server.engine.runners import load_runners
from server.engine.sequence import InvalidSequenceError, Sequence
from server.engine.shared_cache import BlockLayout, first_slots, unit_bytes
from tests.engine.conftest import MODELS, VOCAB_SIZE
from tests.engine.mixed_load import (
    Answers,
    differing,
    make_engine,
    make_lively_checkpoint,
    mixed_requests,
    run_alone,
    run_under_load,
)

# Its block is an eighth of the others' and its context is shorter.
SMALL = llama_config(2, 4, 1, 64, 96, vocab_size=VOCAB_SIZE, max_seq_len=128)

# Its block is nearly as large as that of "gpt2".
WIDE = llama_config(3, 4, 4, 256, 320, vocab_size=VOCAB_SIZE, max_seq_len=160)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    configs = {"llama": MODELS["llama"], "gpt2": MODELS["gpt2"], "small": SMALL, "wide": WIDE}
    return {name: make_lively_checkpoint(config, root / name) for name, config in configs.items()}


def several(folders: dict[str, Path], precision: str = "float32", **changes: object) -> LLMEngine:
    first, *rest = [ModelSource(str(folder), name) for name, folder in folders.items()]
    engine = make_engine(Path(first.model_path), precision, further_models=tuple(rest), **changes)
    assert engine.runners.names == ["test", *(model.model_name for model in rest)]
    return engine


def trio(folders: dict[str, Path]) -> dict[str, Path]:
    return {name: folders[name] for name in ("llama", "gpt2", "small")}


def requests_for(names: list[str | None], count: int, seed: int) -> list[AddRequest]:
    """Mixed requests that fit every context, for the models in turn; half of them with long answers."""
    requests = mixed_requests(count, seed)
    return [
        msgspec.structs.replace(
            request,
            model=names[index % len(names)],
            prompt_token_ids=request.prompt_token_ids[:60],
            params=dataclasses.replace(request.params, max_tokens=60 if index % 2 else request.params.max_tokens),
        )
        for index, request in enumerate(requests)
    ]


def alone(folders: dict[str, Path], names: list[str], requests: list[AddRequest], precision: str) -> Answers:
    """Each request in an engine that has only its model."""
    answers: Answers = {}
    for place, name in enumerate(names):
        own = [msgspec.structs.replace(each, model=None) for each in requests[place :: len(names)]]
        answers |= run_alone(make_engine(folders[name], precision), own)
    return answers


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_each_answers_as_if_alone_while_they_preempt_each_other(folders: dict[str, Path], precision: str) -> None:
    chosen = {name: folders[name] for name in ("wide", "gpt2", "small")}
    requests = requests_for([None, "gpt2", "small"], 36, seed=5)
    expected = alone(folders, list(chosen), requests, precision)
    unit = _unit(several(chosen, precision))
    engine = several(chosen, precision, kv_cache_memory=18 * unit, speculation=True)
    answers = run_under_load(engine, requests, seed=1)
    assert not differing(answers, expected)
    stats = engine.stats()
    assert stats.num_blocks == 18
    assert stats.num_free_blocks == 18
    assert sum(model.num_preemptions for model in stats.models) == stats.num_preemptions > 1
    assert all(model.generation_tokens > 0 for model in stats.models)
    assert sum(model.generation_tokens for model in stats.models) == stats.generation_tokens
    # The same again finds its prefixes, and only those of its own model.
    assert not differing(run_under_load(engine, requests, seed=2), expected)
    assert engine.stats().prefix_cache_hits > 0


def _unit(engine: LLMEngine) -> int:
    """Bytes of a block that is handed out."""
    cache = engine.runner.cache
    return cache.keys[0].nbytes // cache.num_blocks


def test_equal_prompts_of_two_models_share_no_block(folders: dict[str, Path]) -> None:
    engine = several({name: folders[name] for name in ("llama", "gpt2")})
    prompt = list(range(150))
    params = SamplingParams(max_tokens=4, temperature=0.0)
    sizes = [engine.runners[generation].limits.block_size for generation in range(2)]
    assert sizes == [128, 16]
    for request_id, model in enumerate([None, "gpt2", None, "gpt2"]):
        engine.add(AddRequest(request_id, prompt, params, 0.0, model=model))
        while engine.has_unfinished:
            outputs = engine.step().outputs
        assert outputs[0].cached_tokens == (0, 0, 128, 144)[request_id]


def test_a_block_is_free_for_either_model(folders: dict[str, Path]) -> None:
    """One model alone may hold the whole cache, and then the other."""
    pair = {name: folders[name] for name in ("llama", "gpt2")}
    engine = several(pair, kv_cache_memory=10 * _unit(several(pair)))
    params = SamplingParams(max_tokens=158, temperature=0.0, ignore_eos=True)
    for model in (None, "gpt2"):
        for request_id in range(6):
            engine.add(AddRequest(request_id, [1, request_id], params, 0.0, model=model))
        least = 10
        while engine.has_unfinished:
            engine.step()
            least = min(least, engine.stats().num_free_blocks)
        assert least == 0


def test_every_model_is_checked_and_described(folders: dict[str, Path]) -> None:
    engine = several(trio(folders))
    while not engine.advance_check():
        pass
    assert engine.info.deterministic == YES
    assert [(model.name, model.max_model_len) for model in engine.info.models] == [
        ("test", 160), ("gpt2", 160), ("small", 128),
    ]  # fmt: skip
    assert len({model.weights_digest for model in engine.info.models}) == 3
    with pytest.raises(InvalidSequenceError, match="model must be one of"):
        engine.add(AddRequest(1, [1], SamplingParams(), 0.0, model="llama"))
    with pytest.raises(InvalidSequenceError, match="128"):
        engine.add(AddRequest(1, [1] * 128, SamplingParams(), 0.0, model="small"))


def test_a_smaller_model_has_more_tokens_in_a_block(folders: dict[str, Path]) -> None:
    engine = several(trio(folders))
    sizes = [engine.runners[generation].limits.block_size for generation in range(3)]
    blocks = [_block_bytes(engine, generation) for generation in range(3)]
    assert sizes[0] >= 16
    assert sizes[2] > sizes[1] == 16
    assert max(blocks) <= _unit(engine) * 1.01
    assert all(4 * block > 3 * max(blocks) or size == 128 for block, size in zip(blocks, sizes, strict=True))


def _block_bytes(engine: LLMEngine, generation: int) -> int:
    cache = engine.runners[generation].cache
    return sum(layer[0].nbytes for layer in (*cache.keys, *cache.values))


def test_a_budget_below_a_context_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_memory must be at least \d+MiB to hold one context of each"):
        several(folders, kv_cache_memory=100_000)


def test_max_model_len_bounds_each_context(folders: dict[str, Path]) -> None:
    engine = several(trio(folders), max_model_len=140)
    assert [model.max_model_len for model in engine.info.models] == [140, 140, 128]


def test_keys_and_values_of_unequal_size_cannot_be_shared(tmp_path: Path, folders: dict[str, Path]) -> None:
    odd = gpt2_config(1, 4, 4 * 24, vocab_size=VOCAB_SIZE, max_seq_len=64)
    folder = make_lively_checkpoint(odd, tmp_path / "odd")
    with pytest.raises(ConfigError, match="model odd cannot share a KV cache: its head_dim of 24"):
        several({"llama": folders["llama"], "odd": folder})
    several({"llama": folders["llama"], "odd": folder}, attention_backend="torch")


layouts = st.builds(
    lambda slot, layers: BlockLayout(16, (slot,), (slot,), 64 * slot, 2 * layers),
    st.integers(1, 40),
    st.integers(1, 30),
)


@given(st.lists(layouts, min_size=1, max_size=4), st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_blocks_of_all_models_lie_inside_their_units(models: list[BlockLayout], num_units: int) -> None:
    unit = unit_bytes(models)
    largest = max(models, key=lambda model: model.num_bytes)
    assert unit - largest.num_bytes <= max(model.slot_bytes for model in models)
    for model in models:
        starts = first_slots(model, unit, num_units).astype(np.int64) * model.slot_bytes
        bounds = np.arange(num_units) * unit
        assert (starts >= bounds).all()
        assert (starts + model.num_bytes <= bounds + unit).all()


def test_replaced_weights_finish_what_they_began(folders: dict[str, Path], tmp_path: Path) -> None:
    """Sequences before the swap get the old weights' tokens, those after it the new ones', though they run together."""
    other = make_lively_checkpoint(replace(MODELS["gpt2"], norm_eps=1e-3), tmp_path / "other")
    requests = [msgspec.structs.replace(each, prompt_logprobs=None) for each in requests_for([None], 10, seed=3)]
    old = run_alone(make_engine(folders["gpt2"], "float32"), requests)
    engine = several({name: folders[name] for name in ("gpt2", "small")})
    with pytest.raises(ConfigError, match="another shape than what test serves"):
        engine.runners.load_beside("test", str(other))
    # The same shape, other weights.
    make_like(folders["gpt2"], other)
    new = run_alone(make_engine(other, "float32"), requests)
    assert sum(old[each] != new[each] for each in old) > 4
    later = [msgspec.structs.replace(each, request_id=100 + each.request_id) for each in requests]
    for request in requests:
        engine.add(request)
    got = {request.request_id: list[int]() for request in [*requests, *later]}
    for _ in range(3):
        collect(engine, got)
    before = engine.info.models[0].weights_digest
    engine.replace_runner("test", engine.runners.load_beside("test", str(other)))
    assert engine.info.models[0].weights_digest != before
    assert engine.runners.replaced == [0]
    for request in later:
        engine.add(request)
    while engine.has_unfinished:
        collect(engine, got)
    assert engine.runners.replaced == []
    for request in requests:
        assert got[request.request_id] == old[request.request_id].token_ids
        assert got[100 + request.request_id] == new[request.request_id].token_ids
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def make_like(folder: Path, other: Path) -> None:
    """Give `other` the shape of `folder` and weights of its own."""
    from model.checkpoint import load_model, save_model

    model = load_model(folder)
    for parameter in model.parameters():
        parameter.data.mul_(1.03)
    save_model(other, model, dtype=model.embed_tokens.weight.dtype)


def collect(engine: LLMEngine, got: dict[int, list[int]]) -> None:
    for output in engine.step().outputs:
        got[output.request_id] += output.token_ids


def test_a_retired_generation_is_not_found_again() -> None:
    manager = BlockManager(8, 4)
    manager.add_generation(1, 8)
    first = Sequence(0, list(range(16)), SamplingParams(), (), 64, 0.0, generation=1)
    assert manager.admit(first)
    assert len(first.block_table) == 2
    first.num_computed_tokens = 16
    manager.mark_computed(first)
    again = Sequence(1, list(range(16)), SamplingParams(), (), 64, 0.0, generation=1)
    assert manager.match_prefix(again) == 8
    assert manager.match_prefix(Sequence(2, list(range(16)), SamplingParams(), (), 64, 0.0)) == 0
    manager.retire_generation(1)
    assert manager.num_cached_blocks == 0
    assert manager.match_prefix(again) == 0
    manager.free(first)
    assert manager.num_free_blocks == 8
    assert manager.admit(again)
    again.num_computed_tokens = 16
    manager.mark_computed(again)
    assert manager.num_cached_blocks == 0


def test_one_model_needs_no_numbers(folders: dict[str, Path]) -> None:
    config = EngineConfig(str(folders["small"]), "small", device="cpu", dtype="float32")
    [runner] = load_runners(config).values()
    assert runner.cache.numbers is None
    assert dataclasses.replace(config, further_models=()).each() == [config]
