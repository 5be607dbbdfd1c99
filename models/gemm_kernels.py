"""The Triton GEMM of a decode step: few rows against a weight that is read from memory once, as fast as it comes.

Used by gemm.py, which chooses its tiles. At 1 to 64 rows the arithmetic is nothing and the weight everything, so all
programs are resident at once with deep pipelines, whether or not their number divides the SMs: those that are
left share the bandwidth. Narrow weights are split along K; the last program of a tile to arrive adds the parts up, in
a fixed order, so that results do not depend on who was last. What a layer does between two GEMMs is done where the
first one stores its tile (gemm_epilogues.py): the second then reads its operand as it is, and needs one number a row.
Invariant: results are a function of the row, the weight and the tile; `arrived` is all zeros between launches.
"""

import triton
import triton.language as tl

from .fetch_kernels import ask_rows
from .gemm_epilogues import (
    add_to_residual,
    by_column,
    by_row,
    cosines_and_sines,
    head_rows,
    residual_tile,
    rms_factors,
    rounded,
    store_heads,
    store_tile,
)
from .layer_kernels import activate


@triton.jit
def _multiply(w_tile, x_tile, acc, BM: tl.constexpr, SWAP: tl.constexpr):
    """acc + the product of w_tile [BN, BK] and x_tile [BM, BK].

    One row is multiplied without tensor cores: acc [BN, BK / 8] holds sums of what a thread has loaded at once. If BK
    is 256 for each warp, a thread's elements of both tiles are in the same columns, and none goes to another thread.
    """
    if BM == 1:
        products = w_tile.to(tl.float32) * x_tile.to(tl.float32)
        acc += tl.sum(tl.reshape(products, (products.shape[0], products.shape[1] // 8, 8)), 2)
    elif SWAP:
        acc = tl.dot(w_tile, x_tile.T, acc, input_precision="ieee")
    else:
        acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
    return acc


@triton.jit
def total(parts, SPLIT: tl.constexpr, SIZE: tl.constexpr, SMALL: tl.constexpr):
    """The sum of a tile's parts, SIZE elements apart."""
    sums = tl.load(parts, cache_modifier=".cg")
    if SMALL:
        for other in tl.static_range(1, SPLIT):
            sums += tl.load(parts + other * SIZE, cache_modifier=".cg")
    else:  # all at once do not fit into the registers
        for other in range(1, SPLIT):
            sums += tl.load(parts + other * SIZE, cache_modifier=".cg")
    return sums


@triton.jit
def finish(
    acc, up, factors, biases, old, turn, out, rn, rm, rows, n, tile_n, tiles_n, add, heads,
    SWAP: tl.constexpr, BIAS: tl.constexpr, NORMED: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
    HEADS: tl.constexpr, LATE: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr, ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr, KV_LIMIT: tl.constexpr,
):  # fmt: skip
    """From a tile's sums to what is stored; `up` is the second half of a gate-up weight and used with ACT.

    LATE: `old` and `turn` are where the residual and the table lie; else they are what was loaded from there.
    """
    if NORMED:
        acc *= by_row(factors, SWAP)
    if BIAS:
        acc += by_column(biases[0], SWAP)
    if ACT != "":
        if NORMED:
            up *= by_row(factors, SWAP)
        if BIAS:
            up += by_column(biases[1], SWAP)
        acc = activate(rounded(acc, out), ACT) * rounded(up, out)
    if ADD:
        gains, scale, new_residual, new_squares = add
        if LATE:
            old = residual_tile(old, rn, rm, rows, n, SWAP)
        parts = (scale, new_residual, new_squares)
        add_to_residual(acc, old, gains, out, rn, rm, rows, n, tile_n, tiles_n, parts, SWAP)
    elif HEADS:
        slot, gains, eps, kv, kv_stride, count, kv_count = heads
        if LATE and ROTATE:
            turn = cosines_and_sines(turn, tile_n, rm, rows, D, rn.shape[0])
        operands = (gains, eps, kv, kv_stride, count, kv_count)
        store_heads(acc, turn, slot, out, tile_n, rm, rows, operands, SWAP, D, QK_NORM, ROTATE, INTERLEAVED, KV_LIMIT)
    else:
        store_tile(acc, out, rn, rm, rows, n, SWAP)


@triton.jit
def operands_before(bias, gain, rn, n, BIAS: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr):
    """What the epilogue reads that no predecessor writes: (biases of the product and of its second half, gains)."""
    biases = (0.0, 0.0)
    if BIAS:
        biases = (tl.load(bias + rn, rn < n, other=0.0).to(tl.float32), 0.0)
        if ACT != "":
            biases = (biases[0], tl.load(bias + n + rn, rn < n, other=0.0).to(tl.float32))
    gains = 0.0
    if ADD:
        gains = tl.load(gain + rn, rn < n, other=0.0).to(tl.float32)
    return biases, gains


@triton.jit
def operands_after(
    residual, slots, table, squares, square_parts, eps, rn, rm, rows, n, k,
    SWAP: tl.constexpr, ADD: tl.constexpr, HEADS: tl.constexpr, ROTATE: tl.constexpr, LATE: tl.constexpr,
    D: tl.constexpr, SQUARES: tl.constexpr, tile_n,
):  # fmt: skip
    """What an epilogue reads: a tile of the residual, slots, rotations (both not with LATE), factors of a norm."""
    old = 0.0
    if ADD and not LATE:
        old = residual_tile(residual, rn, rm, rows, n, SWAP)
    slot = 0
    turn = 0.0
    if HEADS:
        slot = tl.load(slots + rm, rm < rows, other=0).to(tl.int64)
        if ROTATE and not LATE:
            turn = cosines_and_sines(table, tile_n, rm, rows, D, rn.shape[0])
    factors = 0.0
    if SQUARES > 0:
        factors = rms_factors(squares, square_parts, eps, rm, rows, k, SQUARES)
    return old, slot, turn, factors


@triton.jit
def work_of(
    steps, rows, early, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """This program's (tile, part of it, first step, step behind the last, its place [2], outputs, rows of x).

    The first WHOLE tiles are not split: those are as many as the SMs multiply side by side, and the parts of the others
    go on top of them, so that no SM has a whole tile more than another. What comes next is launched, if `early`.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    share = tl.cdiv(steps, SPLIT)
    if WHOLE > 0:
        other = tl.maximum(tile - WHOLE, 0)
        part = tl.where(tile < WHOLE, 0, other % SPLIT)
        share = tl.where(tile < WHOLE, steps, share)
        tile = tl.minimum(tile, WHOLE + other // SPLIT)
    begin = part * share
    row_tiles = tl.cdiv(rows, BM)
    tile_n, tile_m = tile // row_tiles, tile % row_tiles
    rn = tile_n * BN + tl.arange(0, BN)
    if HEADS:
        rn = head_rows(tl.arange(0, BN), tile_n, D, BN)
    if PDL:  # noqa: SIM102 (a constant, and a number on the device)
        if early > 0:
            tl.extra.cuda.gdc_launch_dependents()
    rm = tile_m * BM + tl.arange(0, BM)
    return tile, part, begin, tl.minimum(begin + share, steps), (tile_n, tile_m), rn, rm


@triton.jit
def _finish_last(
    acc, up, factors, biases, old, turn, out, parts, arrived, rn, rm, rows, n, tile, part, tile_n, tiles_n, add, heads,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, SWAP: tl.constexpr,
    BIAS: tl.constexpr, NORMED: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr, HEADS: tl.constexpr,
    LATE: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    KV_LIMIT: tl.constexpr,
):  # fmt: skip
    """Store a part of a tile; the program that arrives last adds all of them up, and does what `finish` does."""
    SIZE: tl.constexpr = 2 * BM * BN if ACT != "" else BM * BN
    if SWAP:
        within = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    else:
        within = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tile_parts = parts + (tile - WHOLE).to(tl.int64) * SPLIT * SIZE + within
    tl.store(tile_parts + part * SIZE, acc)
    if ACT != "":
        tl.store(tile_parts + part * SIZE + BM * BN, up)
    tl.debug_barrier()  # all threads' parts are written before the arrival says so
    if tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
        tl.store(arrived + tile, 0)
        sums = total(tile_parts, SPLIT, SIZE, SIZE * SPLIT < 65536)
        sums_up = sums
        if ACT != "":
            sums_up = total(tile_parts + BM * BN, SPLIT, SIZE, SIZE * SPLIT < 65536)
        finish(
            sums, sums_up, factors, biases, old, turn, out, rn, rm, rows, n, tile_n, tiles_n, add, heads,
            SWAP, BIAS, NORMED, ACT, ADD, HEADS, LATE, D, QK_NORM, ROTATE, INTERLEAVED, KV_LIMIT,
        )  # fmt: skip


@triton.jit
def conclude(
    acc, up, factors, biases, old, turn, out, parts, arrived, rn, rm, rows, n, tile, part, tile_n, add, heads,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, SWAP: tl.constexpr,
    BIAS: tl.constexpr, NORMED: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr, HEADS: tl.constexpr,
    LATE: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    KV_LIMIT: tl.constexpr,
):  # fmt: skip
    """Add up a tile's parts, if it is split: the last program does. Then the epilogue, and what is stored."""
    tiles_n = tl.cdiv(n, BN)
    if SPLIT == 1 or tile < WHOLE:
        finish(
            acc, up, factors, biases, old, turn, out, rn, rm, rows, n, tile_n, tiles_n, add, heads,
            SWAP, BIAS, NORMED, ACT, ADD, HEADS, LATE, D, QK_NORM, ROTATE, INTERLEAVED, KV_LIMIT,
        )  # fmt: skip
    else:
        _finish_last(
            acc, up, factors, biases, old, turn, out, parts, arrived, rn, rm, rows, n, tile, part, tile_n, tiles_n,
            add, heads, BM, BN, SPLIT, WHOLE, SWAP, BIAS, NORMED, ACT, ADD, HEADS, LATE, D, QK_NORM, ROTATE,
            INTERLEAVED, KV_LIMIT,
        )  # fmt: skip


@triton.jit
def conclude_stacked(
    both, biases, out, parts, arrived, rn, rm, rows, n, k, tile, part, tile_n, norm, add, heads,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr,
    SQUARES: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    QK_NORM: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, KV_LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `conclude`, from a tile's products with the weight on the left, [BN, BM]; with ACT both halves, [2 BN, BM].

    norm: squares, their number a row, eps; add: residual, gains, scale, new residual, new squares; heads: table, slots
    and what `store_heads` wants. See linear_kernel.
    """
    squares, square_parts, eps = norm
    residual, gains, scale, new_residual, new_squares = add
    table, slots, qk_gains, qk_eps, kv, kv_stride, count, kv_count = heads
    acc = both
    up = both
    if ACT != "":
        acc, up = tl.split(tl.permute(tl.reshape(both, (2, BN, BM)), (1, 2, 0)))
    LATE: tl.constexpr = BM * BN > 2048  # it would fill the registers: not before it is needed
    old, slot, turn, factors = operands_after(
        residual, slots, table, squares, square_parts, eps, rn, rm, rows, n, k, True, ADD, HEADS, ROTATE, LATE, D,
        SQUARES, tile_n,
    )  # fmt: skip
    if LATE:
        old, turn = residual, table
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    conclude(
        acc, up, factors, biases, old, turn, out, parts, arrived, rn, rm, rows, n, tile, part, tile_n,
        (gains, scale, new_residual, new_squares), (slot, qk_gains, qk_eps, kv, kv_stride, count, kv_count),
        BM, BN, SPLIT, WHOLE, True, BIAS, SQUARES > 0, ACT, ADD, HEADS, LATE, D, QK_NORM, ROTATE, INTERLEAVED,
        KV_LIMIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "early", "square_parts"])
def linear_kernel(
    x, w, x_blocks, w_blocks, bias, out, parts, arrived, rows, n, k, early,
    squares, square_parts, eps, residual, scale, gain, new_residual, new_squares,
    qk_gains, qk_eps, table, slots, kv, kv_stride, heads, kv_heads,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, SQUARES: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, QK_NORM: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, KV_LIMIT: tl.constexpr,
    PDL: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """out [rows, n] = x [rows, k] @ w [n, k].T + bias; with ACT w is [2 n, k] and out = ACT(first half) * second half.

    Grid (tiles of n * tiles of rows, SPLIT). SWAP: the weight is the left operand, which is padded to 64 (tensor cores
    of sm_90), so that few rows cost little; BM 1 goes without tensor cores. TMA: tiles come through the descriptors
    x_blocks and w_blocks, with blocks [BM, BK] and [BN, BK]. parts float32 [tiles, SPLIT, BM * BN (twice with ACT)] and
    arrived int32 [tiles] are used with SPLIT > 1 only.
    SQUARES: x is to be divided by its rows' root mean squares, which follow from squares float32 [rows, square_parts]
    (SQUARES: that rounded up to a power of two); the product is. ADD, HEADS: see gemm_epilogues.py. EVEN: BK divides k.
    PDL: what comes next is launched at once if `early`, else as the weight has been read. The first AHEAD steps of the
    weight, which no kernel writes, are loaded before the predecessor ends; LOOP: there are more. FETCH: the L2 is asked
    for the others.
    """
    steps = tl.cdiv(k, BK)
    tile, part, begin, end, place, rn, rm = work_of(steps, rows, early, BM, BN, SPLIT, 0, HEADS, D, PDL)
    tile_n = place[0]
    first_n, first_m = tile_n * BN, place[1] * BM
    limit = tl.minimum(end * BK, k)

    kk = begin * BK + tl.arange(0, BK)
    row_live = (rm < rows)[:, None]  # masked, not clamped: a row that all programs read BM times is a hot spot
    w_at = w + tl.minimum(rn, n - 1).to(tl.int64)[:, None] * k + kk[None, :]
    up_at = w_at + n.to(tl.int64) * k
    x_at = x + rm.to(tl.int64)[:, None] * k + kk[None, :]
    ahead = ()
    ahead_up = ()
    for j in tl.static_range(AHEAD):
        there = (kk + j * BK < limit)[None, :]
        ahead = ahead + (tl.load(w_at + j * BK, there, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        if ACT != "":
            ahead_up = ahead_up + (tl.load(up_at + j * BK, there, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    if PDL and FETCH:
        column = tl.minimum(begin + AHEAD, end) * BK
        ask_rows(w, first_n, n, k, column, limit, BN)
        if ACT != "":
            ask_rows(w + n.to(tl.int64) * k, first_n, n, k, column, limit, BN)
    biases, gains = operands_before(bias, gain, rn, n, BIAS, ACT, ADD)
    if PDL:
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros((BN, BK // 8) if BM == 1 else (BN, BM) if SWAP else (BM, BN), tl.float32)
    up = acc
    x_tiles = ()
    for j in tl.static_range(AHEAD):
        there = (kk + j * BK < limit)[None, :]
        x_ahead = tl.load(x_at + j * BK, row_live & there, other=0.0)
        x_tiles = x_tiles + (x_ahead,)  # type: ignore[assignment]  # noqa: RUF005
    if LOOP:
        x_at += AHEAD * BK
        w_at += AHEAD * BK
        up_at += AHEAD * BK
        for step in tl.range(begin + AHEAD, end, num_stages=STAGES):
            if TMA:
                x_tile = x_blocks.load([first_m, step * BK])
                w_tile = w_blocks.load([first_n, step * BK])
                if ACT != "":
                    up_tile = w_blocks.load([n + first_n, step * BK])
            else:
                if EVEN:
                    x_tile = tl.load(x_at, row_live, other=0.0)
                    w_tile = tl.load(w_at)
                    if ACT != "":
                        up_tile = tl.load(up_at)
                else:
                    live = (step * BK + tl.arange(0, BK) < k)[None, :]
                    x_tile = tl.load(x_at, row_live & live, other=0.0)
                    w_tile = tl.load(w_at, live, other=0.0)
                    if ACT != "":
                        up_tile = tl.load(up_at, live, other=0.0)
                x_at += BK
                w_at += BK
                if ACT != "":
                    up_at += BK
            acc = _multiply(w_tile, x_tile, acc, BM, SWAP)
            if ACT != "":
                up = _multiply(up_tile, x_tile, up, BM, SWAP)

    # What the epilogue reads is loaded here: late enough not to hold up the weight, early enough to come beside the x
    # of the steps ahead, which are multiplied last.
    LATE: tl.constexpr = BM * BN > 2048  # it would fill the registers: not before it is needed
    old, slot, turn, factors = operands_after(
        residual, slots, table, squares, square_parts, eps, rn, rm, rows, n, k, SWAP, ADD, HEADS, ROTATE, LATE, D,
        SQUARES, tile_n,
    )  # fmt: skip
    if LATE:
        old, turn = residual, table
    for j in tl.static_range(AHEAD):
        acc = _multiply(ahead[j], x_tiles[j], acc, BM, SWAP)
        if ACT != "":
            up = _multiply(ahead_up[j], x_tiles[j], up, BM, SWAP)

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if BM == 1:
        acc = tl.sum(acc, 1, keep_dims=True)
        up = tl.sum(up, 1, keep_dims=True) if ACT != "" else acc
    conclude(
        acc, up, factors, biases, old, turn, out, parts, arrived, rn, rm, rows, n, tile, part, tile_n,
        (gains, scale, new_residual, new_squares), (slot, qk_gains, qk_eps, kv, kv_stride, heads, kv_heads),
        BM, BN, SPLIT, 0, SWAP, BIAS, SQUARES > 0, ACT, ADD, HEADS, LATE, D, QK_NORM, ROTATE, INTERLEAVED, KV_LIMIT,
    )  # fmt: skip
