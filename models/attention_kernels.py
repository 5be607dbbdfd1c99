"""Triton kernels of paged attention: split-KV decode with its merge, and prefill of ragged chunks over a cached prefix.

Used by triton_attention.py. Softmax runs online, in base 2 and float32 (Milakov and Gimelshein 2018; Dao et al.,
"FlashDecoding", 2023); a float8 cache is widened on load. What is outside of a sequence is masked, never read as a key.
Decode may rotate heads and write the newest keys and values itself.
Legend: B decode rows, H query heads, K KV heads, G = H / K (padded to GP), D head_dim (padded to DP), P table entries.
"""

import triton
import triton.language as tl


@triton.jit
def _scaled(s, scale, cap, SOFTCAP: tl.constexpr):
    """Products of queries and keys -> scores in units of log2 e."""
    if SOFTCAP:
        t = s * (scale / cap)
        s = cap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp(2.0 * t) + 1.0))
    else:
        s = s * (scale * 1.4426950408889634)
    return s


@triton.jit
def _scores(q, k, scale, cap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """q [M, D], k [D, N] -> scores in units of log2 e."""
    return _scaled(tl.dot(q, k, input_precision=PRECISION), scale, cap, SOFTCAP)


@triton.jit
def _attended(
    query, k, v, seen, m, total, acc, scale, cap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One block further in the online softmax: query [GP, DP], k [DP, BLOCK], v [BLOCK, DP], seen [BLOCK]."""
    s = _scores(query, k.to(query.dtype), scale, cap, SOFTCAP, PRECISION)
    s = tl.where(seen[None, :], s, -float("inf"))
    top = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - top[:, None])
    shrink = tl.exp2(m - top)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(query.dtype), v.to(query.dtype), input_precision=PRECISION)
    return top, total, acc


@triton.jit
def _keys_and_values(cache, table, key, end, head, d, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr):
    """Keys [DP, BLOCK] and values [BLOCK, DP] of a head at the positions `key` below `end`; zeros elsewhere."""
    live = key < end
    page = tl.load(table + key // PAGE, live, other=0).to(tl.int64)
    base = (page * PAGE + key % PAGE) * (2 * K * D) + head * D
    k = tl.load(cache + base[None, :] + d[:, None], live[None, :] & (d[:, None] < D), other=0.0)
    v = tl.load(cache + base[:, None] + K * D + d[None, :], live[:, None] & (d[None, :] < D), other=0.0)
    return k, v


@triton.jit
def _rotated(x, other, live, cos, sin):
    """What is at x, rotated with its partners at `other`; float32. `sin` has the sign of a half."""
    one = tl.load(x, live, other=0.0).to(tl.float32)
    return one * cos + tl.load(other, live, other=0.0).to(tl.float32) * sin


@triton.jit
def decode(
    q, cache, tables, rows, lengths, out, partial, partial_lse, counters, turns, slots, scale, cap, window, q_stride,
    width,
    HAS_ROWS: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """Program (KV head, split, row): the group's queries over a share of the row's keys.

    Partial results are merged by the last program of a (row, head) to arrive; `counters` go back to zero. SPLITS is a
    power of two. PDL: launched before its predecessor ends, and lets its successor be. AHEAD blocks of keys and values
    are loaded before the wait: all but the newest, which the predecessor writes, are of earlier steps, and so are
    lengths and tables of the kernels that begin a step, which are launched without PDL.
    ROTATE: q [B, H + 2K, D] are heads as the QKV product leaves them, turns float32 [B, 2, D / 2] cosines and sines;
    a row's newest key and value are written to slots [B] of the cache, by the program whose share they are in.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    length = tl.load(lengths + b)
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0) // BLOCK * BLOCK
    blocks = tl.cdiv(length - first, BLOCK)
    share = tl.cdiv(blocks, SPLITS)
    start = first + split * share * BLOCK
    end = tl.minimum(start + share * BLOCK, length)
    used = tl.cdiv(blocks, share)
    row = b
    if HAS_ROWS:
        row = tl.load(rows + b).to(tl.int32)
    table = tables + row.to(tl.int64) * width
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    n = tl.arange(0, BLOCK)
    newest = length - 1
    last = tl.minimum(end, newest) if AHEAD > 0 or ROTATE else end
    older_k = ()
    older_v = ()
    for j in tl.static_range(AHEAD):
        k, v = _keys_and_values(cache, table, start + j * BLOCK + n, last, head, d, K, D, PAGE)
        older_k = older_k + (k,)  # type: ignore[assignment]  # noqa: RUF005
        older_v = older_v + (v,)  # type: ignore[assignment]  # noqa: RUF005
    new = cache
    if ROTATE:  # not where the table says: what a row that is done computes goes to a slot of no sequence
        new += tl.load(slots + b).to(tl.int64) * (2 * K * D) + head * D
    elif AHEAD > 0:
        new += (tl.load(table + newest // PAGE).to(tl.int64) * PAGE + newest % PAGE) * (2 * K * D) + head * D
    if PDL:
        tl.extra.cuda.gdc_wait()
    if split < used:
        own = q + b.to(tl.int64) * q_stride
        at = own + (head * G + g[:, None]) * D
        real = (g[:, None] < G) & (d[None, :] < D)
        if ROTATE:  # pairs are half a head apart
            other = (d + D // 2) % D
            cos = tl.load(turns + b * D + d % (D // 2), d < D, other=0.0)
            sin = tl.load(turns + b * D + D // 2 + d % (D // 2), d < D, other=0.0)
            sin = tl.where(d < D // 2, -sin, sin)
            query = _rotated(at + d[None, :], at + other[None, :], real, cos[None, :], sin[None, :])
            query = query.to(q.dtype.element_ty)
            own += (K * G + head) * D
            written_k = _rotated(own + d, own + other, d < D, cos, sin).to(cache.dtype.element_ty)
            written_v = tl.load(own + K * D + d, d < D, other=0.0).to(cache.dtype.element_ty)
            if newest < end:
                tl.store(new + d, written_k, d < D)
                tl.store(new + K * D + d, written_v, d < D)
        else:
            query = tl.load(at + d[None, :], real, other=0.0)
        m = tl.full([GP], -float("inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)
        if AHEAD > 0 or ROTATE:  # the newest key by itself, where it is among these
            new_k = written_k if ROTATE else tl.load(new + d, d < D, other=0.0)
            new_v = written_v if ROTATE else tl.load(new + K * D + d, d < D, other=0.0)
            new_k = new_k.to(query.dtype).to(tl.float32)
            new_v = new_v.to(query.dtype).to(tl.float32)
            score = _scaled(tl.sum(query.to(tl.float32) * new_k[None, :], 1), scale, cap, SOFTCAP)
            ours = newest < end
            m = tl.where(ours, score, m)
            total = tl.where(ours, 1.0, total)
            acc = tl.where(ours, new_v[None, :], acc)
        for at in tl.range(start + AHEAD * BLOCK, last, BLOCK, num_stages=STAGES):
            key = at + n
            seen = key < last
            if WINDOW:
                seen = seen & (key >= length - window)
            k, v = _keys_and_values(cache, table, key, last, head, d, K, D, PAGE)
            m, total, acc = _attended(query, k, v, seen, m, total, acc, scale, cap, SOFTCAP, PRECISION)
        if AHEAD > 0:  # all of them at once: one search for the largest score, one sum
            scores = ()
            peaks = tl.full([GP, BLOCK], -float("inf"), tl.float32)
            for j in tl.static_range(AHEAD):
                key = start + j * BLOCK + n
                seen = key < last
                if WINDOW:
                    seen = seen & (key >= length - window)
                s = _scores(query, older_k[j].to(query.dtype), scale, cap, SOFTCAP, PRECISION)
                s = tl.where(seen[None, :], s, -float("inf"))
                scores = scores + (s,)  # noqa: RUF005
                peaks = tl.maximum(peaks, s)
            top = tl.maximum(m, tl.max(peaks, 1))
            shrink = tl.exp2(m - top)
            acc *= shrink[:, None]
            weights = tl.zeros([GP, BLOCK], tl.float32)
            for j in tl.static_range(AHEAD):
                p = tl.exp2(scores[j] - top[:, None])
                weights += p
                acc = tl.dot(p.to(query.dtype), older_v[j].to(query.dtype), acc, input_precision=PRECISION)
            total = total * shrink + tl.sum(weights, 1)
            m = top
        mask = (g[:, None] < G) & (d[None, :] < D)
        place = (b * K + head) * G + g
        if SPLITS == 1:
            tl.store(
                out + place.to(tl.int64)[:, None] * D + d[None, :],
                (acc / total[:, None]).to(out.dtype.element_ty),
                mask,
            )
        else:
            spot = place * SPLITS + split
            tl.store(partial + spot.to(tl.int64)[:, None] * D + d[None, :], acc / total[:, None], mask)
            tl.store(partial_lse + spot, m + tl.log2(total), g < G)
            tl.debug_barrier()
            arrived = tl.atomic_add(counters + b * K + head, 1, sem="acq_rel")
            if arrived == used - 1:
                tl.store(counters + b * K + head, 0)
                i = tl.arange(0, SPLITS)
                lse = tl.load(
                    partial_lse + place[:, None] * SPLITS + i[None, :], (g[:, None] < G) & (i[None, :] < used),
                    other=-float("inf"), cache_modifier=".cg",
                )  # fmt: skip
                top = tl.where(g < G, tl.max(lse, 1), 0.0)
                total = tl.where(g < G, tl.sum(tl.exp2(lse - top[:, None]), 1), 1.0)
                merged = tl.zeros([GP, DP], tl.float32)
                for part in tl.static_range(SPLITS):  # unrolled, so that all loads are under way at once
                    live = g * 0 + part < used
                    weight = tl.load(
                        partial_lse + place * SPLITS + part, (g < G) & live, other=-float("inf"),
                        cache_modifier=".cg",
                    )  # fmt: skip
                    source = (place * SPLITS + part).to(tl.int64)[:, None] * D + d[None, :]
                    values = tl.load(partial + source, mask & live[:, None], other=0.0, cache_modifier=".cg")
                    merged += values * tl.exp2(weight - top)[:, None]
                result = (merged / total[:, None]).to(out.dtype.element_ty)
                tl.store(out + place.to(tl.int64)[:, None] * D + d[None, :], result, mask)


@triton.jit
def prefill(
    q, cache, pages, meta, out, scale, cap, window, q_stride,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile, query head): M queries of one chunk over the keys that they see.

    meta int32 [tiles, 4]: first query row in q, queries left in the chunk, position of the first query, first entry of
    the sequence in `pages`.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(meta + tile * 4).to(tl.int64)
    count = tl.load(meta + tile * 4 + 1)
    position = tl.load(meta + tile * 4 + 2)
    table = pages + tl.load(meta + tile * 4 + 3)
    i = tl.arange(0, M)
    d = tl.arange(0, DP)
    n = tl.arange(0, BLOCK)
    mask = (i[:, None] < count) & (d[None, :] < D)
    query = tl.load(q + (first + i[:, None]) * q_stride + head * D + d[None, :], mask, other=0.0)
    m = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DP], tl.float32)
    end = position + tl.minimum(count, M)
    start = 0
    if WINDOW:
        start = tl.maximum(position - window + 1, 0) // BLOCK * BLOCK
    for at in tl.range(start, end, BLOCK, num_stages=STAGES):
        key = at + n
        live = key < end
        k, v = _keys_and_values(cache, table, key, end, head // G, d, K, D, PAGE)
        s = _scores(query, k.to(query.dtype), scale, cap, SOFTCAP, PRECISION)
        seen = key[None, :] <= position + i[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > position + i[:, None] - window)
        s = tl.where(seen & live[None, :], s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(query.dtype), v.to(query.dtype), input_precision=PRECISION)
        m = top
    total = tl.where(total == 0.0, 1.0, total)  # of queries beyond the chunk
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (first + i[:, None]) * (K * G * D) + head * D + d[None, :], result, mask)
