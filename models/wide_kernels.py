"""The kernel of wide_gemm.py: up to 64 rows of x times gate and up of 4 bits, x read once by each multiprocessor.

With tiles of 128 outputs x takes twice as long from the L2 as the words from memory. Here a program has up to five
blocks of 64 outputs, each multiplied by four warps of its own, while one more warp loads a step's x for all of them and
each one's words into shared memory. Words become 16-bit floats in the registers from which tensor cores read them, and
sums are in units of the group's scale, as in packed_kernels.py. A block has 32 gates and 32 ups, 8 of each in turn, so
that a thread has both of a pair. With PDL the first steps of the weight are on their way before the predecessor ends.
In Gluon.
Legend: BM, BLOCKS, STAGES rows of x, most blocks of a program, steps for which there are buffers; a step is 128 inputs.
Invariant: results are a function of the row, the weight and the configuration.
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
from .packed_kernels import INT4_BF16
from .primed_kernels import all_threads, barriers, load_block, pairs, reinterpreted, rounded, row_factors
from .row_kernels import points_of, scales_of

STEP = gl.constexpr(128)
"""Inputs of a step: a group, a chunk of words."""
BLOCK = gl.constexpr(64)
"""Outputs of a block: as many as four warps' tensor cores take at once."""
PAIRS = gl.constexpr(32)
"""Of a gate and an up in a block."""
WORDS = gl.constexpr(32)
"""Of an output, a step: four inputs each."""
WORDS_AT = gl.constexpr(
    gl.SharedLinearLayout([[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [1, 0], [2, 8], [4, 16], [9, 0], [16, 0], [32, 0]])
)
"""How a block's words [64, 32] lie: two outputs to a line of 128 bytes, in which pieces of 16 bytes are swizzled."""
METAS_AT = gl.constexpr(gl.SharedLinearLayout([[1], [2], [4], [16], [32], [8]]))
"""How what the groups of a block's outputs have lies: 8 gates and 8 ups in turn come from 32 gates and 32 ups."""


@gluon.jit
def values_of(words, points, PLANE: gl.constexpr):
    """bfloat16 values of one plane of words, see packed_kernels.halves."""
    return gl.inline_asm_elementwise(
        INT4_BF16[PLANE], "=r,r,r", [words, points], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _ask_words(
    w_blocks, meta_blocks, words, metas, bar, stage, step, block, count, BM: gl.constexpr, BLOCKS: gl.constexpr
):  # fmt: skip
    """Have a step's words and what their groups have loaded, after saying how much the step loads, x among it."""
    EACH: gl.constexpr = BLOCK * (WORDS * 2 + 4)
    if count == BLOCKS:
        mbarrier.expect(bar, BM * STEP * 2 + BLOCKS * EACH)
    else:
        mbarrier.expect(bar, BM * STEP * 2 + (BLOCKS - 1) * EACH)
    W: gl.constexpr = w_blocks.layout
    for i in gl.static_range(BLOCKS):
        if i < count:
            target = reinterpreted(words.index(stage * BLOCKS + i), [PAIRS // 16, 2, 2, 4, 2 * WORDS], W)
            load_block(w_blocks, [(block + i) * (PAIRS // 16), step * 2, 0, 0, 0], bar, target)
            load_block(meta_blocks, [step, 0, (block + i) * PAIRS], bar, metas.index(stage * BLOCKS + i))


@gluon.jit
def _ask_x(x_blocks, x, bar, stage, step, BM: gl.constexpr):
    """Have a step's x loaded."""
    X: gl.constexpr = x_blocks.layout
    load_block(x_blocks, [step * 2, 0, 0], bar, reinterpreted(x.index(stage), [2, BM, STEP // 2], X))


@gluon.jit
def _load_steps(
    x_blocks, w_blocks, meta_blocks, x, words, metas, full, empty, block, count, steps,
    BM: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads: steps from STAGES on, each when all blocks have read what was in its buffers."""
    for s in range(STAGES, steps):
        stage = s % STAGES
        mbarrier.wait(empty.index(stage), (s // STAGES + 1) & 1)
        _ask_words(w_blocks, meta_blocks, words, metas, full.index(stage), stage, s, block, count, BM, BLOCKS)
        _ask_x(x_blocks, x, full.index(stage), stage, s, BM)


@gluon.jit
def _products(
    x, words, metas, full, empty, steps, NUMBER: gl.constexpr, BM: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """float32 [64, BM]: all steps of a program's block of this number."""
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    X: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    acc = gl.zeros([BLOCK, BM], gl.float32, ACC)
    unit = gl.full([BLOCK], 1.0, gl.float32, gl.SliceLayout(1, ACC))
    for s in range(steps):
        stage = s % STAGES
        mbarrier.wait(full.index(stage), (s // STAGES) & 1)
        codes = reinterpreted(words.index(stage * BLOCKS + NUMBER), [BLOCK, WORDS], WORDS_AT).load(A)
        meta = reinterpreted(metas.index(stage * BLOCKS + NUMBER), [BLOCK], METAS_AT)
        scales = scales_of(meta.load(gl.SliceLayout(1, ACC)))
        points = points_of(meta.load(gl.SliceLayout(1, A)))[:, None]
        acc = acc * (unit / scales)[:, None]
        unit = scales
        xs = reinterpreted(x.index(stage), [2, BM, STEP // 2], X)
        for plane in gl.static_range(4):
            values = values_of(codes, points, plane)
            of_plane = xs.index(plane // 2).slice(plane % 2 * WORDS, WORDS, 1)
            acc = warpgroup_mma(values, of_plane.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1 if plane < 3 else 0, deps=[acc])  # else there are not registers enough
        all_threads()  # of the block's have read the buffers
        mbarrier.arrive(empty.index(stage), count=1)
    return acc * unit[:, None]


@gluon.jit
def _pass(full, empty, steps, STAGES: gl.constexpr):
    """What warps without a block do: they have read all buffers."""
    for s in range(steps):
        mbarrier.wait(full.index(s % STAGES), (s // STAGES) & 1)
        all_threads()
        mbarrier.arrive(empty.index(s % STAGES), count=1)


@gluon.jit
def _block(
    buffers, factors, out, rows, n, block, count, steps, NUMBER: gl.constexpr, BM: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, ACT: gl.constexpr, NORMED: gl.constexpr,
):  # fmt: skip
    """Four warps: the program's block of this number, if it has one."""
    x, words, metas, full, empty = buffers
    if count > NUMBER:
        ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
        acc = _products(x, words, metas, full, empty, steps, NUMBER, BM, BLOCKS, STAGES, ACC)
        if NORMED:
            acc = acc * factors.load(gl.SliceLayout(0, ACC))[None, :]
        gate, up = pairs(acc, BM)
        y = gl.reshape(activate(rounded(gate, out), ACT) * rounded(up, out), [PAIRS, BM])
        L: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [1, 4], [0, 1])  # 16 bytes a thread
        output = (block + NUMBER) * PAIRS + gl.arange(0, PAIRS, gl.SliceLayout(1, L))[:, None]
        row = gl.arange(0, BM, gl.SliceLayout(0, L))[None, :]
        y = gl.convert_layout(y.to(out.dtype.element_ty), L)
        gl.store(out + row * n + output, y, (row < rows) & (output < n))
    elif NUMBER < BLOCKS:
        _pass(full, empty, steps, STAGES)


@gluon.jit(do_not_specialize=["rows", "square_parts"])
def wide_kernel(
    x_blocks, w_blocks, meta_blocks, out, rows, n, k, squares, square_parts, eps,
    BM: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, SQUARES: gl.constexpr,
    ACT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out [rows, n] = ACT(first half) * second half of x [rows, k] @ w [2 n, k].T; up to BM rows.

    Grid (PROGRAMS), which share the blocks as evenly as they go; BLOCKS: the most of one. x_blocks: [2, BM, 64] of x
    [k / 64, rows, 64]; w_blocks: [2, 2, 2, 4, 64] of words int16 [n / 16, k / 64, halves, 4, 64]; meta_blocks: [1, 2,
    32] of int32 [k / 128, halves, n]. k / 128 is STAGES at least.
    The rest is as in gemm_kernels.linear_kernel.
    """
    blocks = n // PAIRS
    block = gl.program_id(0) * blocks // PROGRAMS
    count = (gl.program_id(0) + 1) * blocks // PROGRAMS - block
    steps = k // STEP
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    x = gl.allocate_shared_memory(x_blocks.dtype, [STAGES, 2 * BM, STEP // 2], SWIZZLED)
    words = gl.allocate_shared_memory(gl.int16, [STAGES * BLOCKS, BLOCK // 2, 2 * WORDS], SWIZZLED)
    metas = gl.allocate_shared_memory(gl.int32, [STAGES * BLOCKS, 1, 2, PAIRS], meta_blocks.layout)
    factors = gl.allocate_shared_memory(gl.float32, [BM], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    full = barriers(STAGES)
    empty = barriers(STAGES, BLOCKS)
    fence_async_shared()
    for i in gl.static_range(STAGES):
        _ask_words(w_blocks, meta_blocks, words, metas, full.index(i), i, i, block, count, BM, BLOCKS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in gl.static_range(STAGES):
        _ask_x(x_blocks, x, full.index(i), i, i, BM)
    if SQUARES > 0:
        L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        row = gl.arange(0, BM, L)
        ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
        of_rows = row_factors(squares, square_parts, eps, row, rows, k, SQUARES, True, ACC)
        factors.store(gl.convert_layout(of_rows, L))
    buffers = (x, words, metas, full, empty)
    NORMED: gl.constexpr = SQUARES > 0
    gl.warp_specialize(
        [
            (_block, (buffers, factors, out, rows, n, block, count, steps, 0, BM, BLOCKS, STAGES, ACT, NORMED)),
            (_block, (buffers, factors, out, rows, n, block, count, steps, 1, BM, BLOCKS, STAGES, ACT, NORMED)),
            (_block, (buffers, factors, out, rows, n, block, count, steps, 2, BM, BLOCKS, STAGES, ACT, NORMED)),
            (_block, (buffers, factors, out, rows, n, block, count, steps, 3, BM, BLOCKS, STAGES, ACT, NORMED)),
            (_block, (buffers, factors, out, rows, n, block, count, steps, 4, BM, BLOCKS, STAGES, ACT, NORMED)),
            (
                _load_steps,
                (
                    x_blocks, w_blocks, meta_blocks, x, words, metas, full, empty, block, count, steps, BM, BLOCKS,
                    STAGES,
                ),
            ),
        ],
        [4, 4, 4, 4, 1],
        [88, 88, 88, 88, 24],
    )  # fmt: skip
