"""GEMMs of a decode step of a small model whose weight waits in shared memory, and the step only for x.

Used by primed_gemm.py. Such a step is bound by the latency of its kernels. With PDL a kernel starts while those before
it still run, and what it needs of its weight, which none of them writes, can be under way then: not in registers or in
the L2, as in gemm_kernels.py, but where the tensor cores read it, which needs buffers and barriers of our own, and so
Gluon instead of Triton. When the predecessor has ended only x is loaded. Epilogues are those of gemm_epilogues.py.
Legend: BM, BN, BK rows of x, outputs and columns of a step; x [rows, k], w [n, k], BN divides n, BK divides k.
Invariant: results are a function of the row, the weight and the configuration; `arrived` is all zeros between launches.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .layer_kernels import activate
from .stream_kernels import LEFT

RENAMED = gl.constexpr(hasattr(tma, "async_load"))
load_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
all_threads = getattr(gl, "barrier", None) or gl.thread_barrier
"""Names of Triton 3.9, or else of 3.6."""


@gluon.jit
def reinterpreted(buffer, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory in another shape."""
    if RENAMED:
        return buffer.reinterpret(buffer.dtype, shape, layout)
    else:
        return buffer._reinterpret(buffer.dtype, shape, layout)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr = 1):
    """New barriers [COUNT, 1] that so many arrivals and their bytes complete. To be fenced before they are used."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def rounded(values, like):
    """float32 values as they would come back from memory behind the pointer `like`."""
    return values.to(like.dtype.element_ty).to(gl.float32)


@gluon.jit
def row_factors(squares, parts, eps, rm, rows, width, PARTS: gl.constexpr, BY_COLUMN: gl.constexpr, ACC: gl.constexpr):
    """1 / root mean square of rows rm, see gemm_epilogues.rms_factors, for a tile in layout ACC that has the rows of x
    as its columns (BY_COLUMN), or as its rows."""
    L: gl.constexpr = gl.BlockedLayout([4, 1], [8, 4], [1, 4], [0, 1])  # of the transposed [PARTS, rows]
    part = gl.arange(0, PARTS, gl.SliceLayout(1, L))[:, None]
    row = gl.convert_layout(rm, gl.SliceLayout(0, L))[None, :]
    sums = gl.load(squares + row * parts + part, (part < parts) & (row < rows), other=0.0)
    factors = gl.rsqrt(gl.sum(sums, 0) / width + eps)
    return gl.convert_layout(factors, gl.SliceLayout(0 if BY_COLUMN else 1, ACC))


@gluon.jit
def pairs(tile, BM: gl.constexpr):
    """A head's outputs [64, BM] in the order in which `whole_kernel` has them: (firsts, seconds) [4, 8, BM] of pairs.

    Both of a pair are in the same thread, 8 rows apart.
    """
    return gl.split(gl.permute(gl.reshape(tile, [4, 2, 8, BM]), (0, 2, 3, 1)))


@gluon.jit
def _store_head(
    acc, cos, sin, out, rm, rows, slot, kv, kv_stride, tile, heads, kv_heads, BM: gl.constexpr, ACC: gl.constexpr
):  # fmt: skip
    """Rotate a head's outputs [64, BM]; queries to out [rows, heads, 64], keys and values to kv [slots, 2, K, 64]."""
    first, second = pairs(rounded(acc, out), BM)
    if tile < heads + kv_heads:
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    output = gl.arange(0, 64, gl.SliceLayout(1, ACC))
    pair = (output % 8 + output // 16 * 8)[:, None]
    there, _same = pairs(((rm < rows)[None, :] & (pair >= 0)).to(gl.int32), BM)
    if tile < heads:
        query, _same_query = pairs(rm[None, :] * (heads * 64) + tile * 64 + pair, BM)
        gl.store(out + query, first.to(out.dtype.element_ty), there != 0)
        gl.store(out + query + 32, second.to(out.dtype.element_ty), there != 0)
    else:
        place, _same_place = pairs(slot[None, :] * kv_stride + (tile - heads) * 64 + pair, BM)
        gl.store(kv + place, first.to(kv.dtype.element_ty), there != 0)
        gl.store(kv + place + 32, second.to(kv.dtype.element_ty), there != 0)


@gluon.jit(do_not_specialize=["rows", "square_parts"])
def whole_kernel(
    x_blocks, w_blocks, bias, out, rows, n, squares, square_parts, eps, residual, scale, gain, new_residual,
    new_squares, table, slots, kv, kv_stride, heads, kv_heads,
    BM: gl.constexpr, BK: gl.constexpr, STEPS: gl.constexpr, BIAS: gl.constexpr, SQUARES: gl.constexpr,
    ADD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program (64 outputs, BM rows) with all of its weight in shared memory, as the left operand: w is small.

    ADD: add to the residual, w_blocks have blocks [64, BK]. Else a QKV product whose heads have 64 numbers: a program's
    outputs are a head, in which 8 firsts of its pairs come before their seconds, the next 8 firsts and so on:
    w_blocks [1, 4, 2, 8, BK] of a view of w. STEPS: k / BK. See gemm_kernels.linear_kernel for the rest.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row_tiles = gl.cdiv(rows, BM)
    tile = gl.program_id(0) // row_tiles
    first_m = gl.program_id(0) % row_tiles * BM
    T: gl.constexpr = x_blocks.dtype
    w = gl.allocate_shared_memory(T, [STEPS, 64, BK], x_blocks.layout)
    x = gl.allocate_shared_memory(T, [STEPS, BM, BK], x_blocks.layout)
    bars = barriers(2)
    fence_async_shared()
    HEAD: gl.constexpr = w_blocks.layout
    mbarrier.expect(bars.index(0), 64 * BK * 2 * STEPS)
    for i in gl.static_range(STEPS):
        if ADD:
            load_block(w_blocks, [tile * 64, i * BK], bars.index(0), w.index(i))
        else:
            target = reinterpreted(w.index(i), [1, 4, 2, 8, BK], HEAD)
            load_block(w_blocks, [tile, 0, 0, 0, i * BK], bars.index(0), target)
    mbarrier.expect(bars.index(1), BM * BK * 2 * STEPS)

    # What no kernel of the layers writes is loaded before the wait, too: parameters, slots and rotations.
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    output = gl.arange(0, 64, gl.SliceLayout(1, ACC))
    rm = first_m + gl.arange(0, BM, gl.SliceLayout(0, ACC))
    live = rm < rows
    if ADD:
        gains = gl.load(gain + tile * 64 + output).to(gl.float32)
    else:
        output = output % 8 + output // 16 * 8 + output // 8 % 2 * 32
        slot = gl.load(slots + rm, live, other=0).to(gl.int64)
        at = table + rm[None, :] * 64 + (output % 32)[:, None]
        cos, _same = pairs(gl.load(at, live[None, :], other=1.0), BM)
        sin, _same = pairs(gl.load(at + 32, live[None, :], other=0.0), BM)
    rn = tile * 64 + output
    if BIAS:
        biases = gl.load(bias + rn).to(gl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in gl.static_range(STEPS):
        load_block(x_blocks, [first_m, i * BK], bars.index(1), x.index(i))
    there = live[None, :] & (rn < n)[:, None]
    place = rm[None, :] * n + rn[:, None]
    if ADD:
        old = gl.load(residual + place, there, other=0.0).to(gl.float32)
    if SQUARES > 0:
        factors = row_factors(squares, square_parts, eps, rm, rows, STEPS * BK, SQUARES, True, ACC)

    acc = gl.zeros([64, BM], gl.float32, ACC)
    mbarrier.wait(bars.index(0), 0)
    mbarrier.wait(bars.index(1), 0)
    for i in gl.static_range(STEPS):
        acc = warpgroup_mma(w.index(i), x.index(i).permute((1, 0)), acc, use_acc=i > 0, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    if SQUARES > 0:
        acc = acc * factors[None, :]
    if BIAS:
        acc = acc + biases[:, None]
    if ADD:
        r = gl.where(there, rounded(old + scale * rounded(acc, out), out), 0.0)
        gl.store(new_residual + place, r.to(new_residual.dtype.element_ty), there)
        gl.store(out + place, (r * gains[:, None]).to(out.dtype.element_ty), there)
        gl.store(new_squares + rm * (n // 64) + tile, gl.sum(r * r, 0), live)
    else:
        _store_head(acc, cos, sin, out, rm, rows, slot, kv, kv_stride, tile, heads, kv_heads, BM, ACC)


@gluon.jit(do_not_specialize=["rows", "square_parts"])
def gated_kernel(
    x_blocks, w_blocks, out, rows, n, squares, square_parts, eps,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STEPS: gl.constexpr, WEIGHTS: gl.constexpr,
    INPUTS: gl.constexpr, SQUARES: gl.constexpr, ACT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out [rows, n] = ACT(first half) * second half of x [rows, k] @ w [2 n, k].T; rows <= BM. Program: BN outputs.

    Buffers are for WEIGHTS steps of both halves, loaded before the predecessor ends, and INPUTS of x. STEPS: k / BK.
    """
    tile = gl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    T: gl.constexpr = x_blocks.dtype
    w = gl.allocate_shared_memory(T, [WEIGHTS, BN, BK], w_blocks.layout)
    u = gl.allocate_shared_memory(T, [WEIGHTS, BN, BK], w_blocks.layout)
    x = gl.allocate_shared_memory(T, [INPUTS, BM, BK], x_blocks.layout)
    w_bars = barriers(WEIGHTS)
    x_bars = barriers(INPUTS)
    fence_async_shared()
    for i in gl.static_range(WEIGHTS):
        mbarrier.expect(w_bars.index(i), 2 * BN * BK * 2)
        load_block(w_blocks, [tile * BN, i * BK], w_bars.index(i), w.index(i))
        load_block(w_blocks, [n + tile * BN, i * BK], w_bars.index(i), u.index(i))
    for i in gl.static_range(INPUTS):
        mbarrier.expect(x_bars.index(i), BM * BK * 2)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in gl.static_range(INPUTS):
        load_block(x_blocks, [0, i * BK], x_bars.index(i), x.index(i))
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    if SQUARES > 0:
        rm = gl.arange(0, BM, gl.SliceLayout(1, ACC))
        factors = row_factors(squares, square_parts, eps, rm, rows, STEPS * BK, SQUARES, False, ACC)

    acc = gl.zeros([BM, BN], gl.float32, ACC)
    up = gl.zeros([BM, BN], gl.float32, ACC)
    for s in gl.static_range(STEPS):
        mbarrier.wait(w_bars.index(s % WEIGHTS), (s // WEIGHTS) & 1)
        mbarrier.wait(x_bars.index(s % INPUTS), (s // INPUTS) & 1)
        x_now, w_now = x.index(s % INPUTS), w.index(s % WEIGHTS)
        acc = warpgroup_mma(x_now, w_now.permute((1, 0)), acc, use_acc=s > 0, is_async=True)
        up = warpgroup_mma(x_now, u.index(s % WEIGHTS).permute((1, 0)), up, use_acc=s > 0, is_async=True)
        if s > 0 and s - 1 + min(WEIGHTS, INPUTS) < STEPS:  # the buffers of the step before are free
            acc, up = warpgroup_mma_wait(2, deps=[acc, up])
            if s - 1 + INPUTS < STEPS:
                x_bar, x_free = x_bars.index((s - 1) % INPUTS), x.index((s - 1) % INPUTS)
                mbarrier.expect(x_bar, BM * BK * 2)
                load_block(x_blocks, [0, (s - 1 + INPUTS) * BK], x_bar, x_free)
            if s - 1 + WEIGHTS < STEPS:
                column = (s - 1 + WEIGHTS) * BK
                w_bar = w_bars.index((s - 1) % WEIGHTS)
                mbarrier.expect(w_bar, 2 * BN * BK * 2)
                load_block(w_blocks, [tile * BN, column], w_bar, w.index((s - 1) % WEIGHTS))
                load_block(w_blocks, [n + tile * BN, column], w_bar, u.index((s - 1) % WEIGHTS))
    acc, up = warpgroup_mma_wait(0, deps=[acc, up])
    if SQUARES > 0:
        acc = acc * factors[:, None]
        up = up * factors[:, None]
    y = (activate(rounded(acc, out), ACT) * rounded(up, out)).to(out.dtype.element_ty)
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])  # 16 bytes of a row a thread
    row = gl.arange(0, BM, gl.SliceLayout(1, L))[:, None]
    column = tile * BN + gl.arange(0, BN, gl.SliceLayout(0, L))[None, :]
    gl.store(out + row * n + column, gl.convert_layout(y, L), (row < rows) & (column < n))


@gluon.jit(do_not_specialize=["rows"])
def split_kernel(
    x_blocks, w_blocks, out, parts, arrived, rows, n, residual, scale, gain, new_residual, new_squares,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STEPS: gl.constexpr, SPLIT: gl.constexpr,
    WEIGHTS: gl.constexpr, INPUTS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """x @ w.T added to the residual; rows <= BM. Program: BN outputs and a part of the columns, one of SPLIT.

    As in stream_kernels.py programs of a tile wait for one another, and each adds up BM / SPLIT rows of all parts
    float32 [tiles, SPLIT, BM, BN]; they start side by side. Buffers are as in `gated_kernel`.
    """
    tile = gl.program_id(0) // SPLIT
    part = gl.program_id(0) % SPLIT
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    T: gl.constexpr = x_blocks.dtype
    SHARE: gl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    begin = part * STEPS // SPLIT
    count = (part + 1) * STEPS // SPLIT - begin  # SHARE or one less: then the last step is beyond k, of zeros
    w = gl.allocate_shared_memory(T, [WEIGHTS, BN, BK], w_blocks.layout)
    x = gl.allocate_shared_memory(T, [INPUTS, BM, BK], x_blocks.layout)
    w_bars = barriers(WEIGHTS)
    x_bars = barriers(INPUTS)
    fence_async_shared()
    for i in gl.static_range(WEIGHTS):
        column = gl.where(i < count, begin + i, STEPS) * BK
        mbarrier.expect(w_bars.index(i), BN * BK * 2)
        load_block(w_blocks, [tile * BN, column], w_bars.index(i), w.index(i))
    for i in gl.static_range(INPUTS):
        mbarrier.expect(x_bars.index(i), BM * BK * 2)
    L: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BN, BN // 4], [4, 1], [1, 0])  # of the rows added up here
    output = gl.arange(0, BN, gl.SliceLayout(0, L))
    gains = gl.load(gain + tile * BN + output).to(gl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in gl.static_range(INPUTS):
        column = gl.where(i < count, begin + i, STEPS) * BK
        load_block(x_blocks, [0, column], x_bars.index(i), x.index(i))

    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc = gl.zeros([BM, BN], gl.float32, ACC)
    for s in gl.static_range(SHARE):
        mbarrier.wait(w_bars.index(s % WEIGHTS), (s // WEIGHTS) & 1)
        mbarrier.wait(x_bars.index(s % INPUTS), (s // INPUTS) & 1)
        x_now, w_now = x.index(s % INPUTS), w.index(s % WEIGHTS)
        acc = warpgroup_mma(x_now, w_now.permute((1, 0)), acc, use_acc=s > 0, is_async=True)
        if s > 0 and s - 1 + min(WEIGHTS, INPUTS) < SHARE:
            acc = warpgroup_mma_wait(1, deps=[acc])
            if s - 1 + INPUTS < SHARE:
                column = gl.where(s - 1 + INPUTS < count, begin + s - 1 + INPUTS, STEPS) * BK
                x_bar, x_free = x_bars.index((s - 1) % INPUTS), x.index((s - 1) % INPUTS)
                mbarrier.expect(x_bar, BM * BK * 2)
                load_block(x_blocks, [0, column], x_bar, x_free)
            if s - 1 + WEIGHTS < SHARE:
                column = gl.where(s - 1 + WEIGHTS < count, begin + s - 1 + WEIGHTS, STEPS) * BK
                w_bar = w_bars.index((s - 1) % WEIGHTS)
                mbarrier.expect(w_bar, BN * BK * 2)
                load_block(w_blocks, [tile * BN, column], w_bar, w.index((s - 1) % WEIGHTS))
    acc = warpgroup_mma_wait(0, deps=[acc])

    SIZE: gl.constexpr = BM * BN
    at = parts + tile * (SPLIT * SIZE)
    row = gl.arange(0, BM, gl.SliceLayout(1, ACC))[:, None]
    gl.store(at + part * SIZE + row * BN + gl.arange(0, BN, gl.SliceLayout(0, ACC))[None, :], acc)
    all_threads()  # all threads' sums are written before the arrival says so
    counter = arrived + tile
    gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    SLICE: gl.constexpr = BM // SPLIT
    rm = part * SLICE + gl.arange(0, SLICE, gl.SliceLayout(1, L))
    live = (rm < rows)[:, None]
    place = rm[:, None] * n + (tile * BN + output)[None, :]
    old = gl.load(residual + place, live, other=0.0).to(gl.float32)
    while (gl.atomic_add(counter, 0, sem="acquire", scope="gpu") & (LEFT - 1)) != SPLIT:
        pass
    within = rm[:, None] * BN + output[None, :]
    sums = gl.load(at + within, cache_modifier=".cg")
    for other in gl.static_range(1, SPLIT):
        sums += gl.load(at + other * SIZE + within, cache_modifier=".cg")
    r = gl.where(live, rounded(old + scale * rounded(sums, out), out), 0.0)
    gl.store(new_residual + place, r.to(new_residual.dtype.element_ty), live)
    gl.store(out + place, (r * gains[None, :]).to(out.dtype.element_ty), live)
    gl.store(new_squares + rm * (n // BN) + tile, gl.sum(r * r, 1), rm < rows)
    if gl.atomic_add(counter, LEFT, sem="relaxed", scope="gpu") == SPLIT + LEFT * (SPLIT - 1):
        gl.store(counter, 0)
