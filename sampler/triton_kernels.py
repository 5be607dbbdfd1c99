"""The fused sampler's Triton kernels: edits, one pass over the logits, filters, and the result. See fused.py.

They do what reference.py says, row by row, each row only what its parameters need. No sort, no probabilities in memory,
no host. Differences from the reference are those of rounding: exp and log are the GPU's, scores are relative to a
split's maximum before they are compared (about 1e-5 apart at most), so ids differ only where the best two scores, or a
weight and a filter's threshold, are that near.
"""

import triton
import triton.language as tl

INTS = tl.constexpr(7)
SEED, TOP_K, TOP_P, MIN_WEIGHT, MIN_UNTIL, NEEDS = (tl.constexpr(i) for i in range(6))
FLOATS = tl.constexpr(4)
GREEDY, PENALTY, BIAS, FILTERED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
IN_PROMPT = tl.constexpr(1 << 14)
WHOLE = tl.constexpr(1 << 24)
POISON = tl.constexpr(3)
NO_ID = tl.constexpr(2147483647)
UNIT = tl.constexpr(1099511627776.0)  # 2**40: weights are integers in units of 2**-40
BUCKETS = tl.constexpr(128)
STEP = tl.constexpr(8.0)  # buckets per unit of z, in the histogram that finds how far down to look


@triton.jit
def row_words(seed, position):
    """Philox words 0 and 1 of stream 0, block 0 at this seed and position (see philox.py)."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = low * 0
    word0, word1, _, _ = tl.philox(seed.to(tl.uint64, bitcast=True), low, high, zero, zero)
    return word0, word1


@triton.jit
def hashes(ids, word0, word1):
    """32 random bits of each id (race.hashes)."""
    h = ids.to(tl.uint32) * 0x9E3779B1 + word0
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = ((h ^ (h >> 15)) ^ word1) * 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def uniform(h):
    """v of race.log_times: in (0, 1)."""
    return tl.minimum((h.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), 1.0 - 1.0 / 16777216.0)


@triton.jit
def log_times(v):
    """log(-log1p(-v)); a series where v is small, since winners have a small v."""
    series = v * (1.0 + v * (0.5 + v * (0.33333334 + v * 0.25)))
    return tl.log(tl.where(v < 0.015625, series, -tl.log(1.0 - v)))


@triton.jit
def race_bound(z, v):
    """No score z - log E is above this: E >= v, and a float's bits are nearly its logarithm, never above it."""
    return z + 0.6931472 * (127.0 - v.to(tl.int32, bitcast=True).to(tl.float32) * (1.0 / 8388608.0)) + 1e-4


