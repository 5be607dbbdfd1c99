"""The fused sampler's Triton kernels for logprobs: of the drawn token, of the most likely ones, of named ones.

Used by fused.py. One pass over the logits and one program a row: no probabilities in memory, and nothing for rows that
want none. A token's key has its logit's order in the upper half and its id, turned round, in the lower: keys are
distinct, and the largest are the most likely tokens, the lower id first among equals, as in reference.py.
"""

import triton
import triton.language as tl

from .scan_kernels import INTS, by_order, load_clean

LOGPROBS = tl.constexpr(6)  # column of ints: how many most likely tokens are wanted, -1: no logprobs at all
NO_KEY = tl.constexpr(-(1 << 63))


@triton.jit
def _keys(x, i, live):
    """int64 keys of float32 logits x of the tokens i; NO_KEY where not `live`."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # of two zeros one
    return tl.where(live, (by_order(bits).to(tl.int64) << 32) | (0xFFFFFFFF - i.to(tl.int64)), NO_KEY)


@triton.jit
def _id_of(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _base(most):
    """What exp is taken relative to, 0 where all logits are -inf: -inf - -inf would be no number."""
    return tl.where(most > float("-inf"), most, 0.0)


@triton.jit
def top_pass(
    logits, slots, ints, tops, largest, masses, vocab, stride, part,
    TOP: tl.constexpr, COLUMN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, split): the largest logit of the split, the sum of exp(logit - largest), NaN if one is NaN or +inf,
    and tops [TOP] of its keys, the largest first, as many as the row wants.

    Each lane keeps the best of its column of at most COLUMN logits. When that is taken, the next best one of the column
    takes its place.
    """
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row).to(tl.int64)
    wanted = tl.load(ints + slot * INTS + LOGPROBS).to(tl.int32)
    if wanted >= 0:
        x_row = logits + row.to(tl.int64) * stride
        lane = tl.arange(0, BLOCK)
        first = split * part
        last = tl.minimum(first + part, vocab)
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK], tl.float32)
        best = tl.full([BLOCK], NO_KEY, tl.int64)
        poison = tl.zeros([BLOCK], tl.int32)
        for at in range(first, last, BLOCK):
            i = at + lane
            x = tl.load(x_row + i, i < last, other=float("-inf")).to(tl.float32)
            poison |= (~(x < float("inf"))).to(tl.int32)
            x = tl.where(x < float("inf"), x, float("-inf"))
            now = tl.maximum(most, x)
            mass = mass * tl.exp(most - _base(now)) + tl.exp(x - _base(now))
            most = now
            best = tl.maximum(best, _keys(x, i, i < last))
        place = row * splits + split
        peak = tl.max(most, 0)
        tl.store(largest + place, peak)
        total = tl.sum(mass * tl.exp(most - _base(peak)), 0)
        tl.store(masses + place, tl.where(tl.max(poison, 0) != 0, float("nan"), total))
        down = tl.arange(0, COLUMN) * BLOCK
        for j in range(tl.minimum(wanted, TOP)):
            top = tl.max(best, 0)
            tl.store(tops + place * TOP + j, top)
            taken = tl.where(top != NO_KEY, (_id_of(top) - first).to(tl.int32) % BLOCK, 0)
            i = first + taken + down
            x = load_clean(x_row, i, i < last)
            keys = _keys(x, i, i < last)
            best = tl.where(lane == taken, tl.max(tl.where(keys < top, keys, NO_KEY), 0), best)


@triton.jit
def settle_logprobs(
    logits, slots, ints, ids, tops, largest, masses, listed_ids, logprobs, top_ids, top_logprobs, listed, stride, n,
    named, width,
    TOP: tl.constexpr, NAMED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Row by row: logprobs [rows] of `ids`, the `n` most likely tokens and theirs [rows, n], and those of the first
    `named` of listed_ids [slots, width], listed [rows, named]; NaN and -1 for what a row does not want."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    wanted = tl.load(ints + slot * INTS + LOGPROBS).to(tl.int32)
    asks = wanted >= 0
    x_row = logits + row.to(tl.int64) * stride
    parts = row * SPLITS + tl.arange(0, SPLITS)
    there = parts < tl.where(asks, (row + 1) * SPLITS, 0)
    peaks = tl.load(largest + parts, there, other=0.0)
    base = _base(tl.max(peaks, 0))
    shares = tl.load(masses + parts, there, other=0.0) * tl.exp(_base(peaks) - base)
    mass = tl.sum(shares, 0)
    total = tl.where(mass > 0.0, base + tl.log(tl.where(mass > 0.0, mass, 1.0)), float("nan"))
    chosen = tl.load(x_row + tl.load(ids + row)).to(tl.float32)
    tl.store(logprobs + row, tl.where(asks, chosen - total, float("nan")))
    if NAMED > 0:
        j = tl.arange(0, NAMED)
        token = tl.load(listed_ids + slot * width + j, j < named, other=-1)
        real = tl.where(asks, token, -1) >= 0
        x = tl.load(x_row + token, real, other=0.0).to(tl.float32)
        tl.store(listed + row * named + j, tl.where(real, x - total, float("nan")), j < named)
    if TOP > 0:
        spot = tl.arange(0, SPLITS * TOP)
        keys = tl.load(tops + row * (SPLITS * TOP) + spot, spot % TOP < wanted, other=NO_KEY)
        for j in range(n):
            top = tl.max(keys, 0)
            keys = tl.where(keys == top, NO_KEY, keys)
            value = by_order((top >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
            given = (j < wanted) & (top != NO_KEY)
            tl.store(top_ids + row * n + j, tl.where(given, _id_of(top), -1).to(tl.int32))
            tl.store(top_logprobs + row * n + j, tl.where(given, value - total, float("nan")))
