"""The Triton kernels of products whose inputs have float8, too: those that quantize inputs, and GEMMs.

Used by packed_gemm.py. A row has a scale, or each 128 of its inputs; bytes are in the order of the weight's
(packed_kernels.py). Few rows: a weight that is read once, with the epilogues of gemm_kernels.py.
"""

import triton
import triton.language as tl

from .gemm_epilogues import rounded, stacked_rows
from .gemm_kernels import conclude_stacked, operands_before, work_of
from .layer_kernels import activate


@triton.jit
def _store_quantised(
    value, out, scales, static, row, first, width, GROUP: tl.constexpr, BLOCK: tl.constexpr, STATIC: tl.constexpr
):  # fmt: skip
    """float32 value [BLOCK] of a row's inputs from `first` on to float8 out [T, width] and float32 scales.

    scales [T]: the largest magnitude is 448 of them; or, with GROUP, [T, width / GROUP]: each group's. STATIC: `static`
    float32 [] is the scale. A NaN stays one: a request whose numbers are none is found by its logits.
    """
    if GROUP > 0:
        parts = tl.reshape(value, (BLOCK // GROUP, GROUP))
        largest = tl.maximum(tl.max(tl.abs(parts), 1), 1e-12)
        scale = largest / 448.0
        group = first // GROUP + tl.arange(0, BLOCK // GROUP)
        tl.store(scales + row * (width // GROUP) + group, scale, group < width // GROUP)
        value = tl.reshape(parts / scale[:, None], (BLOCK,))
    else:
        if STATIC:  # noqa: SIM108
            scale = tl.load(static)
        else:
            scale = tl.maximum(tl.max(tl.abs(value)), 1e-12) / 448.0
        tl.store(scales + row, scale)
        value = value / scale
    value = tl.clamp(value, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    value = tl.reshape(tl.permute(tl.reshape(value, (BLOCK // 64, 2, 32)), (0, 2, 1)), (BLOCK,))
    place = first + tl.arange(0, BLOCK)
    tl.store(out + row * width + place, value, place < width)


@triton.jit
def quantise_rows_kernel(
    x, out, scales, static, k, width, GROUP: tl.constexpr, BLOCK: tl.constexpr, STATIC: tl.constexpr,
    ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [T, k] to float8 out [T, width] and float32 scales, see `_store_quantised`.

    With ACT x is [T, 2 k], and what is quantized ACT(first half) * second half. One program a row, or, with GROUP, a
    row's BLOCK inputs of whole groups.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    at = x + row * (k if ACT == "" else 2 * k) + column
    value = tl.load(at, column < k, other=0.0).to(tl.float32)
    if ACT != "":
        value = rounded(activate(value, ACT) * tl.load(at + k, column < k, other=0.0).to(tl.float32), x)
    _store_quantised(value, out, scales, static, row, first, width, GROUP, BLOCK, STATIC)


@triton.jit
def norm_quantise_kernel(
    delta, residual, weight, new_residual, out, scales, static, k, width, scale, eps,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STATIC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """rms_norm(r) * weight with r = residual + scale * delta, all [T, k], quantized; r to new_residual."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    live = column < k
    row = tl.program_id(0).to(tl.int64)
    at = row * k + column
    gain = tl.load(weight + column, live, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(residual + at, live, other=0.0).to(tl.float32)
    x = rounded(x + scale * tl.load(delta + at, live, other=0.0).to(tl.float32), new_residual)
    tl.store(new_residual + at, x.to(new_residual.dtype.element_ty), live)
    y = rounded(x * tl.rsqrt(tl.sum(x * x) / k + eps) * gain, new_residual)
    _store_quantised(y, out, scales, static, row, 0, width, GROUP, BLOCK, STATIC)


@triton.jit(do_not_specialize=["rows", "early", "square_parts"])
def float8_kernel(
    x, x_scales, w, w_scales, bias, out, parts, arrived, rows, n, width, early,
    squares, square_parts, eps, residual, scale, gain, new_residual, new_squares,
    qk_gains, qk_eps, table, slots, kv, kv_stride, heads, kv_heads,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, SQUARES: tl.constexpr,
    ACT: tl.constexpr, ADD: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr,
    ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, KV_LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [rows, n] = x [rows, width] @ w [n, width].T + bias, both float8; the rest as linear_kernel.

    x_scales float32 [rows], w_scales [1, n (2 n with ACT)]; or, with GROUP, which BK is, [rows, groups] and
    [groups, n (2 n)]. EVEN: BK divides width.
    """
    steps = tl.cdiv(width, BK)
    tile, part, begin, end, place, rn, rm = work_of(steps, rows, early, BM, BN, SPLIT, WHOLE, HEADS, D, PDL)
    tile_n = place[0]
    # The tile's outputs of both halves lie under one another, so that a step's products are as few and large.
    FULL: tl.constexpr = 2 * BN if ACT != "" else BN
    safe_n = stacked_rows(tl.arange(0, FULL), tile_n, n, BN, D, ACT, HEADS)
    stride = FULL // BN * n
    column = begin * BK + tl.arange(0, BK)
    row_live = (rm < rows)[:, None]
    w_at = w + safe_n.to(tl.int64)[:, None] * width + column[None, :]
    x_at = x + rm.to(tl.int64)[:, None] * width + column[None, :]
    biases, gains = operands_before(bias, gain, rn, n, BIAS, ACT, ADD)
    of_outputs = tl.load(w_scales + safe_n)
    if PDL:
        tl.extra.cuda.gdc_wait()

    both = tl.zeros((FULL, BM), tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        if EVEN:
            x_tile = tl.load(x_at, row_live, other=0.0)
            w_tile = tl.load(w_at)
        else:
            live = (step * BK + tl.arange(0, BK) < width)[None, :]
            x_tile = tl.load(x_at, row_live & live, other=0.0)
            w_tile = tl.load(w_at, live, other=0.0)
        if GROUP > 0:
            of_rows = tl.load(x_scales + rm * steps + step, rm < rows, other=0.0)
            of_outputs = tl.load(w_scales + step * stride + safe_n)
            both += tl.dot(w_tile, x_tile.T) * (of_outputs[:, None] * of_rows[None, :])
        else:
            both = tl.dot(w_tile, x_tile.T, both)
        x_at += BK
        w_at += BK
    if GROUP == 0:
        of_rows = tl.load(x_scales + rm, rm < rows, other=0.0)
        both *= of_outputs[:, None] * of_rows[None, :]
    conclude_stacked(
        both, biases, out, parts, arrived, rn, rm, rows, n, width, tile, part, tile_n,
        (squares, square_parts, eps), (residual, gains, scale, new_residual, new_squares),
        (table, slots, qk_gains, qk_eps, kv, kv_stride, heads, kv_heads),
        BM, BN, SPLIT, WHOLE, BIAS, SQUARES, ACT, ADD, HEADS, D, QK_NORM, ROTATE, INTERLEAVED, KV_LIMIT, PDL,
    )  # fmt: skip


@triton.jit
def blockwise_kernel(
    x, w, x_scales, w_scales, bias, out, rows, n, width,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [rows, n] = x @ w.T + bias of float8 x [rows, width] and w [n, width] with scales for each 128 inputs.

    x_scales float32 [rows, width / 128], w_scales float32 [width / 128, n] (DeepSeek-V3 2024, section 3.3).
    """
    row_tiles = tl.cdiv(rows, BM)
    tile = tl.program_id(0)
    rn, rm = tile // row_tiles * BN + tl.arange(0, BN), tile % row_tiles * BM + tl.arange(0, BM)
    column = tl.arange(0, 128)
    safe_m, safe_n = tl.minimum(rm, rows - 1), tl.minimum(rn, n - 1)
    x_at = x + safe_m.to(tl.int64)[:, None] * width + column[None, :]
    w_at = w + safe_n.to(tl.int64)[:, None] * width + column[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    groups = width // 128
    for group in tl.range(0, groups, num_stages=STAGES):
        part = tl.dot(tl.load(x_at), tl.load(w_at).T)
        acc += (
            part
            * tl.load(x_scales + safe_m * groups + group)[:, None]
            * tl.load(w_scales + group * n + safe_n)[None, :]
        )
        x_at += 128
        w_at += 128
    if BIAS:
        acc += tl.load(bias + safe_n).to(tl.float32)[None, :]
    at = out + rm.to(tl.int64)[:, None] * n + rn[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), (rm < rows)[:, None] & (rn < n)[None, :])
