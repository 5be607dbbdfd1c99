"""The fused sampler's Triton kernels for rows with top_k, top_p or min_p: exactly the tokens that reference.py keeps.

Used by fused.py after scan_kernels.scan. Rows with top_k: the k-th largest of the group maxima that the scan left is
not above the k-th largest logit, and hardly below it, so the tokens from there on are few; they are gathered, and the
thresholds found among them. Rows without: the winner of the race over all tokens is the winner of any kept set that it
is in, and it is in it if the mass above it is small enough. Otherwise nothing that is not above it is kept, and the
race goes on among those above, a pass for the next winner and one for the mass above that; each round is rarer than
the rejected share of the mass. What is left after ROUNDS rounds goes on in one program a row.
Invariant: weights are those of reference.py, step 6, integers, so that sums do not depend on their order.
"""

import triton
import triton.language as tl

from .scan_kernels import (
    FILTERED,
    FLOATS,
    INTS,
    MIN_WEIGHT,
    NEEDS,
    NO_ID,
    SEED,
    TOP_K,
    TOP_P,
    WHOLE,
    log_times,
    row_words,
    winner_of,
)

UNIT = tl.constexpr(1099511627776.0)  # 2**40: weights are integers in units of 2**-40


@triton.jit
def weight(z):
    """q of reference.py, step 6, as a float32 that holds the integer exactly."""
    return tl.floor(tl.exp(z) * UNIT)


