"""The Triton GEMM of a decode step: few rows against a weight that is read from memory once, as fast as it comes.

Used by gemm.py, which chooses its tiles. At 1 to 64 rows the arithmetic is nothing and the weight everything, so all
programs are resident at once with deep pipelines, whether or not their number divides the SMs: those that are
left share the bandwidth. Narrow weights are split along K; the last program of a tile to arrive adds the parts up, in
a fixed order, so that results do not depend on who was last.
Invariant: results are a function of the row, the weight and the tile; `arrived` is all zeros between launches.
"""

import triton
import triton.language as tl


@triton.jit
def _store_tile(acc, bias, out, rn, rm, n, rows, SWAP: tl.constexpr, BIAS: tl.constexpr):
    """Add the bias, round and store a tile of out [rows, n]."""
    if BIAS:
        added = tl.load(bias + rn, rn < n, other=0.0).to(tl.float32)
        acc += added[:, None] if SWAP else added[None, :]
    at_m = rm.to(tl.int64) * n
    if SWAP:
        at = rn[:, None] + at_m[None, :]
        live = (rn < n)[:, None] & (rm < rows)[None, :]
    else:
        at = at_m[:, None] + rn[None, :]
        live = (rm < rows)[:, None] & (rn < n)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), live)


@triton.jit(do_not_specialize=["rows", "early"])
def linear_kernel(
    x, w, x_blocks, w_blocks, bias, out, parts, arrived, rows, n, k, early,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [rows, n] = x [rows, k] @ w [n, k].T + bias.

    BK divides k; grid (tiles of n * tiles of rows, SPLIT). SWAP: the weight is the left operand, which is padded to
    64 (tensor cores of sm_90), so that few rows cost little. TMA: tiles come through the descriptors x_blocks and
    w_blocks, with blocks [BM, BK] and [BN, BK]. parts float32 [tiles, SPLIT, BM * BN] and arrived int32 [tiles] are
    used with SPLIT > 1 only. PDL: what comes next is launched at once if `early`, else as the weight has been read.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    row_tiles = tl.cdiv(rows, BM)
    first_n, first_m = (tile // row_tiles) * BN, (tile % row_tiles) * BM
    rn, rm = first_n + tl.arange(0, BN), first_m + tl.arange(0, BM)
    share = tl.cdiv(k // BK, SPLIT)
    begin = part * share
    end = tl.minimum(begin + share, k // BK)
    if PDL:
        if early > 0:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    if not TMA:
        kk = begin * BK + tl.arange(0, BK)
        row_live = (rm < rows)[:, None]  # masked, not clamped: a row that all programs read BM times is a hot spot
        x_at = x + rm.to(tl.int64)[:, None] * k + kk[None, :]
        w_at = w + tl.minimum(rn, n - 1).to(tl.int64)[:, None] * k + kk[None, :]
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    for step in range(begin, end):
        if TMA:
            x_tile = x_blocks.load([first_m, step * BK])
            w_tile = w_blocks.load([first_n, step * BK])
        else:
            x_tile = tl.load(x_at, row_live, other=0.0)
            w_tile = tl.load(w_at)
            x_at += BK
            w_at += BK
        if SWAP:
            acc = tl.dot(w_tile, x_tile.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT == 1:
        _store_tile(acc, bias, out, rn, rm, n, rows, SWAP, BIAS)
    else:
        if SWAP:
            within = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        else:
            within = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tile_parts = parts + tile.to(tl.int64) * SPLIT * BM * BN + within
        tl.store(tile_parts + part * BM * BN, acc)
        tl.debug_barrier()  # all threads' parts are written before the arrival says so
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            tl.store(arrived + tile, 0)
            total = tl.load(tile_parts, cache_modifier=".cg")
            if BM * BN < 32768:
                for other in tl.static_range(1, SPLIT):
                    total += tl.load(tile_parts + other * BM * BN, cache_modifier=".cg")
            else:  # all at once do not fit into the registers
                for other in range(1, SPLIT):
                    total += tl.load(tile_parts + other * BM * BN, cache_modifier=".cg")
            _store_tile(total, bias, out, rn, rm, n, rows, SWAP, BIAS)
