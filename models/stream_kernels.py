"""The kernel of stream_gemm.py, a GEMM whose programs stay: whole tiles first, what is left is split along K.

The programs of a split tile leave their parts in memory, wait for one another, and each then adds up some rows of all
parts, in a fixed order: adding a tile up takes as long as writing it, where one program alone would take as many times
as long as there are parts. Epilogues are those of gemm_kernels.py.
Invariant: results are a function of x, the weight and the configuration; `arrived` is all zeros between launches.
"""

import triton
import triton.language as tl

from .fetch_kernels import ask_lines
from .gemm_kernels import finish, operands_after, operands_before, total

LEFT = tl.constexpr(1 << 16)
"""What a program adds to its tile's counter when it has added up its rows; 1 when its part is written."""


@triton.jit
def _write_part(acc, up, at, BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr, ACT: tl.constexpr):
    """A tile's sums to where its part lies, [BM, BN] (with ACT twice)."""
    if SWAP:
        within = tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN
    else:
        within = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(at + within, acc)
    if ACT != "":
        tl.store(at + BM * BN + within, up)


@triton.jit
def _slice(
    at, piece, biases, out, rn, first_m, rows, n, k, tile_n, tiles_n, residual, slots, table, squares, square_parts,
    eps, add, heads, BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    SQUARES: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    QK_NORM: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, KV_LIMIT: tl.constexpr,
):  # fmt: skip
    """Add up rows `piece` * SLICE and following of a split tile whose parts lie at `at`; the epilogue; store."""
    qk_gains, qk_eps, kv, kv_stride, count, kv_count = heads
    row = piece * SLICE + tl.arange(0, SLICE)
    rm = first_m + row
    old, slot, turn, factors = operands_after(
        residual, slots, table, squares, square_parts, eps, rn, rm, rows, n, k, False, ADD, HEADS, ROTATE, False, D,
        SQUARES, tile_n,
    )  # fmt: skip
    SIZE: tl.constexpr = 2 * BM * BN if ACT != "" else BM * BN
    SMALL: tl.constexpr = SLICE * BN * SPLIT <= 65536
    within = row[:, None] * BN + tl.arange(0, BN)[None, :]
    sums = total(at + within, SPLIT, SIZE, SMALL)
    sums_up = sums
    if ACT != "":
        sums_up = total(at + BM * BN + within, SPLIT, SIZE, SMALL)
    finish(
        sums, sums_up, factors, biases, old, turn, out, rn, rm, rows, n, tile_n, tiles_n, add,
        (slot, qk_gains, qk_eps, kv, kv_stride, count, kv_count), False, BIAS, SQUARES > 0, ACT, ADD, HEADS, False, D,
        QK_NORM, ROTATE, INTERLEAVED, KV_LIMIT,
    )  # fmt: skip


