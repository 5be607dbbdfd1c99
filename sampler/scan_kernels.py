"""The fused sampler's Triton kernels that every batch needs: edits, one pass over the logits, and the result.

Used by fused.py; rank_kernels.py and race_kernels.py continue for rows with top_k, top_p or min_p. They do what
reference.py says, row by row, each row only what its parameters need: no sort, no probabilities in memory, no host.
Differences from the reference are those of rounding (log and exp are the GPU's, and a score is x / T - log E instead of
being relative to the largest logit: about 1e-6 apart for usual logits), so ids differ only where the best two scores
are that near.
"""

import triton
import triton.language as tl

INTS = tl.constexpr(7)
SEED, TOP_K, TOP_P, MIN_WEIGHT, MIN_UNTIL, NEEDS = (tl.constexpr(i) for i in range(6))
FLOATS = tl.constexpr(4)
GREEDY, PENALTY, BIAS, FILTERED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
IN_PROMPT = tl.constexpr(1 << 14)
WHOLE = tl.constexpr(1 << 24)
STOP, POISON, DEAD = tl.constexpr(1), tl.constexpr(3), tl.constexpr(4)
NO_ID = tl.constexpr(2147483647)
COLUMNS = tl.constexpr(4)  # of a grammar in the directory: addresses of its three tables, number of classes
END = tl.constexpr(1)  # the class of tokens that end a grammar's output


@triton.jit
def row_words(seed, position):
    """Philox words 0 and 1 of stream 0, block 0 at this seed and position (see philox.py)."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    zero = low * 0
    word0, word1, _, _ = tl.philox(seed.to(tl.uint64, bitcast=True), low, high, zero, zero)
    return word0, word1


LOG2E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(1099511627776.0)  # 2**40: weights are integers in units of 2**-40


@triton.jit
def log2(x, FAST: tl.constexpr):
    """Binary logarithm; FAST: the GPU's, right to 2**-22 absolutely near 1 and relatively elsewhere."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def log_times(ids, word0, word1, FAST: tl.constexpr):
    """log2 of (E * log2 e) of each id (race.hashes, race.log_times); a series for small v, which winners have."""
    h = ids.to(tl.uint32) * 0x9E3779B1 + word0
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = ((h ^ (h >> 15)) ^ word1) * 0x735A2D97
    h = h ^ (h >> 15)
    # (h + 0.5) * 2**-32 in one step: scaling by a power of two does not round, so it is the same.
    v = tl.minimum(h.to(tl.float32) * (1.0 / 4294967296.0) + 0.5 / 4294967296.0, 1.0 - 1.0 / 16777216.0)
    series = v * (
        1.44269504 + v * (0.72134752 + v * (0.48089835 + v * (0.36067376 + v * (0.28853901 + v * 0.2404492))))
    )
    return log2(tl.where(v < 0.0625, series, -log2(1.0 - v, FAST)), FAST)


@triton.jit
def weight(z):
    """q of reference.py, step 6, as a float32 that holds the integer exactly."""
    return tl.floor(tl.exp(z) * UNIT)


@triton.jit
def share(total, fraction):
    """floor(total * fraction / 2**24) without overflow (weights.share)."""
    return (total >> 24) * fraction + (((total & (WHOLE - 1)) * fraction) >> 24)


@triton.jit
def load_clean(x_row, i, live):
    """Logits of a row; -inf in the place of NaN and inf, whose row is poison anyway."""
    x = tl.load(x_row + i, live, other=float("-inf")).to(tl.float32)
    return tl.where(x < float("inf"), x, float("-inf"))


@triton.jit
def top_of(largest, row, SPLITS: tl.constexpr):
    """The row's largest logit, 0 for one without."""
    tops = tl.load(largest + row * SPLITS + tl.arange(0, SPLITS))
    top = tl.max(tl.where(tops < float("inf"), tops, float("-inf")), 0)  # NaN where the row is poison
    return tl.where(top > float("-inf"), top, 0.0)


