"""What a step does not do: copy a cache, sort a vocabulary to take its maximum, or wait for the device per sequence.

Every torch operator of an engine's steps is seen by a dispatch mode: its inputs, its outputs, and whether the host
asked for a value (`_local_scalar_dense`, under `.item()` and `.tolist()` of a GPU tensor alike; on the CPU `.tolist()`
reads memory, so the method itself is counted as well).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.sampling_params import SamplingParams
from server.engine.llm_engine import LLMEngine
from server.engine.messages import AddRequest
from tests.engine.conftest import VOCAB_SIZE
from tests.engine.mixed_load import make_engine

SORTS = ("sort", "topk", "kthvalue", "argsort", "msort", "cumsum", "_softmax", "_log_softmax", "multinomial")
HOST_READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")
STREAMS = 12


class OperatorCount(TorchDispatchMode):
    """Counts operators by name; keeps the largest output by name, in elements, and views of the cache as none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if not func.is_view:
            made = output if isinstance(output, (tuple, list)) else (output,)
            elements = max((x.numel() for x in made if isinstance(x, Tensor)), default=0)
            self.largest[name] = max(self.largest.get(name, 0), elements)
        return output


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[OperatorCount]:
    count = OperatorCount()
    with monkeypatch.context() as patch, count:
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy"):
            patch.setattr(Tensor, name, counting(count, name, getattr(Tensor, name)))
        yield count


def counting(count: OperatorCount, name: str, method: Any) -> Any:
    def call(self: Tensor, *args: Any) -> Any:
        count.calls[f"Tensor.{name}"] += 1
        return method(self, *args)

    return call


def add_streams(engine: LLMEngine, streams: int, *params: SamplingParams) -> None:
    for index in range(streams):
        prompt = [(31 * index + 7 * place) % VOCAB_SIZE for place in range(6)]
        engine.add(AddRequest(index, prompt, params[index % len(params)], 0.0))


def decoding(folder: Path, streams: int, *params: SamplingParams, **changes: object) -> LLMEngine:
    """An engine all of whose streams decode."""
    engine = make_engine(folder, "float32", **changes)
    add_streams(engine, streams, *params)
    for _ in range(3):
        engine.step()
    assert engine.stats().num_running == streams
    return engine


GREEDY = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
MIXED = (
    GREEDY,
    SamplingParams(max_tokens=100, seed=1, ignore_eos=True),
    SamplingParams(max_tokens=100, seed=2, top_k=20, top_p=0.9, ignore_eos=True),
    SamplingParams(max_tokens=100, seed=3, min_p=0.05, repetition_penalty=1.2, ignore_eos=True),
    SamplingParams(max_tokens=100, seed=4, presence_penalty=0.5, logprobs=5, ignore_eos=True),
    SamplingParams(max_tokens=100, seed=5, logit_bias={3: 1.0}, min_tokens=90, ignore_eos=True),
)


def test_no_operator_makes_or_fills_anything_of_the_cache_s_size(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in decoding nor with prompts among it, at a cache far larger than all else in the step."""
    engine = make_engine(checkpoint, "float32", kv_cache_memory=64 << 20)
    layer = engine.runner.cache.keys[0].numel()
    assert layer > 20 * STREAMS * max(VOCAB_SIZE, 3 * engine.runner.model_config.hidden_size)
    addresses = [tensor.data_ptr() for tensor in (*engine.runner.cache.keys, *engine.runner.cache.values)]
    add_streams(engine, STREAMS, *MIXED)
    with counted(monkeypatch) as count:
        engine.step()
        add_streams_later(engine)
        for _ in range(4):
            engine.step()
    assert {name: size for name, size in count.largest.items() if size >= layer // 8} == {}
    assert [tensor.data_ptr() for tensor in (*engine.runner.cache.keys, *engine.runner.cache.values)] == addresses


def add_streams_later(engine: LLMEngine) -> None:
    engine.add(AddRequest(900, list(range(40)), GREEDY, 0.0))


def test_the_count_sees_a_copy_of_the_cache(llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(llama_checkpoint, "float32")
    keys = engine.runner.cache.keys[0]
    with counted(monkeypatch) as count:
        keys.view(-1)[:2].clone()
        assert max(count.largest.values()) == 2
        keys[torch.arange(len(keys))].sum().item()
    assert count.largest["index"] == keys.numel()
    assert count.calls["Tensor.item"] == 1


def test_greedy_decoding_sorts_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = decoding(checkpoint, STREAMS, GREEDY)
    with counted(monkeypatch) as count:
        engine.step()
    assert {name: count.calls[name] for name in SORTS if count.calls[name]} == {}


def test_filters_sort_less_than_the_vocabulary(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are picked by groups: what is sorted is no wider than the vocabulary, and is never sorted in full."""
    engine = decoding(checkpoint, STREAMS, *MIXED)
    with counted(monkeypatch) as count:
        engine.step()
    assert count.calls["topk"] > 0
    assert not any(count.calls[name] for name in ("sort", "argsort", "msort", "multinomial"))


@pytest.mark.parametrize("params", [(GREEDY,), MIXED], ids=["greedy", "mixed"])
def test_the_host_reads_results_once_per_step_and_not_once_per_sequence(
    checkpoint: Path, params: tuple[SamplingParams, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the streams of every kind: the same operators, as many times, and as many looks from the host."""
    found = []
    for streams in (STREAMS, 2 * STREAMS):
        engine = decoding(checkpoint, streams, *params)
        with counted(monkeypatch) as count:
            engine.step()
        found.append(count.calls)
    few, many = found
    assert few == many
    reads = sum(few[name] for name in (*HOST_READS, *(f"Tensor.{name}" for name in ("item", "tolist", "__bool__"))))
    # The token ids, and for a batch with log-probabilities these and their alternatives; in a mixed batch one look
    # more at which nuclei are wide.
    assert 1 <= reads <= (1 if params == (GREEDY,) else 8), few


def test_a_batch_s_parameters_become_tensors_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = decoding(checkpoint, STREAMS, *MIXED)
    built = []
    build = engine.runner.sampler.build_batch
    monkeypatch.setattr(engine.runner.sampler, "build_batch", lambda rows: built.append(rows) or build(rows))
    for _ in range(5):
        engine.step()
    assert built == []
    engine.abort(3)
    engine.step()
    assert [len(rows) for rows in built] == [STREAMS - 1]