@triton.jit
def _prefetch(w, rn, n, k, begin, AHEAD: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr):
    """Ask the L2 for the first AHEAD steps of the weight, a line of 64 elements at a time."""
    lines = begin * BK + 64 * tl.arange(0, AHEAD * BK // 64)
    at = w + tl.minimum(rn, n - 1).to(tl.int64)[:, None] * k + tl.minimum(lines, k - 1)[None, :]
    ask_lines(at)
    if ACT != "":
        ask_lines(at + n.to(tl.int64) * k)


@triton.jit
def _place(turn, whole, program, programs, row_tiles, steps, SPLIT: tl.constexpr):
    """A program's work in a turn: (tile along n, tile along the rows, first step, end)."""
    is_whole = turn < whole
    share = tl.cdiv(steps, SPLIT)
    tile = turn * programs + tl.where(is_whole, program, program // SPLIT)
    begin = tl.where(is_whole, 0, program % SPLIT * share)
    end = tl.where(is_whole, steps, tl.minimum(begin + share, steps))
    return tile // row_tiles, tile % row_tiles, begin, end


@triton.jit(do_not_specialize=["rows", "square_parts"])
def stream_kernel(
    w, x_blocks, w_blocks, bias, out, parts, arrived, rows, n, k,
    squares, square_parts, eps, residual, scale, gain, new_residual, new_squares,
    qk_gains, qk_eps, table, slots, kv, kv_stride, heads, kv_heads,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SLICE: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, WAIT: tl.constexpr, SWAP: tl.constexpr, AHEAD: tl.constexpr,
    BIAS: tl.constexpr, SQUARES: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, QK_NORM: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    KV_LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [rows, n] = x [rows, k] @ w [n, k].T + bias; with ACT w is [2 n, k] and out = ACT(first half) * second half.

    Grid (programs). x_blocks, w_blocks: descriptors of x and w, blocks [BM, BK] and [BN, BK]. parts float32 [split
    tiles, SPLIT, BM * BN (twice with ACT)]; arrived int32 [split tiles]. WAIT: the programs of a split tile wait for
    one another and each adds up SLICE rows. That ends as long as programs start in the order of their numbers, SPLIT
    of them at once or more. Else (the interpreter runs one after another) the last to arrive adds up all rows. WHOLE,
    REST: there are whole tiles, split ones. AHEAD: see `_prefetch`. The rest is as in gemm_kernels.linear_kernel.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    row_tiles, tiles_n, steps = tl.cdiv(rows, BM), tl.cdiv(n, BN), tl.cdiv(k, BK)
    tiles = tiles_n * row_tiles
    whole = tl.cdiv(tiles - program, programs)
    turns = whole
    if REST:
        whole = tiles // programs
        turns = whole + (program < tiles % programs * SPLIT).to(tl.int32)
    of_heads = (qk_gains, qk_eps, kv, kv_stride, heads, kv_heads)
    if PDL:
        tile_n, tile_m, begin, end = _place(0, whole, program, programs, row_tiles, steps, SPLIT)
        _prefetch(w, tile_n * BN + tl.arange(0, BN), n, k, begin, AHEAD, BK, ACT)
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    up = acc
    for turn in tl.range(0, turns):
        tile_n, tile_m, begin, end = _place(turn, whole, program, programs, row_tiles, steps, SPLIT)
        first_n, first_m = tile_n * BN, tile_m * BM
        acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
        up = acc
        for step in tl.range(begin, end):
            x_tile = x_blocks.load([first_m, step * BK])
            w_tile = w_blocks.load([first_n, step * BK])
            if ACT != "":
                up_tile = w_blocks.load([n + first_n, step * BK])
            if SWAP:
                acc = tl.dot(w_tile, x_tile.T, acc)
                if ACT != "":
                    up = tl.dot(up_tile, x_tile.T, up)
            else:
                acc = tl.dot(x_tile, w_tile.T, acc)
                if ACT != "":
                    up = tl.dot(x_tile, up_tile.T, up)
        if WHOLE and turn < whole:
            rn, rm = first_n + tl.arange(0, BN), first_m + tl.arange(0, BM)
            biases, gains = operands_before(bias, gain, rn, n, BIAS, ACT, ADD)
            _, slot, _, factors = operands_after(
                residual, slots, table, squares, square_parts, eps, rn, rm, rows, n, k, SWAP, ADD, HEADS, ROTATE,
                True, D, SQUARES, tile_n,
            )  # fmt: skip
            finish(
                acc, up, factors, biases, residual, table, out, rn, rm, rows, n, tile_n, tiles_n,
                (gains, scale, new_residual, new_squares), (slot, qk_gains, qk_eps, kv, kv_stride, heads, kv_heads),
                SWAP, BIAS, SQUARES > 0, ACT, ADD, HEADS, True, D, QK_NORM, ROTATE, INTERLEAVED, KV_LIMIT,
            )  # fmt: skip

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if REST and turns > whole:
        tile_n, tile_m, _, _ = _place(whole, whole, program, programs, row_tiles, steps, SPLIT)
        SIZE: tl.constexpr = 2 * BM * BN if ACT != "" else BM * BN
        part = program % SPLIT
        first, last, counter = part, part + 1, arrived + program // SPLIT
        at = parts + (program // SPLIT).to(tl.int64) * (SPLIT * SIZE)
        _write_part(acc, up, at + part * SIZE, BM, BN, SWAP, ACT)
        tl.debug_barrier()  # all threads' parts are written before the arrival says so
        before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        rn = tile_n * BN + tl.arange(0, BN)
        biases, gains = operands_before(bias, gain, rn, n, BIAS, ACT, ADD)
        if WAIT:
            while (tl.atomic_add(counter, 0, sem="acquire", scope="gpu") & (LEFT - 1)) != SPLIT:
                pass
        else:
            first, last = 0, tl.where(before % LEFT == SPLIT - 1, SPLIT, 0)
        for piece in range(first, tl.minimum(last, BM // SLICE)):
            _slice(
                at, piece, biases, out, rn, tile_m * BM, rows, n, k, tile_n, tiles_n, residual, slots, table, squares,
                square_parts, eps, (gains, scale, new_residual, new_squares), of_heads, BM, BN, SLICE, SPLIT, BIAS,
                SQUARES, ACT, ADD, HEADS, D, QK_NORM, ROTATE, INTERLEAVED, KV_LIMIT,
            )  # fmt: skip
        if tl.atomic_add(counter, LEFT, sem="relaxed", scope="gpu") == SPLIT + LEFT * (SPLIT - 1):
            tl.store(counter, 0)