@triton.jit
def by_order(bits):
    """int32 keys in the order of the floats whose bits these are, and such keys' bits: it is its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def winner_of(scores, ids):
    """(the largest score, its id, the lowest among equals)."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, ids, NO_ID), 0)


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
def _edited(
    x, x_at, i, live, needs, slot, floats, marks, bitmask_row, vocab, MASKED: tl.constexpr
):  # fmt: skip
    """Penalise and mask logits x at the ids i, and write what changed back, for the filters, which see it rounded."""
    if (needs & PENALTY) != 0:
        mark = tl.load(marks + slot * vocab + i, live, other=0).to(tl.int32)
        repetition = tl.load(floats + slot * FLOATS + 1)
        count = (mark & (IN_PROMPT - 1)).to(tl.float32)
        x = tl.where(mark != 0, tl.where(x > 0, x / repetition, x * repetition), x)
        x -= tl.load(floats + slot * FLOATS + 2) * count
        x -= tl.where(count > 0, tl.load(floats + slot * FLOATS + 3), 0.0)
        rounded = x.to(x_at.dtype.element_ty)
        tl.store(x_at + i, rounded, live & (mark != 0))
        x = rounded.to(tl.float32)
    if MASKED:
        word = tl.load(bitmask_row + i // 32, live, other=0)
        x = tl.where(((word >> (i % 32)) & 1) != 0, x, float("-inf"))
        tl.store(x_at + i, x.to(x_at.dtype.element_ty), live)
    return x


@triton.jit
def _grammar_of(slot, bound, states, directory):
    """(whether there is a grammar, classes of the tokens, transitions by class, canonical token, state).

    The canonical token is -1 where there is none, the state -1 where no token can come.
    """
    number = tl.load(bound + slot)
    has = number >= 0
    place = directory + tl.maximum(number, 0) * COLUMNS
    state = tl.load(states + slot)
    classes = tl.load(place).to(tl.pointer_type(tl.int16))
    transitions = tl.load(place + 1).to(tl.pointer_type(tl.int16)) + state * tl.load(place + 3)
    canonical = tl.load(place + 2).to(tl.pointer_type(tl.int32)) + state
    state = tl.where(has, state, -1)
    return has, classes, transitions, tl.load(canonical, state >= 0, other=-1), state


@triton.jit
def _look(
    at, lane, top, raw, score, winner, x_row, slot, needs, floats, marks, bitmask_row, scale, word0, word1, racing,
    bound, states, directory, vocab,
    EDITED: tl.constexpr, MASKED: tl.constexpr, CONSTRAINED: tl.constexpr, RANDOM: tl.constexpr, FAST: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Take the block of logits at `at` into the scan's state; TAIL: it may end beyond the vocabulary."""
    i = at + lane
    live = (i < vocab) if TAIL else None
    other = float("-inf") if TAIL else None
    x = tl.load(x_row + i, live, other=other).to(tl.float32)
    if EDITED or CONSTRAINED:
        raw = tl.maximum(raw, x, propagate_nan=tl.PropagateNan.ALL)
    if EDITED:
        x = _edited(x, x_row, i, i < vocab, needs, slot, floats, marks, bitmask_row, vocab, MASKED)
    if CONSTRAINED:
        has, classes, transitions, canonical, state = _grammar_of(slot, bound, states, directory)
        if has:
            known = i < tl.where(state >= 0, vocab, 0)
            after = tl.load(transitions + tl.load(classes + i, known, other=0), known, other=-1)
            free = tl.where(canonical >= 0, i == canonical, after >= 0)
            x = tl.where(free, x, float("-inf"))
            if (needs & FILTERED) != 0:  # the filters read the logits again
                tl.store(x_row + i, x.to(x_row.dtype.element_ty), (i < vocab) & ~free)
    top = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
    s = x
    if RANDOM and racing:
        s = x * scale - log_times(i, word0, word1, FAST)
    better = s > score
    return top, raw, tl.where(better, s, score), tl.where(better, i, winner)


@triton.jit
def scan(
    logits, slots, positions, ints, floats, marks, masks, bound, states, directory, best, best_ids, largest,
    group_tops, vocab, stride, words, part,
    EDITED: tl.constexpr, MASKED: tl.constexpr, CONSTRAINED: tl.constexpr, RANDOM: tl.constexpr,
    RANKED: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Program (row, split): the split's winner, and its largest logit, NaN if one is before edits and masks.

    Everything is kept lane by lane and reduced once, at the end: a reduction in the loop would make its warps wait for
    each other. Rows with top_k do not race; RANKED: they leave the largest logit of each of GROUPS groups of lanes.
    """
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row).to(tl.int64)
    needs = tl.load(ints + slot * INTS + NEEDS)
    top_k = tl.load(ints + slot * INTS + TOP_K)
    x_row = logits + row.to(tl.int64) * stride
    bitmask_row = masks + slot * words
    racing = ((needs & GREEDY) == 0) & (top_k == 0)
    scale = tl.load(floats + slot * FLOATS) * LOG2E
    word0, word1 = row_words(tl.load(ints + slot * INTS + SEED), tl.load(positions + row).to(tl.int64))
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    raw = top
    score = top
    winner = tl.full([BLOCK], NO_ID, tl.int32)
    first = split * part
    last = tl.minimum(first + part, vocab)
    whole = first + tl.maximum(last - first, 0) // BLOCK * BLOCK
    for at in range(first, whole, BLOCK):
        top, raw, score, winner = _look(
            at, lane, top, raw, score, winner, x_row, slot, needs, floats, marks, bitmask_row, scale, word0, word1,
            racing, bound, states, directory, vocab, EDITED, MASKED, CONSTRAINED, RANDOM, FAST, False,
        )  # fmt: skip
    if whole < last:
        top, raw, score, winner = _look(
            whole, lane, top, raw, score, winner, x_row, slot, needs, floats, marks, bitmask_row, scale, word0, word1,
            racing, bound, states, directory, vocab, EDITED, MASKED, CONSTRAINED, RANDOM, FAST, True,
        )  # fmt: skip
    if not (EDITED or CONSTRAINED):
        raw = top
    place = row * splits + split
    reached, token = winner_of(score, winner)
    poison = tl.max((~(raw < float("inf")) | ~(top < float("inf"))).to(tl.int32), 0) != 0
    peak = tl.max(tl.where(top < float("inf"), top, float("-inf")), 0)
    tl.store(largest + place, tl.where(poison, float("nan"), peak))
    tl.store(best + place, reached)
    tl.store(best_ids + place, token)
    if RANKED and top_k > 0:
        tops = tl.max(tl.reshape(top, (GROUPS, BLOCK // GROUPS)), 1)
        tl.store(group_tops + place * GROUPS + tl.arange(0, GROUPS), tops)


@triton.jit
def finish_rows(
    slots, ints, best, best_ids, largest, drawn, stop_ids, marks, bound, states, directory, ids, finish, vocab, stops,
    FILTERING: tl.constexpr, EDITED: tl.constexpr, CONSTRAINED: tl.constexpr, MASKED: tl.constexpr,
    SPLITS: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """Row by row: the winner of all splits, whether it stops the request or the row is poison; count it."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    needs = tl.load(ints + slot * INTS + NEEDS)
    place = row * SPLITS + tl.arange(0, SPLITS)
    tops = tl.load(largest + place)
    clean = tl.min((tops < float("inf")).to(tl.int32), 0) != 0
    empty = ~(tl.max(tl.where(tops < float("inf"), tops, float("-inf")), 0) > float("-inf"))
    poison = ~clean | empty
    _, token = winner_of(tl.load(best + place), tl.load(best_ids + place))
    if FILTERING and (needs & FILTERED) != 0:
        token = tl.load(drawn + row)
    poison = poison | (token >= vocab)
    token = tl.where(poison, 0, token)
    j = tl.arange(0, STOPS)
    stop = tl.load(stop_ids + slot * stops + j, j < stops, other=-1)
    stopped = tl.max((stop == token).to(tl.int32), 0)
    tl.store(ids + row, token)
    verdict = tl.where(poison, POISON, stopped * STOP)
    if MASKED:  # logits of the model are never all -inf
        verdict = tl.where(clean & empty, DEAD, verdict)
    if CONSTRAINED:
        has, classes, transitions, _, state = _grammar_of(slot, bound, states, directory)
        if has:
            kind = tl.load(classes + token)
            after = tl.load(transitions + kind, tl.where(poison, -1, state) >= 0, other=-1)
            tl.store(states + slot, tl.where(poison, state, after.to(tl.int32)))
            verdict = tl.where(poison, tl.where(clean & empty, DEAD, POISON), tl.where(kind == END, STOP, verdict))
    tl.store(finish + row, verdict.to(tl.uint8))
    if EDITED and (needs & PENALTY) != 0:
        mark = tl.load(marks + slot * vocab + token)
        full = (mark & (IN_PROMPT - 1)) == IN_PROMPT - 1
        tl.store(marks + slot * vocab + token, tl.where(full, mark, mark + 1).to(tl.int16))
