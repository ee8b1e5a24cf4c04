"""Triton kernel that draws a batch's tokens. Importing this needs triton; triton_sampling.py does so on demand.

One program takes one row, by itself: its weights are exp((logit - best) / temperature), in float32 and 1 for the best.
The order of the float32 bits of non-negative numbers is that of the numbers, so thresholds are integers here.
Masses are sums of weights in multiples of 2^-42, integers also: exact, and so the same in any order of addition.

Integers and addresses that change from step to step are not specialised on: a serving engine must not compile in
mid-flight.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False
# ruff: noqa: N803 (constants in capitals are Triton's way)

import triton
import triton.language as tl

# SplitMix64, as in model/sampling/draw.py; int64 arithmetic wraps around.
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB - 2**64)
_MASK_34 = tl.constexpr(2**34 - 1)
_MASK_37 = tl.constexpr(2**37 - 1)
_MASK_33 = tl.constexpr(2**33 - 1)
_MASK_53 = tl.constexpr(2**53 - 1)
_HALF_UNIT = tl.constexpr(2.0**21)  # a weight's mass is held in two halves of 21 bits


@triton.jit
def _uniform(state, position):
    """`model.sampling.draw.uniforms` of one row, to the bit."""
    z = (position + 1) * _GAMMA + state
    z = z ^ ((z >> 30) & _MASK_34)  # >> keeps the sign; the mask makes it a logical shift
    z = z * _MULTIPLIER_1
    z = z ^ ((z >> 27) & _MASK_37)
    z = z * _MULTIPLIER_2
    z = z ^ ((z >> 31) & _MASK_33)
    return ((z >> 11) & _MASK_53).to(tl.float64) * (2.0**-53)


@triton.jit
def _best(logits, size, TILE: tl.constexpr):
    """Lowest id of the largest logit (int32), that logit, and how many logits are NaN."""
    lanes = tl.arange(0, TILE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_ids = lanes
    broken = tl.zeros([TILE], tl.int32)
    for start in range(0, size, TILE):
        ids = start + lanes
        x = tl.load(logits + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
        better = x > best
        best = tl.where(better, x, best)
        best_ids = tl.where(better, ids, best_ids)
        broken += (x != x).to(tl.int32)
    peak = tl.max(best, 0)
    return tl.min(tl.where(best == peak, best_ids, 0x7FFFFFFF), 0), peak, tl.sum(broken, 0)


@triton.jit
def _masses(weights):
    """Weights in [0, 1] as multiples of 2^-42, rounded down: the upper and the lower 21 bits of each, int32."""
    scaled = weights * _HALF_UNIT
    upper = scaled.to(tl.int32)
    return upper, ((scaled - upper.to(tl.float32)) * _HALF_UNIT).to(tl.int32)


@triton.jit
def _joined(upper, lower):
    return (upper.to(tl.int64) << 21) + lower.to(tl.int64)


@triton.jit
def _store_weights(weights, logits, size, peak, temperature, TILE: tl.constexpr):
    """Write the row's weights; their mass."""
    lanes = tl.arange(0, TILE)
    upper_sums = tl.zeros([TILE], tl.int32)
    lower_sums = tl.zeros([TILE], tl.int32)
    for start in range(0, size, TILE):
        ids = start + lanes
        x = tl.load(logits + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
        w = tl.minimum(tl.exp((x - peak) / temperature), 1.0)
        w = tl.where(x == peak, 1.0, w)  # infinity less infinity is no number
        tl.store(weights + ids, w, mask=ids < size)
        upper, lower = _masses(w)
        upper_sums += upper
        lower_sums += lower
    return tl.sum(_joined(upper_sums, lower_sums), 0)


@triton.jit
def _tile(weights, size, floor, start, TILE: tl.constexpr):
    """Masses [TILE] of the ids from `start` on; 0 for weights whose bits are below `floor`."""
    ids = start + tl.arange(0, TILE)
    w = tl.load(weights + ids, mask=ids < size, other=0.0)
    return _masses(tl.where(w.to(tl.int32, bitcast=True) >= floor, w, 0.0))


@triton.jit
def _mass(weights, size, floor, TILE: tl.constexpr):
    """The mass of the weights whose bits are at least `floor`."""
    upper_sums = tl.zeros([TILE], tl.int32)
    lower_sums = tl.zeros([TILE], tl.int32)
    for start in range(0, size, TILE):
        upper, lower = _tile(weights, size, floor, start, TILE)
        upper_sums += upper
        lower_sums += lower
    return tl.sum(_joined(upper_sums, lower_sums), 0)


@triton.jit
def _count_pass(weights, size, low, high, first, second, third, TILE: tl.constexpr):
    """How many weights have at least the bits `first`, `second` and `third`; the smallest bits that are at least `low`
    and the largest below `high`."""
    lanes = tl.arange(0, TILE)
    sums_1 = tl.zeros([TILE], tl.int32)
    sums_2 = tl.zeros([TILE], tl.int32)
    sums_3 = tl.zeros([TILE], tl.int32)
    above = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    below = tl.full([TILE], -1, tl.int32)
    for start in range(0, size, TILE):
        ids = start + lanes
        bits = tl.load(weights + ids, mask=ids < size, other=0.0).to(tl.int32, bitcast=True)
        sums_1 += (bits >= first).to(tl.int32)
        sums_2 += (bits >= second).to(tl.int32)
        sums_3 += (bits >= third).to(tl.int32)
        above = tl.minimum(above, tl.where(bits >= low, bits, 0x7FFFFFFF))
        below = tl.maximum(below, tl.where(bits < high, bits, -1))
    return tl.sum(sums_1, 0), tl.sum(sums_2, 0), tl.sum(sums_3, 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _mass_pass(weights, size, low, high, first, second, third, TILE: tl.constexpr):
    """As `_count_pass`, with masses instead of numbers."""
    lanes = tl.arange(0, TILE)
    upper_1 = tl.zeros([TILE], tl.int32)
    upper_2 = tl.zeros([TILE], tl.int32)
    upper_3 = tl.zeros([TILE], tl.int32)
    lower_1 = tl.zeros([TILE], tl.int32)
    lower_2 = tl.zeros([TILE], tl.int32)
    lower_3 = tl.zeros([TILE], tl.int32)
    above = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    below = tl.full([TILE], -1, tl.int32)
    for start in range(0, size, TILE):
        ids = start + lanes
        w = tl.load(weights + ids, mask=ids < size, other=0.0)
        bits = w.to(tl.int32, bitcast=True)
        upper, lower = _masses(w)
        upper_1 += tl.where(bits >= first, upper, 0)
        lower_1 += tl.where(bits >= first, lower, 0)
        upper_2 += tl.where(bits >= second, upper, 0)
        lower_2 += tl.where(bits >= second, lower, 0)
        upper_3 += tl.where(bits >= third, upper, 0)
        lower_3 += tl.where(bits >= third, lower, 0)
        above = tl.minimum(above, tl.where(bits >= low, bits, 0x7FFFFFFF))
        below = tl.maximum(below, tl.where(bits < high, bits, -1))
    sum_1 = tl.sum(_joined(upper_1, lower_1), 0)
    sum_2 = tl.sum(_joined(upper_2, lower_2), 0)
    sum_3 = tl.sum(_joined(upper_3, lower_3), 0)
    return sum_1, sum_2, sum_3, tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _largest_threshold(weights, size, low, wanted, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """Bits of the largest weight such that the weights from it on have at least the mass (or number) `wanted` > 0.

    The weights from `low` on must have it. Each pass leaves a quarter of the interval between what is enough and what
    is not, and draws its ends up to weights that there are: few passes do where few weights lie close together.
    """
    high = 0x3F800001  # the float32 after 1
    while high - low > 1:
        step = (high - low + 3) // 4
        first = low + step
        second = tl.minimum(first + step, high)
        third = tl.minimum(second + step, high)
        if BY_MASS:
            sum_1, sum_2, sum_3, above, below = _mass_pass(weights, size, low, high, first, second, third, TILE)
        else:
            sum_1, sum_2, sum_3, above, below = _count_pass(weights, size, low, high, first, second, third, TILE)
        enough_1 = sum_1 >= wanted
        enough_2 = sum_2 >= wanted
        enough_3 = sum_3 >= wanted
        new_low = tl.where(enough_3, third, tl.where(enough_2, second, tl.where(enough_1, first, low)))
        new_high = tl.where(enough_3, high, tl.where(enough_2, third, tl.where(enough_1, second, first)))
        low = tl.maximum(new_low, above)
        high = tl.minimum(new_high, below + 1)
    return low


@triton.jit
def _filter_floor(weights, size, top_k, top_p, min_p, TILE: tl.constexpr):
    """Bits of the smallest weight that the filters keep; equal weights are kept or dropped together."""
    floor = tl.maximum(min_p.to(tl.int32, bitcast=True), 0)  # the best weight is 1; -0.0 has negative bits
    ranked = floor * 0
    if top_k > 0:
        ranked = _largest_threshold(weights, size, ranked, top_k, False, TILE)
    if top_p < 1.0:
        share = _mass(weights, size, ranked, TILE).to(tl.float64) * top_p
        wanted = share.to(tl.int64)
        wanted += (wanted.to(tl.float64) < share).to(tl.int64)
        ranked = _largest_threshold(weights, size, ranked, wanted, True, TILE)
    return tl.maximum(floor, ranked)


@triton.jit
def _invert(weights, size, floor, remaining, TILE: tl.constexpr):
    """The first id at which the running sum of masses exceeds `remaining`, which is less than the sum of all."""
    start = 0
    upper, lower = _tile(weights, size, floor, start, TILE)
    mass = tl.sum(_joined(upper, lower), 0)
    while (mass <= remaining) & (start + TILE < size):
        remaining -= mass
        start += TILE
        upper, lower = _tile(weights, size, floor, start, TILE)
        mass = tl.sum(_joined(upper, lower), 0)
    sums = tl.cumsum(_joined(upper, lower), 0)
    return start + tl.sum((sums <= remaining).to(tl.int32), 0)


_ADDRESSES = ["out", "scratch", "logits", "states", "temperature", "top_k", "top_p", "min_p", "positions"]


@triton.jit(do_not_specialize=["logits_stride", "size"], do_not_specialize_on_alignment=_ADDRESSES)
def sample_kernel(
    out,
    scratch,
    logits,
    states,
    temperature,
    top_k,
    top_p,
    min_p,
    positions,
    logits_stride,
    scratch_stride,
    size,
    TILE: tl.constexpr,
):
    """The token of each row, by its parameters, to out [B] int64; -1 where one of its `size` logits is NaN.

    Grid: rows. `scratch` [B, >= size] float32 is overwritten.
    """
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * logits_stride
    weights = scratch + row * scratch_stride
    best_id, peak, broken = _best(row_logits, size, TILE)
    token = tl.where(broken > 0, -1, best_id)
    row_temperature = tl.load(temperature + row)
    # A row of nothing but minus infinity has no distribution; the lowest id stands for it, as in the torch path.
    if (row_temperature > 0.0) & (broken == 0) & (peak > float("-inf")):
        mass = _store_weights(weights, row_logits, size, peak, row_temperature, TILE)
        tl.debug_barrier()  # threads read weights that others wrote
        row_top_k, row_top_p, row_min_p = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        floor = _filter_floor(weights, size, row_top_k, row_top_p, row_min_p, TILE)
        if floor > 0:
            mass = _mass(weights, size, floor, TILE)
        uniform = _uniform(tl.load(states + row), tl.load(positions + row))
        # Rounding can lift the product to the whole mass, which no running sum exceeds.
        target = tl.minimum((uniform * mass.to(tl.float64)).to(tl.int64), mass - 1)
        token = _invert(weights, size, floor, target, TILE)
    tl.store(out + row, token.to(tl.int64))
