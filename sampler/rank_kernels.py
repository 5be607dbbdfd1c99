"""The fused sampler's Triton kernel for rows with top_k: exactly the tokens that reference.py keeps, one program a row.

Used by fused.py after scan_kernels.scan, which left the largest logit of each group of lanes. The k-th largest of these
is not above the k-th largest logit, and hardly below it; so groups without a logit that large are never looked at
again, and what is gathered from the others is little more than k candidates. Thresholds are found among them.
Invariant: weights are those of reference.py, step 6, integers, so that sums do not depend on their order.
"""

import triton
import triton.language as tl

from .scan_kernels import (
    FILTERED,
    FLOATS,
    INTS,
    LOG2E,
    MIN_WEIGHT,
    NEEDS,
    NO_ID,
    SEED,
    TOP_K,
    TOP_P,
    WHOLE,
    by_order,
    load_clean,
    log_times,
    row_words,
    share,
    top_of,
    weight,
    winner_of,
)

TILE = tl.constexpr(64)  # groups that are looked at at once
PAIRS = tl.constexpr(32)  # candidates that all are compared with at once


@triton.jit
def _reached(tops, top_k):
    """A value that at least top_k of `tops` reach, hardly below the largest such; found bit by bit, the sign first."""
    keys = by_order(tops.to(tl.int32, bitcast=True))
    bound = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= top_k, 0, -2147483647 - 1)
    for b in range(0, 20):
        attempt = bound | (1 << (30 - b))
        bound = tl.where(tl.sum((keys >= attempt).to(tl.int32), 0) >= top_k, attempt, bound)
    bound = tl.maximum(bound, -2139095041)  # the key of -inf: below it are those of NaN
    return by_order(bound).to(tl.float32, bitcast=True)


@triton.jit
def _gather(
    x_row, tops, low, top, scale, chosen, z, ids, vocab, part,
    GROUPS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Store the tokens of at least `low` in z and ids, at most MOST of them; returns how many there are."""
    LANES: tl.constexpr = BLOCK // GROUPS
    group = tl.arange(0, N)
    has = tops >= low
    tl.store(chosen + tl.cumsum(has.to(tl.int32), 0) - 1, group, has)
    number = tl.sum(has.to(tl.int32), 0)
    tl.debug_barrier()
    filled = 0
    g, lane = tl.arange(0, TILE), tl.arange(0, LANES)
    for at in range(0, number, TILE):
        which = tl.load(chosen + at + g, at + g < number, other=0)
        start = which // GROUPS * part + which % GROUPS * LANES
        for block in range(0, part, BLOCK):
            i = start[:, None] + block + lane[None, :]
            live = (at + g < number)[:, None] & (i < vocab)
            x = load_clean(x_row, i, live)
            inside = tl.reshape(live & (x >= low), (TILE * LANES,))
            found = tl.sum(inside.to(tl.int32), 0)
            if found > 0:
                place = filled + tl.cumsum(inside.to(tl.int32), 0) - 1
                inside = inside & (place < MOST)
                tl.store(z + place, (tl.reshape(x, (TILE * LANES,)) - top) * scale, inside)
                tl.store(ids + place, tl.reshape(i, (TILE * LANES,)), inside)
                filled += found
    tl.debug_barrier()
    return filled


@triton.jit
def _settle_pairs(z_at, ids_at, count, top_k, top_p, least, word0, word1, FAST: tl.constexpr, SIZE: tl.constexpr):
    """The winner among `count` candidates, at most SIZE: each is compared with all for its rank and the mass above."""
    c = tl.arange(0, SIZE)
    z = tl.load(z_at + c, c < count, other=float("-inf"))
    ids = tl.load(ids_at + c, c < count, other=NO_ID)
    q = weight(z)
    mass = q.to(tl.int64)
    above = tl.zeros([SIZE], tl.int32)
    mass_above = tl.zeros([SIZE], tl.int64)
    for at in range(0, count, PAIRS):
        j = at + tl.arange(0, PAIRS)
        other = weight(tl.load(z_at + j, j < count, other=float("-inf")))
        higher = other[None, :] > q[:, None]
        above += tl.sum(higher.to(tl.int32), 1)
        mass_above += tl.sum(tl.where(higher, other.to(tl.int64)[None, :], 0), 1)
    kept = (above < top_k) & (c < count)
    if top_p < WHOLE:
        limit = tl.maximum(share(tl.sum(tl.where(kept, mass, 0), 0), top_p), 1)
        kept = kept & (mass_above < limit)
    kept = kept & (mass >= least)
    s = tl.where(kept, z * LOG2E - log_times(ids, word0, word1, FAST), float("-inf"))
    _, token = winner_of(s, ids)
    return token


@triton.jit
def _settle_bits(z_at, ids_at, count, top_k, top_p, least, word0, word1, FAST: tl.constexpr, SIZE: tl.constexpr):
    """As _settle_pairs, for more: a float's bits above 0 order as it does, so 31 counts and 31 sums find thresholds."""
    c = tl.arange(0, SIZE)
    z = tl.load(z_at + c, c < count, other=float("-inf"))
    ids = tl.load(ids_at + c, c < count, other=NO_ID)
    q = weight(z)
    keys = q.to(tl.int32, bitcast=True)
    mass = q.to(tl.int64)
    by_rank = 0
    for b in range(0, 31):
        attempt = by_rank | (1 << (30 - b))
        by_rank = tl.where(tl.sum((keys >= attempt).to(tl.int32), 0) >= top_k, attempt, by_rank)
    least = tl.maximum(least, by_rank.to(tl.float32, bitcast=True).to(tl.int64))
    if top_p < WHOLE:
        limit = tl.maximum(share(tl.sum(tl.where(keys >= by_rank, mass, 0), 0), top_p), 1)
        by_mass = 0
        for b in range(0, 31):
            attempt = by_mass | (1 << (30 - b))
            by_mass = tl.where(tl.sum(tl.where(keys >= attempt, mass, 0), 0) >= limit, attempt, by_mass)
        least = tl.maximum(least, by_mass.to(tl.float32, bitcast=True).to(tl.int64))
    s = tl.where((mass >= least) & (c < count), z * LOG2E - log_times(ids, word0, word1, FAST), float("-inf"))
    _, token = winner_of(s, ids)
    return token


@triton.jit
def mass_from(x_row, top, scale, bits, vocab, BLOCK: tl.constexpr):
    """(how many tokens of a whole row have a weight whose float32 bits are at least `bits`, their mass)."""
    lane = tl.arange(0, BLOCK)
    number = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.int64)
    for at in range(0, vocab, BLOCK):
        live = at + lane < vocab
        q = weight((load_clean(x_row, at + lane, live) - top) * scale)
        inside = (q.to(tl.int32, bitcast=True) >= bits) & live
        number += inside.to(tl.int32)
        mass += tl.where(inside, q.to(tl.int64), 0)
    return tl.sum(number, 0), tl.sum(mass, 0)