@triton.jit
def edit_few(
    logits, slots, positions, ints, bias_ids, bias_values, stop_ids, eos_ids, stride, biases, stops, eos,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row by row, in place: add logit_bias; forbid stop tokens while fewer tokens than min_new_tokens were drawn."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    x = logits + row.to(tl.int64) * stride
    i = tl.arange(0, BLOCK)
    if (tl.load(ints + slot * INTS + NEEDS) & BIAS) != 0:
        for at in range(0, biases, BLOCK):
            token = tl.load(bias_ids + slot * biases + at + i, at + i < biases, other=-1)
            value = tl.load(bias_values + slot * biases + at + i, at + i < biases, other=0.0)
            tl.store(x + token, tl.load(x + token, token >= 0, other=0.0) + value, token >= 0)
    if tl.load(positions + row).to(tl.int64) < tl.load(ints + slot * INTS + MIN_UNTIL):
        tl.debug_barrier()
        for at in range(0, stops + eos, BLOCK):
            own = at + i < stops
            token = tl.load(stop_ids + slot * stops + at + i, own, other=-1)
            end = tl.load(eos_ids + at + i - stops, (at + i >= stops) & (at + i < stops + eos), other=-1)
            token = tl.where(own, token, end)
            before = tl.load(x + token, token >= 0, other=0.0)
            tl.store(x + token, tl.where(before < float("inf"), float("-inf"), before), token >= 0)  # poison stays


@triton.jit
def scan(
    logits, slots, positions, ints, floats, marks, bitmask, best, best_ids, largest, bad, vocab, stride, words, part,
    EDITED: tl.constexpr, MASKED: tl.constexpr, RANDOM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (row, split): the split's winner, its largest logit, and whether a logit is poison.

    Penalised and masked logits are written back, for the filters.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    needs = tl.load(ints + slot * INTS + NEEDS)
    x_row = logits + row.to(tl.int64) * stride
    racing = (needs & (GREEDY | FILTERED)) == 0
    scale = tl.load(floats + slot * FLOATS)
    word0, word1 = row_words(tl.load(ints + slot * INTS + SEED), tl.load(positions + row).to(tl.int64))
    top = float("-inf")
    score = float("-inf")
    winner = NO_ID
    poison = 0
    first = split * part
    for at in range(first, tl.minimum(first + part, vocab), BLOCK):
        i = at + tl.arange(0, BLOCK)
        live = i < vocab
        x = tl.load(x_row + i, live, other=float("-inf")).to(tl.float32)
        poison = tl.maximum(poison, tl.max((~(x < float("inf"))).to(tl.int32), 0))
        if EDITED:
            if (needs & PENALTY) != 0:
                mark = tl.load(marks + slot * vocab + i, live, other=0).to(tl.int32)
                repetition = tl.load(floats + slot * FLOATS + 1)
                count = (mark & (IN_PROMPT - 1)).to(tl.float32)
                x = tl.where(mark != 0, tl.where(x > 0, x / repetition, x * repetition), x)
                x -= tl.load(floats + slot * FLOATS + 2) * count
                x -= tl.where(count > 0, tl.load(floats + slot * FLOATS + 3), 0.0)
            if MASKED:
                word = tl.load(bitmask + row.to(tl.int64) * words + i // 32, live, other=0)
                x = tl.where(((word >> (i % 32)) & 1) != 0, x, float("-inf"))
            if MASKED | ((needs & PENALTY) != 0):
                tl.store(x_row + i, x.to(logits.dtype.element_ty), live)
        peak = tl.max(x, 0)
        if RANDOM & racing:
            if peak > float("-inf"):
                higher = tl.maximum(top, peak)
                if top > float("-inf"):
                    score += (top - higher) * scale
                top = higher
                z = (x - top) * scale
                v = uniform(hashes(i, word0, word1))
                if tl.max(race_bound(z, v), 0) > score:
                    s = z - log_times(v)
                    reached = tl.max(s, 0)
                    if reached > score:
                        score = reached
                        winner = tl.min(tl.where(s == reached, i, NO_ID), 0)
        elif peak > top:
            top = peak
            winner = tl.min(tl.where(x == peak, i, NO_ID), 0)
    place = row * SPLITS + split
    tl.store(largest + place, top)
    tl.store(best + place, score)
    tl.store(best_ids + place, winner)
    tl.store(bad + place, poison)


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
def gather_candidates(
    logits, slots, ints, floats, largest, candidates, candidate_ids, counts, masses, vocab, stride, MOST: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Filtered rows: collect the tokens that may be kept, at most MOST, and the mass of all. One program a row.

    A histogram of z over BUCKETS steps of 1 / STEP, from the top, says how far down to look: the kept tokens are above
    that bucket's lower end for certain. counts[row]: how many there are; more than MOST means that none are stored.
    """
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if (tl.load(ints + slot * INTS + NEEDS) & FILTERED) != 0:
        x_row = logits + row.to(tl.int64) * stride
        scale = tl.load(floats + slot * FLOATS)
        top = tl.max(tl.load(largest + row * SPLITS + tl.arange(0, SPLITS)), 0)
        top = tl.where((top < float("inf")) & (top > float("-inf")), top, 0.0)
        bucket = tl.arange(0, BUCKETS)
        tally = tl.zeros([BUCKETS], tl.int32)
        for at in range(0, vocab, BLOCK):
            i = at + tl.arange(0, BLOCK)
            x = load_clean(x_row, i, vocab)
            depth = (top - x) * (scale * STEP)
            inside = (depth >= 0) & (depth < BUCKETS - 1)
            tally += tl.histogram(tl.where(inside, depth, 0.0).to(tl.int32), BUCKETS, inside)
        above = tl.cumsum(tally, 0)
        top_k = tl.load(ints + slot * INTS + TOP_K)
        top_p = tl.load(ints + slot * INTS + TOP_P)
        # Which bucket certainly holds the k-th token, and which the one at which the mass is reached.
        by_rank = tl.sum((above < top_k).to(tl.int32), 0)
        upper = tl.exp(bucket.to(tl.float32) * (-1.0 / STEP))
        lower = upper * 0.8824969  # exp(-1 / STEP)
        all_mass = tl.sum(tally.to(tl.float32) * upper, 0) + vocab * 1.3e-7  # what is below the last bucket
        sure = tl.cumsum(tally.to(tl.float32) * lower, 0)
        wanted = all_mass * (top_p.to(tl.float32) / 16777216.0) * 1.0001
        by_mass = tl.sum((sure < wanted).to(tl.int32), 0)
        min_weight = tl.load(ints + slot * INTS + MIN_WEIGHT).to(tl.float32) / UNIT
        by_min = tl.where(min_weight > 0, (-tl.log(tl.maximum(min_weight, 1e-12)) * STEP).to(tl.int32) + 1, BUCKETS)
        last = tl.where(top_k > 0, by_rank, BUCKETS)
        last = tl.minimum(last, tl.where((top_k == 0) & (top_p < WHOLE), by_mass, BUCKETS))
        last = tl.minimum(last, tl.where((top_k == 0) & (top_p >= WHOLE), by_min, BUCKETS))
        known = last < BUCKETS - 1
        total = tl.sum(tl.where(bucket <= last, tally, 0), 0)
        stored = known & (total <= MOST)
        limit = top - (last + 1).to(tl.float32) / (scale * STEP)
        mass = tl.zeros([BLOCK], tl.int64)
        filled = 0
        sums = (top_k == 0) & (top_p < WHOLE)
        for at in range(0, vocab, BLOCK):
            i = at + tl.arange(0, BLOCK)
            x = load_clean(x_row, i, vocab)
            if sums:
                mass += weight((x - top) * scale).to(tl.int64)
            if stored:
                inside = x >= limit
                found = tl.sum(inside.to(tl.int32), 0)
                if found > 0:
                    place = filled + tl.cumsum(inside.to(tl.int32), 0) - 1
                    inside = inside & (place < MOST)
                    tl.store(candidates + row * MOST + place, (x - top) * scale, inside)
                    tl.store(candidate_ids + row * MOST + place, i, inside)
                    filled += found
        tl.store(counts + row, tl.where(stored & (filled <= MOST), filled, -1))
        tl.store(masses + row, tl.sum(mass, 0))


@triton.jit
def share(total, fraction):
    """floor(total * fraction / 2**24) without overflow (weights.share)."""
    return (total >> 24) * fraction + (((total & (WHOLE - 1)) * fraction) >> 24)


@triton.jit
def draw_kept(
    logits, slots, positions, ints, floats, largest, candidates, candidate_ids, counts, masses, drawn, vocab, stride,
    MOST: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Filtered rows: the threshold of top_k, top_p and min_p, and the winner among what is kept. One program a row.

    The threshold is found bit by bit: a float's bits above 0 order as it does, so 31 counts (for top_k) and 31 sums
    (for top_p) say exactly which weight it is. Among candidates these are registers; where there were too many
    candidates, each is a pass over the row.
    """
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if (tl.load(ints + slot * INTS + NEEDS) & FILTERED) != 0:
        x_row = logits + row.to(tl.int64) * stride
        scale = tl.load(floats + slot * FLOATS)
        top = tl.max(tl.load(largest + row * SPLITS + tl.arange(0, SPLITS)), 0)
        top = tl.where((top < float("inf")) & (top > float("-inf")), top, 0.0)
        top_k = tl.load(ints + slot * INTS + TOP_K)
        top_p = tl.load(ints + slot * INTS + TOP_P)
        keep = tl.load(ints + slot * INTS + MIN_WEIGHT)
        word0, word1 = row_words(tl.load(ints + slot * INTS + SEED), tl.load(positions + row).to(tl.int64))
        count = tl.load(counts + row)
        c = tl.arange(0, MOST)
        few = count >= 0
        z = tl.load(candidates + row * MOST + c, c < count, other=float("-inf"))
        ids = tl.load(candidate_ids + row * MOST + c, c < count, other=0)
        q = weight(z)
        keys = q.to(tl.int32, bitcast=True)
        q = q.to(tl.int64)
        by_rank = (top_k * 0).to(tl.int32)
        if top_k > 0:
            for b in range(0, 31):
                attempt = by_rank | (1 << (30 - b))
                if few:
                    reached = tl.sum((keys >= attempt).to(tl.int32), 0)
                else:
                    reached = 0
                    for at in range(0, vocab, BLOCK):
                        i = at + tl.arange(0, BLOCK)
                        x = load_clean(x_row, i, vocab)
                        bits = weight((x - top) * scale).to(tl.int32, bitcast=True)
                        reached += tl.sum((bits >= attempt).to(tl.int32), 0)
                by_rank = tl.where(reached >= top_k, attempt, by_rank)
            keep = tl.maximum(keep, by_rank.to(tl.float32, bitcast=True).to(tl.int64))
        if top_p < WHOLE:
            if few:
                ranked = tl.sum(tl.where(keys >= by_rank, q, 0), 0)
                ranked = tl.where(top_k > 0, ranked, tl.load(masses + row))
            else:
                mass = tl.zeros([BLOCK], tl.int64)
                for at in range(0, vocab, BLOCK):
                    i = at + tl.arange(0, BLOCK)
                    x = load_clean(x_row, i, vocab)
                    w = weight((x - top) * scale)
                    mass += tl.where(w.to(tl.int32, bitcast=True) >= by_rank, w.to(tl.int64), 0)
                ranked = tl.sum(mass, 0)
            limit = tl.maximum(share(ranked, top_p), 1)
            by_mass = (top_p * 0).to(tl.int32)
            for b in range(0, 31):
                attempt = by_mass | (1 << (30 - b))
                if few:
                    reached_mass = tl.sum(tl.where(keys >= attempt, q, 0), 0)
                else:
                    mass = tl.zeros([BLOCK], tl.int64)
                    for at in range(0, vocab, BLOCK):
                        i = at + tl.arange(0, BLOCK)
                        x = load_clean(x_row, i, vocab)
                        w = weight((x - top) * scale)
                        mass += tl.where(w.to(tl.int32, bitcast=True) >= attempt, w.to(tl.int64), 0)
                    reached_mass = tl.sum(mass, 0)
                by_mass = tl.where(reached_mass >= limit, attempt, by_mass)
            keep = tl.maximum(keep, by_mass.to(tl.float32, bitcast=True).to(tl.int64))
        score = float("-inf")
        winner = NO_ID
        if few:
            s = tl.where((q >= keep) & (c < count), z - log_times(uniform(hashes(ids, word0, word1))), float("-inf"))
            score = tl.max(s, 0)
            winner = tl.min(tl.where(s == score, ids, NO_ID), 0)
        else:
            for at in range(0, vocab, BLOCK):
                i = at + tl.arange(0, BLOCK)
                x = load_clean(x_row, i, vocab)
                y = (x - top) * scale
                s = y - log_times(uniform(hashes(i, word0, word1)))
                s = tl.where(weight(y).to(tl.int64) >= keep, s, float("-inf"))
                reached_score = tl.max(s, 0)
                if reached_score > score:
                    score = reached_score
                    winner = tl.min(tl.where(s == reached_score, i, NO_ID), 0)
        tl.store(drawn + row, winner)


@triton.jit
def finish_rows(
    slots, ints, floats, best, best_ids, largest, bad, drawn, stop_ids, marks, ids, finish, vocab, stops,
    FILTERING: tl.constexpr, EDITED: tl.constexpr, SPLITS: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """Row by row: the winner of all splits, whether it stops the request or the row is poison; count it."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    needs = tl.load(ints + slot * INTS + NEEDS)
    place = row * SPLITS + tl.arange(0, SPLITS)
    tops = tl.load(largest + place)
    top = tl.max(tops, 0)
    poison = (tl.max(tl.load(bad + place), 0) != 0) | ~(top > float("-inf"))
    lead = tl.where(top > float("-inf"), top, 0.0)
    scores = tl.load(best + place) + (tops - lead) * tl.load(floats + slot * FLOATS)
    scores = tl.where((needs & GREEDY) != 0, tops, scores)
    winners = tl.load(best_ids + place)
    token = tl.min(tl.where(scores == tl.max(scores, 0), winners, NO_ID), 0)
    if FILTERING and (needs & FILTERED) != 0:
        token = tl.load(drawn + row)
    poison = poison | (token >= vocab)
    token = tl.where(poison, 0, token)
    j = tl.arange(0, STOPS)
    stop = tl.load(stop_ids + slot * stops + j, j < stops, other=-1)
    stopped = tl.max((stop == token).to(tl.int32), 0)
    tl.store(ids + row, token)
    tl.store(finish + row, tl.where(poison, POISON, stopped).to(tl.uint8))
    if EDITED and (needs & PENALTY) != 0:
        mark = tl.load(marks + slot * vocab + token)
        full = (mark & (IN_PROMPT - 1)) == IN_PROMPT - 1
        tl.store(marks + slot * vocab + token, tl.where(full, mark, mark + 1).to(tl.int16))
