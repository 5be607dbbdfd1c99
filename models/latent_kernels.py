"""Triton kernel of paged attention over a cache of latents: decode rows and prefill chunks alike, as tiles of queries.

Used by latent_attention.py. All query heads share the keys, and a key's first part is its value, so a program takes
some queries with 16 heads each as the rows of its matrix, and reads a row of the cache once for both products. Softmax
runs online, in base 2 and float32; a float8 cache is widened on load.
Legend: H query heads, D width of a latent, E width of the rotated key beside it (padded to DP and EP).
"""

import triton
import triton.language as tl


@triton.jit
def latent(
    q, cache, pages, meta, out, lse, scale, heads,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (QUERIES of a tile of M, HEADS heads, split): a part of the keys that they see.

    q [T, H, D + E]; cache [slots, D + E]; meta int32 [tiles, 4] as Tiles.meta. With SPLITS = 1 out is [T, H, D]; else
    float32 [T, H, SPLITS, D], each part normalised by itself, with lse [T, H, SPLITS] in base 2.
    """
    parts: tl.constexpr = M // QUERIES
    tile = tl.program_id(0) // parts
    skipped = (tl.program_id(0) % parts) * QUERIES
    split = tl.program_id(2)
    first = tl.load(meta + tile * 4).to(tl.int64) + skipped
    count = tl.minimum(tl.load(meta + tile * 4 + 1), M) - skipped
    position = tl.load(meta + tile * 4 + 2) + skipped
    table = pages + tl.load(meta + tile * 4 + 3)
    if count > 0:
        row = tl.arange(0, QUERIES * HEADS)
        i = row // HEADS
        head = tl.program_id(1) * HEADS + row % HEADS
        d = tl.arange(0, DP)
        e = tl.arange(0, EP)
        n = tl.arange(0, BLOCK)
        live_row = (i < count) & (head < heads)
        at_q = q + ((first + i) * heads + head)[:, None] * (D + E)
        query = tl.load(at_q + d[None, :], live_row[:, None] & (d[None, :] < D), other=0.0)
        query_e = tl.load(at_q + D + e[None, :], live_row[:, None] & (e[None, :] < E), other=0.0)
        m = tl.full([QUERIES * HEADS], -float("inf"), tl.float32)
        total = tl.zeros([QUERIES * HEADS], tl.float32)
        acc = tl.zeros([QUERIES * HEADS, DP], tl.float32)
        end = position + tl.minimum(count, QUERIES)
        share = tl.cdiv(tl.cdiv(end, BLOCK), SPLITS) * BLOCK
        stop = tl.minimum((split + 1) * share, end)
        for at in tl.range(split * share, stop, BLOCK, num_stages=STAGES):
            key = at + n
            live = key < stop
            page = tl.load(table + key // PAGE, live, other=0).to(tl.int64)
            base = cache + (page * PAGE + key % PAGE)[:, None] * (D + E)
            k = tl.load(base + d[None, :], live[:, None] & (d[None, :] < D), other=0.0).to(query.dtype)
            k_e = tl.load(base + D + e[None, :], live[:, None] & (e[None, :] < E), other=0.0).to(query.dtype)
            s = tl.dot(query, tl.trans(k), input_precision=PRECISION)
            s += tl.dot(query_e, tl.trans(k_e), input_precision=PRECISION)
            seen = live[None, :] & (key[None, :] <= position + i[:, None])
            s = tl.where(seen, s * (scale * 1.4426950408889634), -float("inf"))
            top = tl.maximum(m, tl.max(s, 1))
            safe = tl.where(top == -float("inf"), 0.0, top)
            p = tl.exp2(s - safe[:, None])
            shrink = tl.exp2(m - safe)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + tl.dot(p.to(query.dtype), k, input_precision=PRECISION)
            m = top
        spot = ((first + i) * heads + head) * SPLITS + split
        total = tl.where(total == 0.0, 1.0, total)  # of splits without keys: their lse is -inf
        result = acc / total[:, None]
        at_out = out + spot[:, None] * D + d[None, :]
        tl.store(at_out, result.to(out.dtype.element_ty), live_row[:, None] & (d[None, :] < D))
        if SPLITS > 1:
            tl.store(lse + spot, m + tl.log2(total), live_row)