@triton.jit
def race_from(x_row, top, scale, least, word0, word1, vocab, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """The winner among the tokens of a whole row whose weight is at least `least`."""
    lane = tl.arange(0, BLOCK)
    score = tl.full([BLOCK], float("-inf"), tl.float32)
    winner = tl.full([BLOCK], NO_ID, tl.int32)
    for at in range(0, vocab, BLOCK):
        i = at + lane
        z = (load_clean(x_row, i, i < vocab) - top) * scale
        s = z * LOG2E - log_times(i, word0, word1, FAST)
        better = (s > score) & (weight(z).to(tl.int64) >= least)
        score = tl.where(better, s, score)
        winner = tl.where(better, i, winner)
    _, token = winner_of(score, winner)
    return token


@triton.jit
def _settle_all(x_row, top, scale, top_k, top_p, least, word0, word1, vocab, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """As _settle_bits over the whole row, a pass for each bit: a top_k beyond the number of groups, or many ties."""
    by_rank = 0
    for b in range(0, 31):
        attempt = by_rank | (1 << (30 - b))
        number, _ = mass_from(x_row, top, scale, attempt, vocab, BLOCK)
        by_rank = tl.where(number >= top_k, attempt, by_rank)
    least = tl.maximum(least, by_rank.to(tl.float32, bitcast=True).to(tl.int64))
    if top_p < WHOLE:
        _, ranked = mass_from(x_row, top, scale, by_rank, vocab, BLOCK)
        limit = tl.maximum(share(ranked, top_p), 1)
        by_mass = 0
        for b in range(0, 31):
            attempt = by_mass | (1 << (30 - b))
            _, mass = mass_from(x_row, top, scale, attempt, vocab, BLOCK)
            by_mass = tl.where(mass >= limit, attempt, by_mass)
        least = tl.maximum(least, by_mass.to(tl.float32, bitcast=True).to(tl.int64))
    return race_from(x_row, top, scale, least, word0, word1, vocab, FAST, BLOCK)


@triton.jit
def settle_ranked(
    logits, slots, positions, ints, floats, largest, group_tops, chosen, candidates, candidate_ids, drawn, vocab,
    stride, part,
    FAST: tl.constexpr, FEW: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Program (row): the winner among what top_k, top_p and min_p keep; rows without top_k are left alone."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    top_k = tl.load(ints + slot * INTS + TOP_K)
    if ((tl.load(ints + slot * INTS + NEEDS) & FILTERED) != 0) & (top_k > 0):
        N: tl.constexpr = SPLITS * GROUPS
        x_row = logits + row.to(tl.int64) * stride
        scale = tl.load(floats + slot * FLOATS)
        top = top_of(largest, row, SPLITS)
        tops = tl.load(group_tops + row * N + tl.arange(0, N))
        tops = tl.where(tops < float("inf"), tops, float("-inf"))
        reached = _reached(tops, top_k)
        # Ties are ties of weights: below 2**24 these are integers, a step of which is 1 / q in z; above, float32s.
        q = weight((reached - top) * scale)
        step = (2e-6 + 1.0 / tl.maximum(q, 1.0)) / scale + 1e-6 * tl.abs(reached)
        enough = (top_k <= N) & (reached > float("-inf")) & (q > 0)
        low = tl.where(enough, reached - step, float("-inf"))
        z, ids = candidates + row * MOST, candidate_ids + row * MOST
        count = _gather(x_row, tops, low, top, scale, chosen + row * N, z, ids, vocab, part, GROUPS, N, BLOCK, MOST)
        top_p = tl.load(ints + slot * INTS + TOP_P)
        least = tl.load(ints + slot * INTS + MIN_WEIGHT)
        word0, word1 = row_words(tl.load(ints + slot * INTS + SEED), tl.load(positions + row).to(tl.int64))
        if count <= FEW:
            token = _settle_pairs(z, ids, count, top_k, top_p, least, word0, word1, FAST, FEW)
        elif count <= MOST:
            token = _settle_bits(z, ids, count, top_k, top_p, least, word0, word1, FAST, MOST)
        else:
            token = _settle_all(x_row, top, scale, top_k, top_p, least, word0, word1, vocab, FAST, BLOCK)
        tl.store(drawn + row, token)
