"""DenseKVCache: the same hidden states as a pass without a cache, however the tokens come."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, gpt2_config, llama_config
from model.dense_cache import DenseKVCache
from model.errors import ConfigError
from model.transformer import Transformer

LLAMA = llama_config(2, 4, 2, 48, 64, vocab_size=50, max_seq_len=64)
CONFIGS = {
    "gpt2": gpt2_config(2, 2, 40, vocab_size=50, max_seq_len=64),
    "llama": LLAMA,
    "window": replace(LLAMA, architecture="mistral", sliding_window=9),
}
BACKENDS = ["auto", "torch"]


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config).eval()
    model.init_weights(seed=1)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(30)  # makes attention look at some tokens more than at others
    return model


def new_cache(model: Transformer, batch_size: int, max_len: int, backend: str) -> DenseKVCache:
    return DenseKVCache(
        model.config, batch_size=batch_size, max_len=max_len, dtype=model.dtype, device="cpu", backend=backend
    )


@torch.inference_mode()
def in_chunks(model: Transformer, cache: DenseKVCache, input_ids: Tensor, chunks: list[int]) -> Tensor:
    return torch.cat([model(part, cache) for part in input_ids.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("chunks", [[50], [16, 16, 18], [1] * 50, [17, 1, 1, 30, 1]], ids=str)
def test_any_chunks_give_what_one_pass_without_a_cache_gives(
    config: ModelConfig, chunks: list[int], backend: str
) -> None:
    model = random_model(config)
    input_ids = torch.randint(50, (3, 50), generator=torch.Generator().manual_seed(2))
    cache = new_cache(model, 3, 50, backend)
    with torch.inference_mode():
        expected = model(input_ids)
    assert torch.allclose(in_chunks(model, cache, input_ids, chunks), expected, rtol=0, atol=2e-5)
    assert cache.length == 50


def test_rows_do_not_see_each_other() -> None:
    model = random_model(LLAMA)
    input_ids = torch.randint(50, (4, 20), generator=torch.Generator().manual_seed(3))
    together = in_chunks(model, new_cache(model, 4, 40, "auto"), input_ids, [13, 7])
    for row in range(4):
        alone = in_chunks(model, new_cache(model, 1, 33, "auto"), input_ids[row : row + 1], [13, 7])
        assert torch.allclose(alone[0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_follow_one_another_and_belong_to_one_row(backend: str) -> None:
    cache = new_cache(random_model(LLAMA), 2, 40, backend)
    seen: list[set[int]] = [set(), set()]
    for start, count in ((0, 20), (20, 1), (21, 19)):
        positions, batch = cache.extend(count)
        metadata = batch.metadata
        assert positions.tolist() == [*range(start, start + count)] * 2
        assert metadata.context_lens.tolist() == [start + count] * 2
        assert metadata.cu_seqlens_q.tolist() == [0, count, 2 * count]
        assert (metadata.num_tokens, metadata.max_query_len, metadata.max_context_len) == (
            2 * count,
            count,
            start + count,
        )
        for row, slots in enumerate(metadata.slot_mapping.view(2, count).tolist()):
            blocks = metadata.block_tables[row].tolist()
            assert [blocks[p // 16] * 16 + p % 16 for p in range(start, start + count)] == slots
            seen[row].update(slots)
    assert [len(slots) for slots in seen] == [40, 40]
    assert not seen[0] & seen[1]


def test_the_models_window_is_handed_on() -> None:
    assert new_cache(random_model(CONFIGS["window"]), 1, 20, "auto").extend(1)[1].window == 9
    assert new_cache(random_model(LLAMA), 1, 20, "auto").extend(1)[1].window is None


def test_more_tokens_than_it_holds_are_refused_and_change_nothing() -> None:
    cache = new_cache(random_model(LLAMA), 1, 17, "auto")
    cache.extend(10)
    with pytest.raises(ConfigError, match="18 tokens do not fit a cache of 17; ask for a larger max_len"):
        cache.extend(8)
    assert cache.length == 10
    assert cache.extend(7)[0].tolist() == list(range(10, 17))


def test_the_model_makes_one_for_its_context_and_type() -> None:
    model = random_model(LLAMA).to(torch.bfloat16)
    cache = model.new_dense_cache(2)
    assert cache.max_len == 64
    assert cache.block_tables.shape == (2, 4)
    assert {tensor.dtype for tensor in (*cache.cache.keys, *cache.cache.values)} == {torch.bfloat16}
    assert model.new_dense_cache(max_len=5).max_len == 5
