"""What our GEMM does with a tile before storing it: the work between two GEMMs of a layer, without a launch of its own.

Used by gemm_kernels.py. RMSNorm is cut in two: the GEMM before it stores residual * gain and each tile's sum of squares
of a row; the GEMM after it multiplies that, and divides its results by the root mean square. So nothing is computed
twice and the main loop stays as it is. As on the plain path, a product is rounded before it is added, activated or
rotated. Legend: rn, rm outputs and rows of a tile; a tile is [BN, BM] with SWAP, else [BM, BN].
Invariant: a value is written by the program that owns its tile, to a tensor that no program of the launch reads.
"""

import triton
import triton.language as tl


@triton.jit
def by_row(values, SWAP: tl.constexpr):
    """One value for each row of x, as a tile that broadcasts."""
    if SWAP:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def by_column(values, SWAP: tl.constexpr):
    """One value for each output, as a tile that broadcasts."""
    if SWAP:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def rounded(values, like):
    """float32 values as they would come back from memory behind the pointer `like`."""
    return values.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def rms_factors(squares, parts, eps, rm, rows, width, PARTS: tl.constexpr):
    """1 / root mean square of rows rm, from squares float32 [rows, parts]: their sums of squares by tile."""
    part = tl.arange(0, PARTS)
    at = squares + rm[:, None] * parts + part[None, :]
    sums = tl.load(at, (rm < rows)[:, None] & (part < parts)[None, :], other=0.0)
    return tl.rsqrt(tl.sum(sums, 1) / width + eps)


@triton.jit
def store_tile(acc, out, rn, rm, rows, n, SWAP: tl.constexpr):
    """Round and store a tile of out [rows, n]."""
    at = by_row(rm.to(tl.int64) * n, SWAP) + by_column(rn, SWAP)
    live = by_row(rm < rows, SWAP) & by_column(rn < n, SWAP)
    tl.store(out + at, acc.to(out.dtype.element_ty), live)


@triton.jit
def residual_tile(residual, rn, rm, rows, n, SWAP: tl.constexpr):
    """A tile of the residual [rows, n]."""
    at = by_row(rm.to(tl.int64) * n, SWAP) + by_column(rn, SWAP)
    live = by_row(rm < rows, SWAP) & by_column(rn < n, SWAP)
    return tl.load(residual + at, live, other=0.0)


@triton.jit
def add_to_residual(acc, old, gains, out, rn, rm, rows, n, tile_n, tiles_n, add, SWAP: tl.constexpr):
    """Store r = old + scale * acc, out = r * gain, and the tile's sums of r * r to squares [rows, tiles_n]."""
    scale, new_residual, squares = add
    at = by_row(rm.to(tl.int64) * n, SWAP) + by_column(rn, SWAP)
    live = by_row(rm < rows, SWAP) & by_column(rn < n, SWAP)
    r = old.to(tl.float32) + scale * rounded(acc, new_residual)
    r = tl.where(live, rounded(r, new_residual), 0.0)
    tl.store(new_residual + at, r.to(new_residual.dtype.element_ty), live)
    tl.store(out + at, (r * by_column(gains, SWAP)).to(out.dtype.element_ty), live)
    sums = tl.sum(r * r, 0 if SWAP else 1)
    tl.store(squares + rm * tiles_n + tile_n, sums, rm < rows)


