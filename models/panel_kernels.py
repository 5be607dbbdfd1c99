"""The kernel of panel_gemm.py: 128 rows of x times a panel of a weight that is as wide as registers allow.

From 65 rows on x takes as long from the L2 as the weight from memory if tiles are narrow. A panel is so wide that each
multiprocessor has one: 144 gates and as many ups, of which 18,944 make 132. Tensors are powers of two wide, so a panel
is two of them, side by side. The activation is done here, and needs neither a kernel nor its input in memory; and with
PDL the first steps of the weight are on their way into shared memory before the predecessor ends.
Legend: BM, BN, RN, BK rows of x, outputs of both parts of a panel and columns of a step; x [rows, k], BK divides k.
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
from .primed_kernels import all_threads, barriers, load_block, reinterpreted

SILU = gl.constexpr(
    "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000;"
    " rcp.approx.ftz.f32 t, t; mul.ftz.f32 $0, $1, t; }"
)


@gluon.jit
def quick_silu(x):
    """x * sigmoid(x) in five instructions instead of fifteen, exact to some float32 ulps."""
    return gl.inline_asm_elementwise(SILU, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _load_panel(blocks, first, column, bar, buffer, WIDTH: gl.constexpr, BK: gl.constexpr):
    """WIDTH rows from `first` on of both halves of a weight [2, n, k], under one another."""
    L: gl.constexpr = blocks.layout
    load_block(blocks, [0, first, column], bar, reinterpreted(buffer, [2, WIDTH, BK], L))


@gluon.jit
def _store_gated(acc, out, first_m, first_n, rows, n, BM: gl.constexpr, WIDTH: gl.constexpr, ACT: gl.constexpr):
    """ACT(gates) * ups of sums [BM, gates then ups] to out [rows, n]; both of a pair are in the same thread.

    They are not rounded before, as they are elsewhere: that conversion would take as long as the activation.
    """
    gate, up = gl.split(gl.permute(gl.reshape(acc, [BM, 2, WIDTH]), (0, 2, 1)))
    y = ((quick_silu(gate) if ACT == "silu" else activate(gate, ACT)) * up).to(out.dtype.element_ty)
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [8, 1], [1, 0])  # 16 bytes a thread
    row = first_m + gl.arange(0, BM, gl.SliceLayout(1, L))[:, None]
    column = first_n + gl.arange(0, WIDTH, gl.SliceLayout(0, L))[None, :]
    gl.store(out + row * n + column, gl.convert_layout(y, L), (row < rows) & (column < n))


@gluon.jit
def _load_steps(
    x_blocks, w_blocks, rest_blocks, x, w, w_rest, full, empty, first_m, first_n, steps,
    BM: gl.constexpr, BN: gl.constexpr, RN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads: steps from STAGES on, each when what was in its buffers has been read."""
    for s in range(STAGES, steps):
        stage, column = s % STAGES, s * BK
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), (s // STAGES + 1) & 1)
        mbarrier.expect(bar, (BM + 2 * (BN + RN)) * BK * 2)
        _load_panel(w_blocks, first_n, column, bar, w.index(stage), BN, BK)
        _load_panel(rest_blocks, first_n + BN, column, bar, w_rest.index(stage), RN, BK)
        load_block(x_blocks, [first_m, column], bar, x.index(stage))


@gluon.jit
def _multiply_steps(x, w, w_rest, full, empty, acc, rest, steps, STAGES: gl.constexpr):
    """The warps that multiply: a step's product is begun before that of the step before is waited for."""
    for s in range(steps):
        stage = s % STAGES
        mbarrier.wait(full.index(stage), (s // STAGES) & 1)
        acc = warpgroup_mma(x.index(stage), w.index(stage).permute((1, 0)), acc, is_async=True)
        rest = warpgroup_mma(x.index(stage), w_rest.index(stage).permute((1, 0)), rest, is_async=True)
        acc, rest = warpgroup_mma_wait(2, deps=[acc, rest])
        if s > 0:
            all_threads()  # of both groups of warps have read that step's buffers
            mbarrier.arrive(empty.index((s - 1) % STAGES), count=1)
    return warpgroup_mma_wait(0, deps=[acc, rest])


@gluon.jit(do_not_specialize=["rows"])
def panel_kernel(
    x_blocks, w_blocks, rest_blocks, out, rows, n, steps,
    BM: gl.constexpr, BN: gl.constexpr, RN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """out [rows, n] = ACT(first half) * second half of x [rows, k] @ w [2 n, k].T.

    Program: BN + RN outputs, BM rows. w_blocks, rest_blocks: blocks [2, BN or RN, BK] of w [2, n, k]. Buffers are for
    STAGES steps, 2 or more. steps: k / BK, STAGES or more.
    """
    tl.extra.cuda.gdc_launch_dependents()
    row_tiles = gl.cdiv(rows, BM)
    first_m = gl.program_id(0) % row_tiles * BM
    first_n = gl.program_id(0) // row_tiles * (BN + RN)
    T: gl.constexpr = x_blocks.dtype
    x = gl.allocate_shared_memory(T, [STAGES, BM, BK], x_blocks.layout)
    w = gl.allocate_shared_memory(T, [STAGES, 2 * BN, BK], x_blocks.layout)
    w_rest = gl.allocate_shared_memory(T, [STAGES, 2 * RN, BK], x_blocks.layout)
    full = barriers(STAGES)
    empty = barriers(STAGES)
    fence_async_shared()
    for i in gl.static_range(STAGES):
        mbarrier.expect(full.index(i), (BM + 2 * (BN + RN)) * BK * 2)
        _load_panel(w_blocks, first_n, i * BK, full.index(i), w.index(i), BN, BK)
        _load_panel(rest_blocks, first_n + BN, i * BK, full.index(i), w_rest.index(i), RN, BK)
    tl.extra.cuda.gdc_wait()
    for i in gl.static_range(STAGES):
        load_block(x_blocks, [first_m, i * BK], full.index(i), x.index(i))

    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 2 * BN, 16])
    REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 2 * RN, 16])
    acc = gl.zeros([BM, 2 * BN], gl.float32, ACC)
    rest = gl.zeros([BM, 2 * RN], gl.float32, REST)
    acc, rest = gl.warp_specialize(
        [
            (_multiply_steps, (x, w, w_rest, full, empty, acc, rest, steps, STAGES)),
            (
                _load_steps,
                (
                    x_blocks, w_blocks, rest_blocks, x, w, w_rest, full, empty, first_m, first_n, steps,
                    BM, BN, RN, BK, STAGES,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
    _store_gated(acc, out, first_m, first_n, rows, n, BM, BN, ACT)
    _store_gated(rest, out, first_m, first_n + BN, rows, n, BM, RN, ACT)
