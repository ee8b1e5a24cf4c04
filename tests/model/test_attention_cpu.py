"""The compiled kernel against a closed form and the torch reference; and bit for bit against itself, however the work
is cut up."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model import attention_cpu
from model.attention_cpu import NativeBackend
from model.backends import select_backend
from model.errors import ConfigError
from model.kv_cache import PagedKVCache
from model.native import INSTRUCTION_SETS, limit_instruction_set, load_kernels, variant_names
from model.paged_attention import AttentionBackend, AttentionMetadata, TorchBackend
from tests.model.attention_steps import head_config

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="the CPU kernels were not built")

Step = list[tuple[int, int]]
"""(sequence, query tokens) of one step."""

DTYPES = [torch.float32, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of this machine's instruction sets in turn."""
    limit_instruction_set(request.param)
    if not str((variant_names() or [""])[0]).startswith(request.param):
        limit_instruction_set(INSTRUCTION_SETS[-1])
        pytest.skip(f"{request.param} is not to be had here")
    yield request.param
    limit_instruction_set(INSTRUCTION_SETS[-1])


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    block_size: int = 16
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        return self.heads + 2 * self.kv_heads


class Cache:
    """One layer's blocks, every byte of them NaN at first, and a shuffled table of blocks for each sequence."""

    def __init__(self, backend: AttentionBackend, shape: Heads, lengths: list[int], seed: int = 0) -> None:
        self.backend, self.shape = backend, shape
        config = head_config(shape.heads, shape.kv_heads, shape.dim, shape.window)
        widest = max(-(-length // shape.block_size) for length in lengths)
        num_blocks = widest * len(lengths) + 3  # three that nobody owns
        self.pages = PagedKVCache.allocate(
            config,
            backend.block_shape,
            num_blocks=num_blocks,
            block_size=shape.block_size,
            dtype=shape.dtype,
            device="cpu",
        )
        self.keys, self.values = self.pages.keys[0].fill_(torch.nan), self.pages.values[0].fill_(torch.nan)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
        self.tables = order[:-3].view(len(lengths), widest).to(torch.int32)
        self.unowned = order[-3:]
        self.held = [0] * len(lengths)

    def metadata(self, step: Step, padding: int) -> AttentionMetadata:
        size, rows = self.shape.block_size, [index for index, _ in step]
        counts = [count for _, count in step]
        contexts = [self.held[index] + count for index, count in step]
        slots = []
        for index, count in step:
            positions = torch.arange(self.held[index], self.held[index] + count)
            slots.append(self.tables[index, positions // size].long() * size + positions % size)
        return AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=self.tables[rows],
            slot_mapping=torch.cat([*slots, torch.full((padding,), -1)]),
            num_tokens=sum(counts),
            max_query_len=max(counts),
            max_context_len=max(contexts),
        )

    def attend(self, step: Step, qkv: Tensor, padding: int = 0) -> Tensor:
        """Run a step on qkv [N + padding, H + 2K, d], whose parts go in as the strided views of a fused product."""
        q, k, v = qkv.split([self.shape.heads, self.shape.kv_heads, self.shape.kv_heads], dim=1)
        metadata = self.metadata(step, padding)
        out = self.backend.attend(q, k, v, self.keys, self.values, metadata, self.shape.window)
        for index, count in step:
            self.held[index] += count
        return out


def random_qkv(shape: Heads, lengths: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, shape.width, shape.dim, generator=generator).to(shape.dtype) for length in lengths]


def run(
    shape: Heads, qkv: list[Tensor], steps: list[Step], *, backend: AttentionBackend | None = None, seed: int = 0
) -> list[Tensor]:
    """Attend the sequences in these steps, in a cache of their own; each sequence's outputs [T, H, d]."""
    cache = Cache(backend or NativeBackend(), shape, [len(tokens) for tokens in qkv], seed)
    outs: list[list[Tensor]] = [[] for _ in qkv]
    for step in steps:
        tokens = torch.cat([qkv[index][cache.held[index] :][:count] for index, count in step])
        parts = cache.attend(step, tokens).split([count for _, count in step])
        for (index, _), part in zip(step, parts, strict=True):
            outs[index].append(part)
    return [torch.cat(parts) for parts in outs]


def at_once(qkv: list[Tensor]) -> list[Step]:
    return [[(index, len(tokens)) for index, tokens in enumerate(qkv)]]


def one_by_one(qkv: list[Tensor]) -> list[Step]:
    return [[(index, 1)] for index, tokens in enumerate(qkv) for _ in range(len(tokens))]


def random_steps(qkv: list[Tensor], seed: int) -> list[Step]:
    """Random subsets of the sequences in random order, with chunks of random length: decodes among prefills."""
    rng = random.Random(seed)
    left = {index: len(tokens) for index, tokens in enumerate(qkv)}
    steps = []
    while left:
        step = []
        for index in rng.sample(sorted(left), rng.randint(1, len(left))):
            count = min(left[index], rng.choice([1, 1, 2, 3, 5, 16, 17, 40]))
            left[index] -= count
            step.append((index, count))
        left = {index: count for index, count in left.items() if count}
        steps.append(step)
    return steps


def closed_form(shape: Heads, qkv: Tensor, last: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention in float64 for the last tokens of one sequence; and the same weights on the values' magnitudes."""
    groups = shape.heads // shape.kv_heads
    q, k, v = qkv.double().split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    first = 0 if last is None else len(qkv) - last
    q, k, v = q[first:], k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("thd,shd->hts", q, k) * shape.dim**-0.5
    behind = torch.arange(first, len(qkv))[:, None] - torch.arange(len(qkv))
    hidden = (behind < 0) | (behind >= (shape.window or len(qkv)))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v), torch.einsum("hts,shd->thd", weights, v.abs())


# Errors in units of the weighted magnitudes of the values. bfloat16 rounds each weight and then the result, each by
# at most 2^-8. float32 sums some hundred terms of size one, where each of the products, sums and exponentials is off
# by about 1e-7 and most errors cancel.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 2.0**-7 + 1e-5}


def assert_close(shape: Heads, out: Tensor, qkv: Tensor) -> None:
    expected, magnitude = closed_form(shape, qkv, len(out))
    assert ((out.double() - expected).abs() <= TOLERANCES[shape.dtype] * magnitude + 1e-30).all()


def assert_same_bits(ours: list[Tensor], others: list[Tensor]) -> None:
    for a, b in zip(ours, others, strict=True):
        assert torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


GROUPS = [(1, 1), (2, 2), (2, 1), (3, 1), (4, 1), (8, 2), (7, 1), (14, 2), (8, 1), (6, 3)]


def random_shapes(count: int) -> list[Heads]:
    """Each head dimension and grouping with some block size and window."""
    rng = random.Random(5)
    dims = [2, 4, 10, 16, 22, 30, 32, 40, 48, 62, 64, 66, 80, 96, 100, 112, 128, 130, 192, 256]
    shapes = []
    for index in range(count):
        heads, kv_heads = GROUPS[index % len(GROUPS)]
        window = rng.choice([None, None, 1, 2, 7, 16, 33, 100])
        shapes.append(Heads(heads, kv_heads, dims[index % len(dims)], window, rng.choice([16, 32, 48])))
    return shapes


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_closed_form(dtype: torch.dtype) -> None:
    for seed, drawn in enumerate(random_shapes(20)):
        shape = Heads(drawn.heads, drawn.kv_heads, drawn.dim, drawn.window, drawn.block_size, dtype)
        lengths = [1, 15 + seed, 2, 16, 70 - seed, 3]
        qkv = random_qkv(shape, lengths, seed)
        for out, tokens in zip(run(shape, qkv, random_steps(qkv, seed), seed=seed), qkv, strict=True):
            assert_close(shape, out, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_torch_backend_step_by_step(dtype: torch.dtype) -> None:
    for seed, drawn in enumerate(random_shapes(8)):
        shape = Heads(drawn.heads, drawn.kv_heads, drawn.dim, drawn.window, drawn.block_size, dtype)
        qkv = random_qkv(shape, [40, 1, 23, 65], seed)
        exact = Heads(shape.heads, shape.kv_heads, shape.dim, shape.window, shape.block_size)
        steps = random_steps(qkv, seed)
        ours = run(shape, qkv, steps, seed=seed)
        theirs = run(exact, [tokens.float() for tokens in qkv], steps, backend=TorchBackend(), seed=seed)
        for out, expected, tokens in zip(ours, theirs, qkv, strict=True):
            magnitude = closed_form(shape, tokens)[1].float()
            assert ((out.float() - expected).abs() <= 2 * TOLERANCES[dtype] * magnitude).all()


@pytest.mark.usefixtures("instruction_set", "restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20])
def test_bits_depend_on_nothing_but_the_sequence(dtype: torch.dtype, window: int | None) -> None:
    """Chunks, neighbours, their order, blocks and threads. With fewer than four units of work a thread, as a sequence
    alone has, the kernel stores first and then splits each head's rows; otherwise a unit does both."""
    for heads, kv_heads, dim in [(4, 2, 40), (3, 3, 64), (7, 1, 30)]:
        shape = Heads(heads, kv_heads, dim, window, 16, dtype)
        qkv = random_qkv(shape, [1, 2, 17, 40, 75, 33], dim)
        torch.set_num_threads(1)
        expected = run(shape, qkv, at_once(qkv))
        for seed in range(4):
            torch.set_num_threads(seed % 3 + 1)
            assert_same_bits(run(shape, qkv, random_steps(qkv, seed), seed=seed), expected)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(run(shape, qkv, at_once(qkv), seed=threads), expected)
            for index, tokens in enumerate(qkv):
                assert_same_bits(run(shape, [tokens], at_once([tokens])), expected[index : index + 1])
        torch.set_num_threads(1)
        assert_same_bits(run(shape, qkv, one_by_one(qkv)), expected)


@pytest.mark.usefixtures("restore_threads")
def test_without_an_openmp_runtime_one_thread_does_it_all() -> None:
    shape = Heads(4, 2, 32)
    qkv = random_qkv(shape, [50, 20], 1)
    expected = run(shape, qkv, at_once(qkv))
    library = load_kernels()
    assert library is not None
    torch.set_num_threads(3)
    library.quill_init(None, None, len(INSTRUCTION_SETS) - 1)
    try:
        assert_same_bits(run(shape, qkv, at_once(qkv)), expected)
    finally:
        limit_instruction_set(INSTRUCTION_SETS[-1])


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("threads", [1, 2])
def test_two_python_threads_at_once(threads: int) -> None:
    """The call releases the GIL; each thread has its own workspace, which grows with its contexts."""
    torch.set_num_threads(threads)
    shape = Heads(4, 2, 64, dtype=torch.bfloat16)
    works = [
        random_qkv(shape, lengths, index) for index, lengths in enumerate([[300, 10], [5, 700], [64], [1, 9, 400]])
    ]
    expected = [run(shape, qkv, at_once(qkv)) for qkv in works]

    def repeat(index: int) -> None:
        for seed in range(6):
            assert_same_bits(run(shape, works[index], random_steps(works[index], seed)), expected[index])

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(repeat, index) for index in range(4)]:
            future.result()


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_its_own_slots_and_nothing_else(dtype: torch.dtype) -> None:
    shape = Heads(6, 3, 22, None, 32, dtype)
    lengths = [1, 31, 32, 50]
    qkv = random_qkv(shape, lengths, 2)
    cache = Cache(NativeBackend(), shape, lengths)
    before = cache.keys.clone(), cache.values.clone()
    cache.attend(at_once(qkv)[0], torch.cat(qkv))
    owned = torch.cat([cache.tables[i, : -(-length // 32)] for i, length in enumerate(lengths)]).long()
    others = torch.ones(cache.pages.num_blocks, dtype=torch.bool)
    others[owned] = False
    for tensor, untouched in zip((cache.keys, cache.values), before, strict=True):
        assert_same_bits([tensor[others]], [untouched[others]])
        assert int((~tensor.isnan()).sum()) == sum(lengths) * shape.kv_heads * shape.dim


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_rows_are_zero_and_stored_nowhere(dtype: torch.dtype) -> None:
    shape = Heads(4, 2, 48, None, 16, dtype)
    qkv = random_qkv(shape, [5, 1], 3)
    plain, padded = (Cache(NativeBackend(), shape, [5, 1]) for _ in range(2))
    step = at_once(qkv)[0]
    expected = plain.attend(step, torch.cat(qkv))
    garbage = torch.full((3, shape.width, shape.dim), torch.nan, dtype=dtype)
    out = padded.attend(step, torch.cat([*qkv, garbage]), padding=3)
    assert_same_bits([out[:6], padded.keys, padded.values], [expected, plain.keys, plain.values])
    assert out[6:].eq(0).all()


def test_heads_apart_in_memory_are_gathered() -> None:
    """q, k and v as transposed and as widened tensors: neither heads nor dimensions lie side by side."""
    shape = Heads(4, 2, 32)
    (tokens,) = random_qkv(shape, [20], 4)
    expected = run(shape, [tokens], at_once([tokens]))
    by_head = tokens.transpose(0, 1).contiguous().transpose(0, 1)
    by_dim = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    for laid_out in (by_head, by_dim):
        assert not laid_out.is_contiguous()
        cache = Cache(NativeBackend(), shape, [20])
        assert_same_bits([cache.attend([(0, 20)], laid_out)], expected)


def one_head(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each row of q [B, d] attends its sequence's k and v [B, S, d] as the last of S tokens; [B, d]."""
    batch, length, dim = k.shape
    shape = Heads(1, 1, dim, None, 16, dtype)
    queries = torch.zeros(batch, length, dim)
    queries[:, -1] = q
    qkv = [torch.stack(parts, dim=1).to(dtype) for parts in zip(queries, k, v, strict=True)]
    return torch.stack([out[-1, 0] for out in run(shape, qkv, at_once(qkv))]).float()


@pytest.mark.usefixtures("instruction_set")
def test_exponential() -> None:
    """Two keys with scores 0 and x <= 0 and values 0 and 1 give e^x / (1 + e^x), from which e^x can be read to the
    last bit. The kernel's polynomial is good to 2e-7; the sum and the quotient round by 6e-8 each."""
    x = torch.cat([torch.linspace(-86.99, 0, 3000), -(2.0 ** torch.arange(-20.0, 6.0)), torch.tensor([-87.5, -1e4])])
    k = torch.zeros(len(x), 2, 2)
    k[:, 1, 0] = x * 2**0.5
    v = torch.zeros(len(x), 2, 2)
    v[:, 1] = 1
    out = one_head(torch.float32, torch.tensor([1.0, 0.0]).expand(len(x), 2), k, v)[:, 0].double()
    score = (k[:, 1, 0] * torch.tensor(2**-0.5, dtype=torch.float32)).double()
    expected = score.exp() / (1 + score.exp())
    assert ((out - expected).abs()[:-2] <= 3.5e-7 * expected[:-2]).all()
    assert out[-2:].eq(0).all()


@pytest.mark.usefixtures("instruction_set")
def test_rounds_halves_to_even() -> None:
    """The mean of two neighbours in bfloat16 lies half-way between them."""
    v = torch.tensor([[1.0, 1 + 2**-7], [1 + 2**-7, 1 + 2**-6], [-3.0, -3 - 2**-6], [2.0**-120, 3 * 2.0**-121]])
    out = one_head(torch.bfloat16, torch.zeros(4, 2), torch.zeros(4, 2, 2), v[:, :, None].expand(4, 2, 2))
    assert torch.equal(out[:, 0], v.mean(1).to(torch.bfloat16).float())


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scores(dtype: torch.dtype) -> None:
    ones, length, dim = torch.ones(16), 37, 16
    generator = torch.Generator().manual_seed(6)
    v = torch.randn(length, dim, generator=generator)
    steps = torch.arange(1.0, length + 1)[:, None] * ones
    mean = v.to(dtype).double().mean(0)
    cases = {
        "all equal": (torch.zeros(dim), steps, mean),
        "all at -1e30": (ones * 1e15, -ones.expand(length, dim) * 2.5e14, mean),
        "rising to 1e30": (ones * 1e14, steps * 1e14, v[-1].to(dtype).double()),
        "falling to -1e30": (ones * 1e14, -steps * 1e14, v[0].to(dtype).double()),
        "tiny": (ones * 1e-30, steps * 1e-30, mean),
    }
    for q, k, expected in cases.values():
        out = one_head(dtype, q[None], k[None], v[None])[0].double()
        assert ((out - expected).abs() <= TOLERANCES[dtype] * v.abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_damage_stays_with_its_sequence(dtype: torch.dtype) -> None:
    """Infinite and absent numbers in one sequence show there, and change no bit of another."""
    shape = Heads(4, 2, 32, None, 16, dtype)
    qkv = random_qkv(shape, [30, 30, 30, 30], 7)
    expected = run(shape, qkv, at_once(qkv))
    damaged = [tokens.clone() for tokens in qkv]
    damaged[1][3] = torch.nan
    damaged[2][3] = torch.inf
    outs = run(shape, damaged, random_steps(damaged, 7))
    assert_same_bits([outs[0], outs[3]], [expected[0], expected[3]])
    assert outs[1][3].isnan().all()
    assert not outs[2][3].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 300])
def test_long_context(dtype: torch.dtype, window: int | None) -> None:
    shape = Heads(2, 1, 16, window, 32, dtype)
    qkv = random_qkv(shape, [5000], 8)
    (out,) = run(shape, qkv, [[(0, 1250)]] * 4)
    assert_close(shape, out[-40:], qkv[0])
    (chunked,) = run(shape, qkv, [[(0, 4990)], [(0, 7)], *[[(0, 1)]] * 3], seed=1)
    assert_same_bits([chunked], [out])


def attend_raw(backend: NativeBackend, cache: Cache, **changes: Tensor) -> Tensor:
    qkv = random_qkv(cache.shape, [4], 0)[0]
    q, k, v = qkv.split([cache.shape.heads, cache.shape.kv_heads, cache.shape.kv_heads], dim=1)
    metadata = cache.metadata([(0, 4)], 0)
    changed = AttentionMetadata(
        cu_seqlens_q=metadata.cu_seqlens_q,
        context_lens=changes.get("context_lens", metadata.context_lens),
        block_tables=metadata.block_tables,
        slot_mapping=metadata.slot_mapping,
        num_tokens=4,
        max_query_len=4,
        max_context_len=4,
    )
    return backend.attend(changes.get("q", q), k, v, changes.get("keys", cache.keys), cache.values, changed, None)


def test_refuses_steps_that_would_read_or_write_astray() -> None:
    cache = Cache(NativeBackend(), Heads(2, 2, 16), [4])
    size = cache.keys.numel()
    shifted = torch.zeros(size + 1)[1:].view_as(cache.keys)
    fewer_tokens_than_queries = torch.tensor([3], dtype=torch.int32)
    attend_raw(cache.backend, cache)
    before = cache.keys.clone()
    for changes in (
        {"keys": shifted},
        {"context_lens": fewer_tokens_than_queries},
        {"q": torch.zeros(4, 2, 16, dtype=torch.bfloat16)},
    ):
        with pytest.raises(AssertionError):
            attend_raw(cache.backend, cache, **changes)
    assert_same_bits([cache.keys], [before])


def test_no_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = NativeBackend()
    cache = Cache(backend, Heads(2, 2, 16), [4])
    monkeypatch.setattr(backend, "_run", lambda step: -1)
    with pytest.raises(MemoryError, match="workspace"):
        attend_raw(backend, cache)


@pytest.mark.parametrize("block_size", [0, 8, 24, 17])
def test_blocks_are_whole_tiles(block_size: int) -> None:
    with pytest.raises(ConfigError, match="block_size must be a multiple of 16"):
        NativeBackend().block_shape(head_config(2, 2, 16), block_size, torch.float32)


def test_bytes_of_a_block_match_the_layout() -> None:
    """Keys are packed densely, values padded to whole vectors of 16 dimensions."""
    keys, values = NativeBackend().block_shape(head_config(6, 3, 22), 48, torch.bfloat16)
    assert torch.Size(keys).numel() == 48 * 3 * 22
    assert torch.Size(values).numel() == 48 * 3 * 32


def test_is_chosen_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = head_config(2, 2, 16)
    assert [select_backend("auto", config, "cpu", dtype).name for dtype in DTYPES] == ["native", "native"]
    assert select_backend("auto", config, "cpu", torch.float16).name == "torch"
    with pytest.raises(ConfigError, match="attention backend 'native'"):
        select_backend("native", config, "cpu", torch.float16)
    monkeypatch.setattr(attention_cpu, "load_kernels", lambda: None)
    assert select_backend("auto", config, "cpu", torch.float32).name == "torch"
    with pytest.raises(RuntimeError, match="not built"):
        NativeBackend()


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = SimpleNamespace(quill_paged_attention=None, quill_step_size=lambda: 8)
    monkeypatch.setattr(attention_cpu, "load_kernels", lambda: stale)
    with pytest.raises(ConfigError, match="make install"):
        NativeBackend()


def test_the_mirrored_struct_has_the_size_of_the_one_in_c() -> None:
    library = load_kernels()
    assert library is not None
    assert ctypes.sizeof(attention_cpu._AttentionStep) == library.quill_step_size()