@triton.jit
def first_head_and_pair(tile, D: tl.constexpr, BN: tl.constexpr):
    """Those of a tile of heads, see `head_rows`."""
    if BN >= D:
        return tile * (BN // D), 0
    else:
        return tile // (D // BN), tile % (D // BN) * (BN // 2)


@triton.jit
def head_rows(i, tile, D: tl.constexpr, BN: tl.constexpr):
    """The outputs i of a tile of heads: whole heads, or (not interleaved) BN / 2 pairs of one, firsts then seconds."""
    head, pair = first_head_and_pair(tile, D, BN)
    if BN >= D:
        return head * D + i
    else:
        return head * D + i // (BN // 2) * (D // 2) + pair + i % (BN // 2)


@triton.jit
def stacked_rows(i, tile, n, BN: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr, HEADS: tl.constexpr):
    """The rows of a weight that are i of a tile: its outputs; with ACT of the first half of 2 n, then the second."""
    if ACT != "":
        return tl.minimum(tile * BN + i % BN, n - 1) + i // BN * n
    elif HEADS:
        return tl.minimum(head_rows(i, tile, D, BN), n - 1)
    else:
        return tl.minimum(tile * BN + i, n - 1)


@triton.jit
def cosines_and_sines(table, tile, rm, rows, D: tl.constexpr, BN: tl.constexpr):
    """Those of a tile's pairs in rows rm, [1, pairs, BM] each, of table float32 [T, 2, D / 2]."""
    PAIRS: tl.constexpr = min(BN, D) // 2
    pair = first_head_and_pair(tile, D, BN)[1] + tl.arange(0, PAIRS)
    at = table + rm.to(tl.int64)[None, None, :] * D + pair[None, :, None]
    live = (rm < rows)[None, None, :]
    return tl.load(at, live, other=1.0), tl.load(at + D // 2, live, other=0.0)


@triton.jit
def store_heads(
    acc, turn, slot, out, tile, rm, rows, operands, SWAP: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, KV_LIMIT: tl.constexpr,
):  # fmt: skip
    """QK-norm and rotate a tile of heads; queries to out [rows, H, D], keys and values to kv [slots, 2, K, D].

    What layer_kernels.rope_kernel does, for DIM = D, a power of two. turn: `cosines_and_sines`; slot [BM]; tile: see
    `head_rows`, whole heads with QK_NORM.
    """
    gains, eps, kv, kv_stride, heads, kv_heads = operands
    y = rounded(acc, out)
    if not SWAP:
        y = y.T
    BM: tl.constexpr = y.shape[1]
    COUNT: tl.constexpr = (y.shape[0] + D - 1) // D
    PAIRS: tl.constexpr = y.shape[0] // COUNT // 2
    if INTERLEAVED:
        pairs = tl.permute(tl.reshape(y, (COUNT, PAIRS, 2, BM)), (0, 1, 3, 2))
    else:
        pairs = tl.permute(tl.reshape(y, (COUNT, 2, PAIRS, BM)), (0, 2, 3, 1))
    first, second = tl.split(pairs)  # [COUNT, PAIRS, BM] each

    first_head, first_pair = first_head_and_pair(tile, D, y.shape[0])
    head = (first_head + tl.arange(0, COUNT))[:, None, None]
    pair = (first_pair + tl.arange(0, PAIRS))[None, :, None]
    row = rm[None, None, :]
    step: tl.constexpr = 2 if INTERLEAVED else 1
    other: tl.constexpr = 1 if INTERLEAVED else D // 2
    value = head >= heads + kv_heads
    if QK_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)  # [COUNT, BM]
        factor = tl.where(value, 1.0, tl.rsqrt(squares / D + eps)[:, None, :])
        at = gains + head * D + pair * step  # [H + K, D]: the values have no gain
        first *= factor * tl.load(at, ~value, other=1.0).to(tl.float32)
        second *= factor * tl.load(at + other, ~value, other=1.0).to(tl.float32)
    if ROTATE:
        cos, sin = turn
        turned = tl.where(value, first, first * cos - second * sin)
        second = tl.where(value, second, second * cos + first * sin)
        first = turned

    query = (head < heads) & (row < rows)
    at = out + row.to(tl.int64) * heads * D + head * D + pair * step
    tl.store(at, first.to(out.dtype.element_ty), query)
    tl.store(at + other, second.to(out.dtype.element_ty), query)
    if KV_LIMIT:
        limit = tl.full([], KV_LIMIT, tl.float32)
        first = tl.clamp(first, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        second = tl.clamp(second, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    written = (head >= heads) & (head < heads + 2 * kv_heads) & (row < rows)
    at = kv + slot[None, None, :] * kv_stride + (head - heads) * D + pair * step
    tl.store(at, first.to(kv.dtype.element_ty), written)
    tl.store(at + other, second.to(kv.dtype.element_ty), written)
