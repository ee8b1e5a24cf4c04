"""Triton kernels of paged attention. Importing this module needs triton; model/attention_cuda.py does so on demand.

The caches are contiguous [blocks, block_size, K, d]. A tile of queries holds, for one kv head, the group of query
heads that share it, for one or more tokens: keys and values are read once per kv head. The softmax keeps a running
maximum and sum in float32 and in base 2 (Milakov and Gimelshein 2018; Dao et al. 2022), so `scale` comes with
log2(e) in it. Sequences with one query token go to `decode_kernel` and `combine_kernel`, all others to
`prefill_kernel`; each kernel leaves the other's rows alone. Where results must not depend on how a sequence is cut into
steps, `prefill_kernel` takes all of them: its keys are never split.

Integers that change from step to step are not specialised on: a serving engine must not compile in mid-flight.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False
# ruff: noqa: N803, SIM108 (constants in capitals and branches at compile time are Triton's way)

import triton
import triton.language as tl


@triton.jit
def store_kernel(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """key, value [N, K, d] to their slots; slot -1 is skipped. Grid: tokens, tiles of K * d."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    element = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = element < NUM_KV_HEADS * HEAD_DIM
    head = element // HEAD_DIM
    dim = element % HEAD_DIM
    target = slot * (NUM_KV_HEADS * HEAD_DIM) + element
    key_row = tl.load(key + token * key_stride + head * key_head_stride + dim, mask=inside)
    value_row = tl.load(value + token * value_stride + head * value_head_stride + dim, mask=inside)
    tl.store(key_cache + target, key_row, mask=inside)
    tl.store(value_cache + target, value_row, mask=inside)


