"""The fused sampler's Triton kernels for rows with top_p or min_p, but no top_k: exactly the tokens reference.py keeps.

Used by fused.py after scan_kernels.scan. The winner of the race over all tokens is also the winner of any kept set that
it is in, and it is in it if the mass above it is small enough: one pass says so. Otherwise nothing is kept that is not
above it, and the race goes on among those above, a pass for the next winner and one for the mass above that. Each round
is rarer than the rejected share of the mass; what is left after fused.ROUNDS rounds goes on in one program a row.
Invariant: weights are those of reference.py, step 6, integers, so that sums do not depend on their order.
"""

import triton
import triton.language as tl

from .rank_kernels import mass_from, race_from
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
    load_clean,
    log_times,
    row_words,
    share,
    top_of,
    weight,
    winner_of,
)


@triton.jit
def _racing(slot, ints):
    """Whether a row is filtered without top_k."""
    filtered = (tl.load(ints + slot * INTS + NEEDS) & FILTERED) != 0
    return filtered & (tl.load(ints + slot * INTS + TOP_K) == 0)


@triton.jit
def _kept(row, slot, ints, totals, aboves, q, SPLITS: tl.constexpr):
    """Whether a token of weight q is kept; totals and aboves [rows, SPLITS]: the mass of all, and above it."""
    kept = q.to(tl.int64) >= tl.load(ints + slot * INTS + MIN_WEIGHT)
    top_p = tl.load(ints + slot * INTS + TOP_P)
    if top_p < WHOLE:
        place = row * SPLITS + tl.arange(0, SPLITS)
        limit = tl.maximum(share(tl.sum(tl.load(totals + place), 0), top_p), 1)
        kept = kept & (tl.sum(tl.load(aboves + place), 0) < limit)
    return kept


@triton.jit
def race_pass(
    logits, slots, positions, ints, floats, largest, win_weights, totals, aboves, best, best_ids, vocab, stride, part,
    FAST: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (row, split), of rows whose last winner is not kept: the split's winner among the tokens above it."""
    row, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if _racing(slot, ints):
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
                x = load_clean(x_row, i, i < vocab)
                q = weight((x - top) * scale)
                s = x * (scale * LOG2E) - log_times(i, word0, word1, FAST)
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
    FIRST: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (row, split): of rows that raced (FIRST: in the scan), the new winner and the mass above it.

    Rows that did not race keep theirs. What is new is written to places of its own, since other programs of the row
    may still read the old. FIRST also sums the mass of all tokens.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if _racing(slot, ints):
        x_row = logits + row.to(tl.int64) * stride
        raced = True
        token, limit = NO_ID, 0.0
        mass_above = tl.zeros([], tl.int64)
        if not FIRST:
            token = tl.load(wins + row)
            limit = tl.load(win_weights + row)
            mass_above = tl.load(aboves + row * SPLITS + split)
            raced = not _kept(row, slot, ints, totals, aboves, limit, SPLITS)
        if raced:
            scale = tl.load(floats + slot * FLOATS)
            top = top_of(largest, row, SPLITS)
            place = row * SPLITS + tl.arange(0, SPLITS)
            _, token = winner_of(tl.load(best + place), tl.load(best_ids + place))
            limit = weight((load_clean(x_row, token, token < vocab) - top) * scale)
            if tl.load(ints + slot * INTS + TOP_P) < WHOLE:
                lane = tl.arange(0, BLOCK)
                total = tl.zeros([BLOCK], tl.int64)
                above = tl.zeros([BLOCK], tl.int64)
                first = split * part
                for at in range(first, tl.minimum(first + part, vocab), BLOCK):
                    q = weight((load_clean(x_row, at + lane, at + lane < vocab) - top) * scale)
                    mass = q.to(tl.int64)
                    above += tl.where(q > limit, mass, 0)
                    if FIRST:
                        total += mass
                mass_above = tl.sum(above, 0)
                if FIRST:
                    tl.store(totals + row * SPLITS + split, tl.sum(total, 0))
        tl.store(new_aboves + row * SPLITS + split, mass_above)
        if split == 0:
            tl.store(new_wins + row, token)
            tl.store(new_weights + row, limit)


@triton.jit
def settle_raced(
    logits, slots, positions, ints, floats, largest, wins, win_weights, totals, aboves, drawn, vocab, stride,
    FAST: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (row): the last winner if it is kept, else further rounds over the whole row until one is."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if _racing(slot, ints):
        x_row = logits + row.to(tl.int64) * stride
        scale = tl.load(floats + slot * FLOATS)
        top = top_of(largest, row, SPLITS)
        least = tl.load(ints + slot * INTS + MIN_WEIGHT)
        top_p = tl.load(ints + slot * INTS + TOP_P)
        token = tl.load(wins + row)
        q = tl.load(win_weights + row)
        word0, word1 = row_words(tl.load(ints + slot * INTS + SEED), tl.load(positions + row).to(tl.int64))
        total = tl.sum(tl.load(totals + row * SPLITS + tl.arange(0, SPLITS)), 0)
        limit = tl.where(top_p < WHOLE, tl.maximum(share(total, top_p), 1), 9223372036854775807)
        kept = _kept(row, slot, ints, totals, aboves, q, SPLITS)
        while (kept == 0) & (token < vocab):  # a poisoned row may have no token
            from_weight = tl.maximum(q.to(tl.int64) + 1, least)
            token = race_from(x_row, top, scale, from_weight, word0, word1, vocab, FAST, BLOCK)
            q = weight((load_clean(x_row, token, token < vocab) - top) * scale)
            _, above = mass_from(x_row, top, scale, q.to(tl.int32, bitcast=True) + 1, vocab, BLOCK)
            kept = (q.to(tl.int64) >= least) & (above < limit)
        tl.store(drawn + row, token)