@triton.jit
def load_clean(x_row, i, vocab):
    """Logits of a row; -inf in the place of NaN and inf, whose row is poison anyway."""
    x = tl.load(x_row + i, i < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(x < float("inf"), x, float("-inf"))


@triton.jit
def top_of(largest, row, SPLITS: tl.constexpr):
    """The row's largest logit, 0 for one without."""
    top = tl.max(tl.load(largest + row * SPLITS + tl.arange(0, SPLITS)), 0)
    return tl.where((top < float("inf")) & (top > float("-inf")), top, 0.0)


@triton.jit
def share(total, fraction):
    """floor(total * fraction / 2**24) without overflow (weights.share)."""
    return (total >> 24) * fraction + (((total & (WHOLE - 1)) * fraction) >> 24)


@triton.jit
def _ordered(x):
    """int32 keys in the order of floats x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def bound_rows(
    logits, slots, ints, floats, best, best_ids, largest, group_tops, bounds, counts, wins, win_weights, vocab, stride,
    RANKED: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Row by row: with top_k, a weight that the k-th largest reaches (0 where it cannot be said); else the winner."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if (tl.load(ints + slot * INTS + NEEDS) & FILTERED) != 0:
        scale = tl.load(floats + slot * FLOATS)
        top = top_of(largest, row, SPLITS)
        top_k = tl.load(ints + slot * INTS + TOP_K)
        if top_k > 0:
            tl.store(counts + row, 0)
            if RANKED:
                i = tl.arange(0, SPLITS * GROUPS)
                keys = _ordered(tl.load(group_tops + row * SPLITS * GROUPS + i))
                # The largest key that at least k groups reach, bit by bit: the sign first.
                lowest = -2147483647 - 1
                bound = tl.where(tl.sum((keys >= 0).to(tl.int32), 0) >= top_k, 0, lowest)
                for b in range(0, 31):
                    attempt = bound | (1 << (30 - b))
                    bound = tl.where(tl.sum((keys >= attempt).to(tl.int32), 0) >= top_k, attempt, bound)
                x = tl.where(bound < 0, bound ^ 0x7FFFFFFF, bound).to(tl.float32, bitcast=True)
                enough = (top_k <= SPLITS * GROUPS) & (x > float("-inf"))
                # A little less, in case the GPU's exp does not rise everywhere.
                tl.store(bounds + row, tl.where(enough, weight((x - top) * scale) * 0.999999, 0.0))
        else:
            place = row * SPLITS + tl.arange(0, SPLITS)
            _, token = winner_of(tl.load(best + place), tl.load(best_ids + place))
            x = load_clean(logits + row.to(tl.int64) * stride, token, vocab)
            tl.store(wins + row, token)
            tl.store(win_weights + row, weight((x - top) * scale))


@triton.jit
def filter_pass(
    logits, slots, ints, floats, largest, bounds, counts, candidates, candidate_ids, win_weights, totals, aboves, vocab,
    stride, part,
    MOST: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (row, split): with top_k gather tokens from the bound on; with top_p sum all masses, and the winner's.

    counts[row]: how many there are, more than MOST meaning that not all are stored. The order in which candidates lie
    changes from run to run, what is made of them does not.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if (tl.load(ints + slot * INTS + NEEDS) & FILTERED) != 0:
        x_row = logits + row.to(tl.int64) * stride
        scale = tl.load(floats + slot * FLOATS)
        top = top_of(largest, row, SPLITS)
        first = split * part
        last = tl.minimum(first + part, vocab)
        lane = tl.arange(0, BLOCK)
        if tl.load(ints + slot * INTS + TOP_K) > 0:
            bound = tl.load(bounds + row)
            for at in range(first, last, BLOCK):
                i = at + lane
                z = (load_clean(x_row, i, vocab) - top) * scale
                inside = (weight(z) >= bound) & (i < vocab)
                found = tl.sum(inside.to(tl.int32), 0)
                if found > 0:
                    place = tl.atomic_add(counts + row, found) + tl.cumsum(inside.to(tl.int32), 0) - 1
                    inside = inside & (place < MOST)
                    tl.store(candidates + row * MOST + place, z, inside)
                    tl.store(candidate_ids + row * MOST + place, i, inside)
        elif tl.load(ints + slot * INTS + TOP_P) < WHOLE:
            limit = tl.load(win_weights + row)
            total = tl.zeros([BLOCK], tl.int64)
            above = tl.zeros([BLOCK], tl.int64)
            for at in range(first, last, BLOCK):
                q = weight((load_clean(x_row, at + lane, vocab) - top) * scale)
                mass = q.to(tl.int64)
                total += mass
                above += tl.where(q > limit, mass, 0)
            tl.store(totals + row * SPLITS + split, tl.sum(total, 0))
            tl.store(aboves + row * SPLITS + split, tl.sum(above, 0))


@triton.jit
def _kept(row, slot, ints, totals, aboves, q, SPLITS: tl.constexpr):
    """Whether a token of weight q is kept; aboves [rows, SPLITS]: the mass above it."""
    kept = q.to(tl.int64) >= tl.load(ints + slot * INTS + MIN_WEIGHT)
    top_p = tl.load(ints + slot * INTS + TOP_P)
    if top_p < WHOLE:
        place = row * SPLITS + tl.arange(0, SPLITS)
        limit = tl.maximum(share(tl.sum(tl.load(totals + place), 0), top_p), 1)
        kept = kept & (tl.sum(tl.load(aboves + place), 0) < limit)
    return kept


@triton.jit
def _racing(row, slot, ints):
    """Whether a row is filtered without top_k."""
    filtered = (tl.load(ints + slot * INTS + NEEDS) & FILTERED) != 0
    return filtered & (tl.load(ints + slot * INTS + TOP_K) == 0)


@triton.jit
def race_pass(
    logits, slots, positions, ints, floats, largest, win_weights, totals, aboves, best, best_ids, vocab, stride, part,
    FAST: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (row, split), of rows whose last winner is not kept: the split's winner among the tokens above it."""
    row, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if _racing(row, slot, ints):
        limit = tl.load(win_weights + row)
        if not _kept(row, slot, ints, totals, aboves, limit, SPLITS):
            x_row = logits + row.to(tl.int64) * stride
            scale = tl.load(floats + slot * FLOATS)
            top = top_of(largest, row, SPLITS)
            least = tl.load(ints + slot * INTS + MIN_WEIGHT)
            word0, word1 = row_words(tl.load(ints + slot * INTS + SEED), tl.load(positions + row).to(tl.int64))
            lane = tl.arange(0, BLOCK)
            score = tl.full([BLOCK], float("-inf"), tl.float32)
            winner = tl.full([BLOCK], NO_ID, tl.int32)
            first = split * part
            for at in range(first, tl.minimum(first + part, vocab), BLOCK):
                i = at + lane
                x = load_clean(x_row, i, vocab)
                q = weight((x - top) * scale)
                s = x * scale - log_times(i, word0, word1, FAST)
                better = (s > score) & (q > limit) & (q.to(tl.int64) >= least)
                score = tl.where(better, s, score)
                winner = tl.where(better, i, winner)
            reached, token = winner_of(score, winner)
            tl.store(best + row * SPLITS + split, reached)
            tl.store(best_ids + row * SPLITS + split, token)


@triton.jit
def mass_pass(
    logits, slots, ints, floats, largest, wins, win_weights, totals, aboves, best, best_ids, new_wins, new_weights,
    new_aboves, vocab, stride, part,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (row, split): of rows that raced again, the new winner and its mass above; the others keep theirs.

    The new winner is written to places of its own, since other programs of the row still read the old one.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if _racing(row, slot, ints):
        token = tl.load(wins + row)
        limit = tl.load(win_weights + row)
        mass_above = tl.load(aboves + row * SPLITS + split)
        if not _kept(row, slot, ints, totals, aboves, limit, SPLITS):
            x_row = logits + row.to(tl.int64) * stride
            scale = tl.load(floats + slot * FLOATS)
            top = top_of(largest, row, SPLITS)
            place = row * SPLITS + tl.arange(0, SPLITS)
            _, token = winner_of(tl.load(best + place), tl.load(best_ids + place))
            limit = weight((load_clean(x_row, token, vocab) - top) * scale)
            lane = tl.arange(0, BLOCK)
            above = tl.zeros([BLOCK], tl.int64)
            first = split * part
            for at in range(first, tl.minimum(first + part, vocab), BLOCK):
                q = weight((load_clean(x_row, at + lane, vocab) - top) * scale)
                above += tl.where(q > limit, q.to(tl.int64), 0)
            mass_above = tl.sum(above, 0)
        tl.store(new_aboves + row * SPLITS + split, mass_above)
        if split == 0:
            tl.store(new_wins + row, token)
            tl.store(new_weights + row, limit)


@triton.jit
def _settle_few(
    z, ids, count, top_k, top_p, keep, word0, word1, FAST: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """The winner among candidates: z and ids point to `count` of them, all that reach the k-th largest weight.

    The thresholds are found bit by bit: a float's bits above 0 order as it does, so 31 counts (for top_k) and 31 sums
    (for top_p) say exactly which weight it is.
    """
    c = tl.arange(0, SIZE)
    z = tl.load(z + c, c < count, other=float("-inf"))
    ids = tl.load(ids + c, c < count, other=0)
    q = weight(z)
    keys = q.to(tl.int32, bitcast=True)
    by_rank = 0
    for b in range(0, 31):
        attempt = by_rank | (1 << (30 - b))
        by_rank = tl.where(tl.sum((keys >= attempt).to(tl.int32), 0) >= top_k, attempt, by_rank)
    keep = tl.maximum(keep, by_rank.to(tl.float32, bitcast=True).to(tl.int64))
    mass = q.to(tl.int64)
    if top_p < WHOLE:
        ranked = tl.sum(tl.where(keys >= by_rank, mass, 0), 0)
        limit = tl.maximum(share(ranked, top_p), 1)
        by_mass = 0
        for b in range(0, 31):
            attempt = by_mass | (1 << (30 - b))
            by_mass = tl.where(tl.sum(tl.where(keys >= attempt, mass, 0), 0) >= limit, attempt, by_mass)
        keep = tl.maximum(keep, by_mass.to(tl.float32, bitcast=True).to(tl.int64))
    s = tl.where((mass >= keep) & (c < count), z - log_times(ids, word0, word1, FAST), float("-inf"))
    _, token = winner_of(s, ids)
    return token


@triton.jit
def _mass_from(x_row, top, scale, bits, vocab, BLOCK: tl.constexpr):
    """(how many tokens of a whole row have a weight whose float32 bits are at least `bits`, their mass)."""
    lane = tl.arange(0, BLOCK)
    number = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.int64)
    for at in range(0, vocab, BLOCK):
        q = weight((load_clean(x_row, at + lane, vocab) - top) * scale)
        inside = (q.to(tl.int32, bitcast=True) >= bits) & (at + lane < vocab)
        number += inside.to(tl.int32)
        mass += tl.where(inside, q.to(tl.int64), 0)
    return tl.sum(number, 0), tl.sum(mass, 0)


@triton.jit
def _race_from(x_row, top, scale, least, word0, word1, vocab, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """The winner among the tokens of a whole row whose weight is at least `least`."""
    lane = tl.arange(0, BLOCK)
    score = tl.full([BLOCK], float("-inf"), tl.float32)
    winner = tl.full([BLOCK], NO_ID, tl.int32)
    for at in range(0, vocab, BLOCK):
        i = at + lane
        x = load_clean(x_row, i, vocab)
        s = x * scale - log_times(i, word0, word1, FAST)
        better = (s > score) & (weight((x - top) * scale).to(tl.int64) >= least)
        score = tl.where(better, s, score)
        winner = tl.where(better, i, winner)
    _, token = winner_of(score, winner)
    return token


@triton.jit
def _settle_many(
    x_row, top, scale, top_k, top_p, keep, word0, word1, vocab, FAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """As _settle_few over the whole row, a pass for each bit: a top_k beyond what group maxima tell, or many ties."""
    by_rank = 0
    for b in range(0, 31):
        attempt = by_rank | (1 << (30 - b))
        number, _ = _mass_from(x_row, top, scale, attempt, vocab, BLOCK)
        by_rank = tl.where(number >= top_k, attempt, by_rank)
    keep = tl.maximum(keep, by_rank.to(tl.float32, bitcast=True).to(tl.int64))
    if top_p < WHOLE:
        _, ranked = _mass_from(x_row, top, scale, by_rank, vocab, BLOCK)
        limit = tl.maximum(share(ranked, top_p), 1)
        by_mass = 0
        for b in range(0, 31):
            attempt = by_mass | (1 << (30 - b))
            _, mass = _mass_from(x_row, top, scale, attempt, vocab, BLOCK)
            by_mass = tl.where(mass >= limit, attempt, by_mass)
        keep = tl.maximum(keep, by_mass.to(tl.float32, bitcast=True).to(tl.int64))
    return _race_from(x_row, top, scale, keep, word0, word1, vocab, FAST, BLOCK)


@triton.jit
def _race_on(
    row, slot, ints, x_row, top, scale, token, q, totals, aboves, word0, word1, vocab,
    FAST: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Go on with the rounds of race_pass and mass_pass from the winner `token` of weight q until one is kept."""
    keep = tl.load(ints + slot * INTS + MIN_WEIGHT)
    top_p = tl.load(ints + slot * INTS + TOP_P)
    total = tl.sum(tl.load(totals + row * SPLITS + tl.arange(0, SPLITS)), 0)
    limit = tl.where(top_p < WHOLE, tl.maximum(share(total, top_p), 1), 9223372036854775807)
    kept = _kept(row, slot, ints, totals, aboves, q, SPLITS)
    while (kept == 0) & (token < vocab):  # a poisoned row may have no token
        token = _race_from(x_row, top, scale, tl.maximum(q.to(tl.int64) + 1, keep), word0, word1, vocab, FAST, BLOCK)
        q = weight((load_clean(x_row, token, vocab) - top) * scale)
        _, above = _mass_from(x_row, top, scale, q.to(tl.int32, bitcast=True) + 1, vocab, BLOCK)
        kept = (q.to(tl.int64) >= keep) & (above < limit)
    return token


@triton.jit
def settle_rows(
    logits, slots, positions, ints, floats, largest, counts, candidates, candidate_ids, wins, win_weights, totals,
    aboves, drawn, vocab, stride,
    FAST: tl.constexpr, FEW: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Filtered rows: the winner among what is kept."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if (tl.load(ints + slot * INTS + NEEDS) & FILTERED) != 0:
        x_row = logits + row.to(tl.int64) * stride
        scale = tl.load(floats + slot * FLOATS)
        top = top_of(largest, row, SPLITS)
        top_k = tl.load(ints + slot * INTS + TOP_K)
        top_p = tl.load(ints + slot * INTS + TOP_P)
        keep = tl.load(ints + slot * INTS + MIN_WEIGHT)
        word0, word1 = row_words(tl.load(ints + slot * INTS + SEED), tl.load(positions + row).to(tl.int64))
        if top_k > 0:
            count = tl.load(counts + row)
            z, ids = candidates + row * MOST, candidate_ids + row * MOST
            if count <= FEW:
                token = _settle_few(z, ids, count, top_k, top_p, keep, word0, word1, FAST, FEW)
            elif count <= MOST:
                token = _settle_few(z, ids, count, top_k, top_p, keep, word0, word1, FAST, MOST)
            else:
                token = _settle_many(x_row, top, scale, top_k, top_p, keep, word0, word1, vocab, FAST, BLOCK)
        else:
            token = _race_on(
                row, slot, ints, x_row, top, scale, tl.load(wins + row), tl.load(win_weights + row), totals, aboves,
                word0, word1, vocab, FAST, BLOCK, SPLITS,
            )  # fmt: skip
        tl.store(drawn + row, token)
