"""The kernel of row_gemm.py: one row of x times a quantized weight, by tensor cores that multiply float8.

x is a sum of two float8 numbers: 4 bits and 4 bits are bfloat16's 8. They are two columns of the right operand, which
has 8 anyway, and a weight of float8 is the left one as it lies in memory: nothing is widened. A byte with 4 bits of a
value below is that value times 2 ** -9 in float8 (Micikevicius et al. 2022, E4M3: the numbers without an exponent are
evenly spaced, and go on so up to 15), so masks are all that 4 bits need; zero points follow from the sums of x.
As in primed_kernels.py the weight comes into buffers of our own, so that loads are under way before x is there, and a
program that waits leaves room for those of its predecessor. In Gluon.
Invariant: results are a function of the row, the weight and the configuration; `arrived` is all zeros between launches.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .layer_kernels import activate
from .primed_kernels import all_threads, barriers, load_block, reinterpreted, rounded

SPAN = gl.constexpr(512)
"""Columns of x that are split into float8 numbers at once."""
LOW = gl.constexpr("and.b32 $0, $1, 0x0F0F0F0F;")
HIGH = gl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }")


@gluon.jit
def low_nibbles(values):
    """float8 2 ** -9 times the lower four bits of each byte."""
    return gl.inline_asm_elementwise(LOW, "=r,r", [values], dtype=gl.float8e4nv, is_pure=True, pack=4)


@gluon.jit
def high_nibbles(values):
    """float8 2 ** -9 times the upper four bits of each byte."""
    return gl.inline_asm_elementwise(HIGH, "=r,r", [values], dtype=gl.float8e4nv, is_pure=True, pack=4)


@gluon.jit
def scales_of(meta):
    """float32 scales of what 4 bits have for a group, see packed_kernels.scale_and_zero."""
    return meta.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def points_of(meta):
    """bfloat16 zero points of what 4 bits have for a group, 128 more."""
    return (meta >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)


@gluon.jit
def zeros_of(meta):
    """float32 zero points of what 4 bits have for a group."""
    return points_of(meta).to(gl.float32) - 128.0


@gluon.jit
def leading_bits(values):
    """float32 values without what is behind their four leading bits."""
    return (values.to(gl.int32, bitcast=True) & -1048576).to(gl.float32, bitcast=True)


@gluon.jit
def _work(program, PROGRAMS: gl.constexpr, STEPS: gl.constexpr, WHOLE: gl.constexpr, REST: gl.constexpr,
          SPLIT: gl.constexpr):  # fmt: skip
    """(the split tile that a program has a part of, the part's first step, its number of steps: 0 if it has none)."""
    part = program % SPLIT
    begin = part * STEPS // SPLIT
    count = (part + 1) * STEPS // SPLIT - begin
    tile = gl.minimum(WHOLE * PROGRAMS + program // SPLIT, WHOLE * PROGRAMS + REST - 1)
    return tile, begin, gl.where(program < REST * SPLIT, count, 0)


@gluon.jit
def _ask(
    w_blocks, w, meta_blocks, metas, bars, j, program, rest, begin, n, BN: gl.constexpr, BK: gl.constexpr,
    STEPS: gl.constexpr, BUFFERS: gl.constexpr, WHOLE: gl.constexpr, PROGRAMS: gl.constexpr, FOUR: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """Have the weight of a program's j-th step, of 4 bits with what its groups have, loaded into its buffer."""
    whole = j < WHOLE * STEPS
    tile = gl.where(whole, program + j // STEPS * PROGRAMS, rest)
    step = gl.where(whole, j % STEPS, begin + j - WHOLE * STEPS)
    at = j % BUFFERS
    bar = bars.index(at)
    mbarrier.expect(bar, HALVES * (BN * BK // 2 + BN * BK // 128 * 4 if FOUR else BN * BK))
    BLOCKS: gl.constexpr = w_blocks.layout
    for half in gl.static_range(HALVES):
        target = w.index(at * HALVES + half)
        if FOUR:
            target = reinterpreted(target, [BK // 128, BN // 16, 16, 64], BLOCKS)
            load_block(w_blocks, [step * (BK // 128), (half * n + tile * BN) // 16, 0, 0], bar, target)
            load_block(meta_blocks, [step * (BK // 128), half * n + tile * BN], bar, metas.index(at * HALVES + half))
        else:
            load_block(w_blocks, [half * n + tile * BN, step * BK], bar, target)


@gluon.jit
def _split_x(x, first, k, terms, sums, CHUNKS: gl.constexpr, FOUR: gl.constexpr):
    """Split x [k] from input `first` on into terms [CHUNKS, 8, SPAN]; returns what the products are to be divided by.

    FOUR: and its sums of groups, float32 [CHUNKS, SPAN / 128].
    Columns are in the order of the weight's bytes. Row 0 of the terms has four bits of each number, the others 8 times
    what is left. That is what float8 will hold by arithmetic, not by converting it back: of such a pair of conversions
    the ptxas of CUDA 12.8 makes one of the stack pointer.
    """
    L: gl.constexpr = gl.BlockedLayout([8, SPAN // 128], [1, 32], [1, 4], [1, 0])  # a warp has a group
    column = gl.arange(0, SPAN, gl.SliceLayout(0, L))
    term = gl.arange(0, 8, gl.SliceLayout(1, L))[:, None]
    if FOUR:  # the lower bits of 64 bytes, of inputs c and c + 64 in turn, then their upper bits, 32 inputs on
        place = column // 128 * 128 + column % 64 // 2 + column % 2 * 64 + column // 64 % 2 * 32
    else:
        place = column // 64 * 64 + column % 64 // 2 + column % 2 * 32
    largest = gl.zeros([SPAN], gl.float32, gl.SliceLayout(0, L))
    values = ()
    for i in gl.static_range(CHUNKS):
        at = first + i * SPAN + place
        value = gl.load(x + at, at < k, other=0.0).to(gl.float32)
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
        largest = gl.maximum(largest, gl.abs(value))
    # A power of two, so that nothing but the split rounds; the largest numbers become 128 to 256 of float8's 448.
    up = gl.exp2(7.0 - gl.floor(gl.log2(gl.max(largest, 0) + 1e-30)))
    for i in gl.static_range(CHUNKS):
        value = values[i] * up
        even = (value + 24576.0) - 24576.0  # to multiples of 2 ** -9, as the smallest numbers are
        large = gl.where(gl.abs(value) < 0.015625, even, leading_bits(value))
        small = ((value - large) * 8.0).to(gl.float8e4nv)
        terms.index(i).store(gl.where(term == 0, large.to(gl.float8e4nv)[None, :], small[None, :]))
        if FOUR:
            sums.index(i).store(gl.sum(gl.reshape(value, [SPAN // 128, 128]), 1))
    return up


@gluon.jit
def _scales(scales, n, tile, BN: gl.constexpr, HALVES: gl.constexpr, ACC: gl.constexpr):
    """Those of float8 outputs of a tile, of both halves."""
    output = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, ACC))
    found = ()
    for half in gl.static_range(HALVES):
        found = found + (gl.load(scales + half * n + output),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.jit
def _multiply_float8(w, xs, acc, up, at, place, BN: gl.constexpr, HALVES: gl.constexpr, ACC: gl.constexpr):
    """(acc, up) [BN, 8] + the products of the step whose x is at `place` of its blocks xs."""
    none = gl.zeros([BN, 8], gl.float32, ACC)
    x = xs.index(place).permute((1, 0))
    p = warpgroup_mma(w.index(at * HALVES), x, none, use_acc=False, is_async=True)
    if HALVES == 2:
        u = warpgroup_mma(w.index(at * HALVES + 1), x, none, use_acc=False, is_async=True)
        p, u = warpgroup_mma_wait(0, deps=[p, u])
        up += u
    else:
        p = warpgroup_mma_wait(0, deps=[p])
    acc += p  # in float32, which the tensor cores' own sums of float8 products are not
    return acc, up


@gluon.jit
def _products_four(w, xs, place, BN: gl.constexpr, GROUPS: gl.constexpr, ACC: gl.constexpr):
    """A buffer's products / 512 with each group of the step whose x is at `place`: GROUPS tiles [BN, 8], under way."""
    none = gl.zeros([BN, 8], gl.float32, ACC)
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=4)
    ONE: gl.constexpr = gl.NVMMASharedLayout(64, 8, rank=2)
    made = ()
    for i in gl.static_range(GROUPS):
        words = reinterpreted(w, [GROUPS, BN, 64], ONE).index(i).load(A)
        x_low = xs.index((place * GROUPS + i) * 2).permute((1, 0))
        x_high = xs.index((place * GROUPS + i) * 2 + 1).permute((1, 0))
        p = warpgroup_mma(low_nibbles(words), x_low, none, use_acc=False, is_async=True)
        made = made + (warpgroup_mma(high_nibbles(words), x_high, p, is_async=True),)  # type: ignore[assignment]  # noqa: RUF005
    return made


@gluon.jit
def _multiply_four(
    w, metas, xs, sums, acc, up, less, less_up, at, place, BN: gl.constexpr, GROUPS: gl.constexpr,
    HALVES: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """As `_multiply_float8` of 4 bits: acc, up + the products / 512, less, less_up [BN] + what zero points take."""
    made = _products_four(w.index(at * HALVES), xs, place, BN, GROUPS, ACC)
    if HALVES == 2:
        made = made + _products_four(w.index(at * HALVES + 1), xs, place, BN, GROUPS, ACC)
    EACH: gl.constexpr = SPAN // 128
    ALL: gl.constexpr = gl.BlockedLayout([EACH], [32], [4], [0])
    of_span, group = sums.index(place * GROUPS // EACH).load(ALL), gl.arange(0, EACH, ALL)
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    of_groups = reinterpreted(metas.index(at * HALVES), [GROUPS, BN], ROW)
    of_up = reinterpreted(metas.index(at * HALVES + HALVES - 1), [GROUPS, BN], ROW)
    if GROUPS * HALVES == 1:  # noqa: SIM108 (a constant)
        made = (warpgroup_mma_wait(0, deps=made),)
    else:
        made = warpgroup_mma_wait(0, deps=made)
    for i in gl.static_range(GROUPS):
        of_group = gl.sum(gl.where(group == place * GROUPS % EACH + i, of_span, 0.0), 0)
        meta = of_groups.index(i).load(gl.SliceLayout(1, ACC))
        scales = scales_of(meta)
        acc += scales[:, None] * made[i]
        less += scales * zeros_of(meta) * of_group
        if HALVES == 2:
            meta = of_up.index(i).load(gl.SliceLayout(1, ACC))
            scales = scales_of(meta)
            up += scales[:, None] * made[GROUPS + i]
            less_up += scales * zeros_of(meta) * of_group
    return acc, up, less, less_up


@gluon.jit
def _sums(acc, ACC: gl.constexpr):
    """float32 [BN]: the products with both of x's numbers added up."""
    column = gl.arange(0, 8, gl.SliceLayout(0, ACC))[None, :]
    return gl.sum(gl.where(column == 0, acc, gl.where(column == 1, acc * 0.125, 0.0)), 1)


@gluon.jit
def _halves(values):
    """A head's numbers [128] as (firsts, seconds) [64] of pairs; both of a pair are in the same thread."""
    return gl.split(gl.permute(gl.reshape(values, [2, 64]), (1, 0)))


@gluon.jit
def _operands(
    tile, bias, residual, gain, table, slots, count, BN: gl.constexpr, BIAS: gl.constexpr, ADD: gl.constexpr,
    HEADS: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """What a tile's epilogue reads, asked for before the products: (biases, residual, gains, cosines, sines, slot).

    count: heads that are rotated; cosines of others are 1, sines 0.
    """
    output = gl.arange(0, BN, gl.SliceLayout(1, ACC))
    rn = tile * BN + output
    biases, old, gains, cos, sin, slot = 0.0, 0.0, 0.0, 1.0, 0.0, 0
    if BIAS:
        biases = gl.load(bias + rn).to(gl.float32)
    if ADD:
        old, gains = gl.load(residual + rn).to(gl.float32), gl.load(gain + rn).to(gl.float32)
    if HEADS:
        pair, _other = _halves(output)
        turned = (tile < count) & (pair >= 0)
        cos, sin = gl.load(table + pair, turned, other=1.0), gl.load(table + 64 + pair, turned, other=0.0)
        slot = gl.load(slots).to(gl.int64)
    return biases, old, gains, cos, sin, slot


@gluon.jit
def _finish(
    y, up, tile, out, factor, operands, add, heads, BN: gl.constexpr, ACT: gl.constexpr, ADD: gl.constexpr,
    HEADS: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """From a tile's products [BN] to what is stored; see gemm_kernels.finish."""
    output = gl.arange(0, BN, gl.SliceLayout(1, ACC))
    rn = tile * BN + output
    biases, old, gains, cos, sin, slot = operands
    y = y * factor + biases
    if ADD:
        scale, new_residual, new_squares = add
        r = rounded(old + scale * rounded(y, out), out)
        gl.store(new_residual + rn, r.to(new_residual.dtype.element_ty))
        gl.store(out + rn, (r * gains).to(out.dtype.element_ty))
        gl.store(new_squares + tile, gl.sum(r * r, 0))
    elif HEADS:
        kv, kv_stride, count = heads
        first, second = _halves(rounded(y, out))
        pair, _other = _halves(output)
        turned = (first * cos - second * sin).to(out.dtype.element_ty)
        second = (second * cos + first * sin).to(out.dtype.element_ty)
        if tile < count:
            gl.store(out + tile * 128 + pair, turned)
            gl.store(out + tile * 128 + 64 + pair, second)
        else:
            at = kv + slot * kv_stride + (tile - count) * 128 + pair
            gl.store(at, turned)
            gl.store(at + 64, second)
    else:
        if ACT != "":
            y = activate(rounded(y, out), ACT) * rounded(up * factor, out)
        gl.store(out + rn, y.to(out.dtype.element_ty))


@gluon.jit
def _finish_last(
    y, up, tile, parts, arrived, program, out, factor, operands, add, heads, BN: gl.constexpr, SPLIT: gl.constexpr,
    ACT: gl.constexpr, ADD: gl.constexpr, HEADS: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Store a part of a tile; the program that arrives last adds all of them up, and does what `_finish` does."""
    SIZE: gl.constexpr = 2 * BN if ACT != "" else BN
    number = program // SPLIT
    lies = parts + number * (SPLIT * SIZE) + gl.arange(0, BN, gl.SliceLayout(1, ACC))
    gl.store(lies + program % SPLIT * SIZE, y)
    if ACT != "":
        gl.store(lies + program % SPLIT * SIZE + BN, up)
    all_threads()  # all threads' parts are written before the arrival says so
    if gl.atomic_add(arrived + number, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
        gl.store(arrived + number, 0)
        y = gl.load(lies, cache_modifier=".cg")
        for other in gl.static_range(1, SPLIT):
            y += gl.load(lies + other * SIZE, cache_modifier=".cg")
        up = y
        if ACT != "":
            up = gl.load(lies + BN, cache_modifier=".cg")
            for other in gl.static_range(1, SPLIT):
                up += gl.load(lies + other * SIZE + BN, cache_modifier=".cg")
        _finish(y, up, tile, out, factor, operands, add, heads, BN, ACT, ADD, HEADS, ACC)


@gluon.jit(do_not_specialize=["square_parts"])
def row_kernel(
    x, w_blocks, meta, bias, out, parts, arrived, n, k, squares, square_parts, eps, residual, scale, gain,
    new_residual, new_squares, table, slots, kv, kv_stride, heads, kv_heads,
    BN: gl.constexpr, BK: gl.constexpr, STEPS: gl.constexpr, BUFFERS: gl.constexpr, PROGRAMS: gl.constexpr,
    WHOLE: gl.constexpr, REST: gl.constexpr, SPLIT: gl.constexpr, LAUNCH: gl.constexpr, FOUR: gl.constexpr,
    BIAS: gl.constexpr, SQUARES: gl.constexpr, ACT: gl.constexpr, ADD: gl.constexpr, HEADS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """out [n] = x [k] @ weight [n, k].T; with ACT weight [2 n, k] and out = ACT(first half) * second half.

    Grid (PROGRAMS). A program has WHOLE tiles of BN outputs (of each half), and then, if it is one of the first
    REST * SPLIT, a part of the columns of another tile, which the last of its programs adds up from parts float32
    [REST, SPLIT, BN (twice with ACT)]; arrived int32 [REST]. STEPS: k / BK.
    Of float8 w_blocks are blocks [BN, BK] of bytes, and meta is float32 [1, n (2 n)]. FOUR: blocks [BK / 128, BN / 16,
    16, 64] of int8 [chunks, n (2 n) / 16, 16, 64], and blocks [BK / 128, BN] of int32 [groups, n (2 n)]. The successor
    may be launched from a program's step LAUNCH on. The rest is as in gemm_kernels.linear_kernel, with heads of 128
    numbers.
    """
    program = gl.program_id(0)
    if PDL and LAUNCH == 0:
        tl.extra.cuda.gdc_launch_dependents()
    HALVES: gl.constexpr = 2 if ACT != "" else 1
    rest, begin, count = _work(program, PROGRAMS, STEPS, WHOLE, REST, SPLIT)
    total = WHOLE * STEPS + count
    T: gl.constexpr = w_blocks.dtype
    W: gl.constexpr = gl.NVMMASharedLayout(64 if FOUR else 128, 8, rank=2)
    bars = barriers(BUFFERS)
    metas = bars
    if FOUR:
        w = gl.allocate_shared_memory(T, [BUFFERS * HALVES, BN * (BK // 128), 64], W)
        metas = gl.allocate_shared_memory(gl.int32, [BUFFERS * HALVES, BK // 128, BN], meta.layout)
    else:
        w = gl.allocate_shared_memory(T, [BUFFERS * HALVES, BN, BK], W)
    fence_async_shared()
    for i in gl.static_range(BUFFERS):
        if i < total:
            _ask(
                w_blocks, w, meta, metas, bars, i, program, rest, begin, n, BN, BK, STEPS, BUFFERS, WHOLE, PROGRAMS,
                FOUR, HALVES,
            )  # fmt: skip

    SHARE: gl.constexpr = STEPS if WHOLE > 0 else (STEPS + SPLIT - 1) // SPLIT
    CHUNKS: gl.constexpr = (SHARE * BK + SPAN - 1) // SPAN
    WIDE: gl.constexpr = 64 if FOUR else BK
    terms = gl.allocate_shared_memory(gl.float8e4nv, [CHUNKS, 8, SPAN], gl.NVMMASharedLayout(min(WIDE, 128), 8, rank=2))
    xs = reinterpreted(terms, [CHUNKS * (SPAN // WIDE), 8, WIDE], gl.NVMMASharedLayout(min(WIDE, 128), 8, rank=2))
    sums = bars
    if FOUR:
        layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        sums = gl.allocate_shared_memory(gl.float32, [CHUNKS, SPAN // 128], layout)
    own = 0 if WHOLE > 0 else begin  # the step that x is split from
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    GROUPS: gl.constexpr = BK // 128
    tile = program if WHOLE > 0 else rest
    scales = metas
    if not FOUR:
        scales = _scales(meta, n, tile, BN, HALVES, ACC)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if SQUARES > 0:
        part = gl.arange(0, SQUARES, gl.BlockedLayout([1], [32], [4], [0]))
        of_parts = gl.load(squares + part, part < square_parts, other=0.0)
    factor = 1.0 / _split_x(x, own * BK, k, terms, sums, CHUNKS, FOUR)
    fence_async_shared()

    of_add, of_heads = (scale, new_residual, new_squares), (kv, kv_stride, heads)
    for turn in gl.static_range(WHOLE + (1 if REST > 0 else 0)):
        first = turn * STEPS
        tile = program + turn * PROGRAMS
        x_first = 0
        end = STEPS
        if turn == WHOLE:
            tile = rest
            x_first = begin - own
            end = count
        if not FOUR and turn > 0:
            scales = _scales(meta, n, tile, BN, HALVES, ACC)
        operands = _operands(
            tile, bias, residual, gain, table, slots, heads + kv_heads, BN, BIAS, ADD, HEADS, ACC
        )  # fmt: skip
        acc = gl.zeros([BN, 8], gl.float32, ACC)
        up = gl.zeros([BN, 8], gl.float32, ACC)
        less = gl.zeros([BN], gl.float32, gl.SliceLayout(1, ACC))
        less_up = gl.zeros([BN], gl.float32, gl.SliceLayout(1, ACC))
        for s in range(end):
            j = first + s
            at = j % BUFFERS
            mbarrier.wait(bars.index(at), j // BUFFERS & 1)
            if FOUR:
                acc, up, less, less_up = _multiply_four(
                    w, metas, xs, sums, acc, up, less, less_up, at, x_first + s, BN, GROUPS, HALVES, ACC
                )  # fmt: skip
            else:
                acc, up = _multiply_float8(w, xs, acc, up, at, x_first + s, BN, HALVES, ACC)
            if j + BUFFERS < total:
                _ask(
                    w_blocks, w, meta, metas, bars, j + BUFFERS, program, rest, begin, n, BN, BK, STEPS, BUFFERS, WHOLE,
                    PROGRAMS, FOUR, HALVES,
                )  # fmt: skip
            if PDL and LAUNCH > 0:  # noqa: SIM102 (constants, and a number on the device)
                if j == LAUNCH:
                    tl.extra.cuda.gdc_launch_dependents()
        y, y_up = _sums(acc, ACC), _sums(up, ACC)
        normed = 1.0
        if SQUARES > 0:  # here, as adding up needs all threads
            normed = gl.rsqrt(gl.sum(of_parts, 0) / k + eps)
        if FOUR:
            y, y_up = (512.0 * y - less) * factor, (512.0 * y_up - less_up) * factor
        else:
            y, y_up = y * factor * scales[0], y_up * factor * scales[HALVES - 1]
        if turn < WHOLE or SPLIT == 1:
            if turn < WHOLE or count > 0:
                _finish(y, y_up, tile, out, normed, operands, of_add, of_heads, BN, ACT, ADD, HEADS, ACC)
        elif count > 0:
            _finish_last(
                y, y_up, tile, parts, arrived, program, out, normed, operands, of_add, of_heads, BN, SPLIT, ACT, ADD,
                HEADS, ACC,
            )  # fmt: skip