@triton.jit
def _attend_tile(
    acc,
    peak,
    total,
    query,
    query_positions,
    base,
    end,
    key_cache,
    value_cache,
    table,
    kv_head,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold the keys at positions base … base + TILE - 1 into acc [rows, d], peak [rows] and total [rows].

    Positions from `end` on are not read. Unless MASKED, every query must see the whole tile.
    """
    dims = tl.arange(0, HEAD_PAD)
    positions = base + tl.arange(0, TILE)
    readable = positions < end
    if MASKED:
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=readable, other=0)
        inside = readable[:, None] & (dims < HEAD_DIM)[None, :]
    else:
        blocks = tl.load(table + positions // BLOCK_SIZE)
        inside = (dims < HEAD_DIM)[None, :]
    slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    offsets = ((slots * NUM_KV_HEADS + kv_head) * HEAD_DIM)[:, None] + dims[None, :]
    keys = tl.load(key_cache + offsets, mask=inside, other=0.0)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    if MASKED:
        visible = readable[None, :] & (positions[None, :] <= query_positions[:, None])
        if WINDOW > 0:
            visible = visible & (positions[None, :] > query_positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen no key yet has the peak -inf, and inf - inf is no number.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(peak - shift)
    values = tl.load(value_cache + offsets, mask=inside, other=0.0)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit
def _split_length(visible, TILE: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Keys per split of a sequence. It depends on that sequence alone, and so does the order of its sums."""
    return tl.maximum(tl.cdiv(tl.cdiv(visible, MAX_SPLITS), TILE) * TILE, MIN_SPLIT)


@triton.jit(do_not_specialize=["table_stride", "splits"])
def decode_kernel(
    out,
    partial,
    partial_lse,
    query,
    key_cache,
    value_cache,
    cu_seqlens_q,
    context_lens,
    block_tables,
    query_stride,
    query_head_stride,
    table_stride,
    splits,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """Sequences with one query token; a context of 0 gives zeros. Grid: sequences, kv heads, splits.

    With DIRECT there is one split and `out` [N, H, d] is written. Else each split writes its own weighted mean to
    partial [B, H, splits, d] and the base-2 logarithm of its sum to partial_lse [B, H, splits].
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(cu_seqlens_q + row)
    if tl.load(cu_seqlens_q + row + 1) - token != 1:
        return
    context = tl.load(context_lens + row)
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    else:
        first = 0
    length = _split_length(context - first, TILE, MIN_SPLIT, MAX_SPLITS)
    start = first + split * length
    if (split > 0) & (start >= context):
        return
    end = tl.minimum(start + length, context)

    lane = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_PAD)
    heads = kv_head * GROUP + lane
    used = (lane < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    query_row = query + token.to(tl.int64) * query_stride
    tile = tl.load(query_row + heads[:, None] * query_head_stride + dims[None, :], mask=used, other=0.0)
    query_positions = tl.full([ROWS], 0, tl.int32) + (context - 1)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    table = block_tables + row.to(tl.int64) * table_stride
    for base in range(start, end, TILE):
        acc, peak, total = _attend_tile(
            acc,
            peak,
            total,
            tile,
            query_positions,
            base,
            end,
            key_cache,
            value_cache,
            table,
            kv_head,
            scale,
            NUM_KV_HEADS,
            HEAD_DIM,
            HEAD_PAD,
            BLOCK_SIZE,
            WINDOW,
            TILE,
            PRECISION,
            True,
        )

    filled = tl.where(total > 0, total, 1.0)
    mean = acc / filled[:, None]
    if DIRECT:
        target = (token.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads) * HEAD_DIM
        tl.store(out + target[:, None] + dims[None, :], mean.to(out.dtype.element_ty), mask=used)
    else:
        piece = (row.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads) * splits + split
        tl.store(partial + (piece * HEAD_DIM)[:, None] + dims[None, :], mean, mask=used)
        lse = tl.where(total > 0, peak + tl.log2(filled), float("-inf"))
        tl.store(partial_lse + piece, lse, mask=lane < GROUP)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    out,
    partial,
    partial_lse,
    cu_seqlens_q,
    context_lens,
    splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """The mean of the splits of `decode_kernel`, weighted by their sums, into out [N, H, d]. Grid: sequences, heads."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(cu_seqlens_q + row)
    if tl.load(cu_seqlens_q + row + 1) - token != 1:
        return
    visible = tl.load(context_lens + row)
    if WINDOW > 0:
        visible = tl.minimum(visible, WINDOW)
    count = tl.maximum(tl.cdiv(visible, _split_length(visible, TILE, MIN_SPLIT, MAX_SPLITS)), 1)

    index = tl.arange(0, MAX_SPLITS)
    dims = tl.arange(0, HEAD_PAD)
    piece = (row.to(tl.int64) * NUM_HEADS + head) * splits + index
    lse = tl.load(partial_lse + piece, mask=index < count, other=float("-inf"))
    peak = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(peak == float("-inf"), 0.0, peak))
    used = (index < count)[:, None] & (dims < HEAD_DIM)[None, :]
    means = tl.load(partial + (piece * HEAD_DIM)[:, None] + dims[None, :], mask=used, other=0.0)
    total = tl.sum(weights, 0)
    mean = tl.sum(means * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    target = (token.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + dims
    tl.store(out + target, mean.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def _row_of_tile(cu_seqlens_q, tile, num_seqs, TOKENS: tl.constexpr):
    """The sequence that a tile belongs to: sequence i begins at tile cu_seqlens_q[i] // TOKENS + i.

    That leaves each sequence enough tiles for its tokens, at most one too many, and needs no table from the host.
    """
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens_q + middle) // TOKENS + middle <= tile
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit(do_not_specialize=["table_stride", "num_seqs"])
def prefill_kernel(
    out,
    query,
    key_cache,
    value_cache,
    cu_seqlens_q,
    context_lens,
    block_tables,
    query_stride,
    query_head_stride,
    table_stride,
    num_seqs,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    SINGLES: tl.constexpr,
):
    """Sequences with two or more query tokens, with SINGLES all sequences, into out [N, H, d]; a context of 0 gives
    zeros. Grid: N // TOKENS + sequences, kv heads.

    A token's keys are taken in tiles that begin at multiples of TILE, whatever else is in its tile of queries: tiles
    that it does not see add exact zeros. So the order of its sums depends on its own context alone.
    """
    # The last tiles see the longest contexts: started first, they do not run on alone at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    row = _row_of_tile(cu_seqlens_q, tile, num_seqs, TOKENS)
    token = tl.load(cu_seqlens_q + row)
    num_queries = tl.load(cu_seqlens_q + row + 1) - token
    first_query = (tile - (token // TOKENS + row)) * TOKENS
    if (first_query >= num_queries) | ((num_queries == 1) & (not SINGLES)):
        return
    past = tl.load(context_lens + row) - num_queries

    lane = tl.arange(0, TOKENS * GROUP_PAD)
    dims = tl.arange(0, HEAD_PAD)
    query_index = first_query + lane // GROUP_PAD
    query_positions = past + query_index
    heads = kv_head * GROUP + lane % GROUP_PAD
    used = ((query_index < num_queries) & (lane % GROUP_PAD < GROUP))[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (token + query_index).to(tl.int64)
    source = tokens * query_stride + heads * query_head_stride
    queries = tl.load(query + source[:, None] + dims[None, :], mask=used, other=0.0)
    acc = tl.zeros([TOKENS * GROUP_PAD, HEAD_PAD], tl.float32)
    peak = tl.full([TOKENS * GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * GROUP_PAD], tl.float32)
    table = block_tables + row.to(tl.int64) * table_stride

    end = past + tl.minimum(first_query + TOKENS, num_queries)
    if WINDOW > 0:
        diagonal = tl.maximum(past + first_query - WINDOW + 1, 0) // TILE * TILE
    else:
        # Up to the diagonal all of the tile's tokens see all keys.
        diagonal = (past + first_query + 1) // TILE * TILE
        for base in range(0, diagonal, TILE):
            acc, peak, total = _attend_tile(
                acc,
                peak,
                total,
                queries,
                query_positions,
                base,
                end,
                key_cache,
                value_cache,
                table,
                kv_head,
                scale,
                NUM_KV_HEADS,
                HEAD_DIM,
                HEAD_PAD,
                BLOCK_SIZE,
                WINDOW,
                TILE,
                PRECISION,
                False,
            )
    for base in range(diagonal, end, TILE):
        acc, peak, total = _attend_tile(
            acc,
            peak,
            total,
            queries,
            query_positions,
            base,
            end,
            key_cache,
            value_cache,
            table,
            kv_head,
            scale,
            NUM_KV_HEADS,
            HEAD_DIM,
            HEAD_PAD,
            BLOCK_SIZE,
            WINDOW,
            TILE,
            PRECISION,
            True,
        )

    mean = acc / tl.where(total > 0, total, 1.0)[:, None]
    target = (tokens * (NUM_KV_HEADS * GROUP) + heads) * HEAD_DIM
    tl.store(out + target[:, None] + dims[None, :], mean.to(out.dtype.element_ty), mask=used)
