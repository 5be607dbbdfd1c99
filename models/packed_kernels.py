"""The Triton GEMM of a decode step with quantized weights, and the kernels beside it for many rows.

Used by packed_gemm.py. As gemm_kernels.py: few rows, a weight that is read from memory once, the same epilogues. A
weight is int16 words [outputs, inputs * bits / 16]; a word holds values of inputs 32 apart, in chunks of 32 words, so
that the words of a tile, shifted, are tiles of values, and each meets a tile of x that is contiguous. 4 bits: four
values, of inputs c, c + 32, c + 64, c + 96 of a chunk of 128. 8 bits: two, of inputs c and c + 32 of a chunk of 64.
A value becomes a 16-bit float without a conversion (Kim et al. 2022, "Who Says Elephants Can't Run"): its bits are the
mantissa's end of a power of two, of which that power and the zero point are subtracted. Exact, as whole numbers are;
scales are applied to the sums of a group, in float32. Eight bits go as two times four, float8 is moved to its place.
Invariant: results are a function of the row, the weight and the tile; `arrived` is all zeros between launches.
"""

import triton
import triton.language as tl

from .gemm_kernels import conclude, operands_after

CHUNK: tl.constexpr = tl.constexpr(32)
"""Words that lie together: neighbours in a word are so many inputs apart."""


@triton.jit
def halves(words, zero, PLANE: tl.constexpr, KIND: tl.constexpr, BF16: tl.constexpr):
    """The 16-bit floats of one plane of words: KIND int4: four planes, value - zero; int8: four, of which the even and
    odd ones add up to value - 128; fp8: two, the value times 2 ** -120 (2 ** -8 in float16).

    zero: float 2 ** 7 (2 ** 10 in float16) + the zero point, of the result's type, with int4.
    """
    FLOAT: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    if KIND == "fp8":
        UP: tl.constexpr = 4 if BF16 else 7
        MASK: tl.constexpr = 0x07F0 if BF16 else 0x3F80
        if PLANE == 0:  # noqa: SIM108 (a constant)
            bits = ((words << 8) & -0x8000) | ((words << UP) & MASK)
        else:
            bits = (words & -0x8000) | ((words >> (8 - UP)) & MASK)
        return bits.to(tl.int16).to(FLOAT, bitcast=True)
    elif KIND == "int4":
        MAGIC: tl.constexpr = 0x4300 if BF16 else 0x6400
        bits = ((words >> (4 * PLANE)) & 15) | MAGIC
        return bits.to(tl.int16).to(FLOAT, bitcast=True) - zero
    else:
        if PLANE % 2 == 0:
            bits = ((words >> (4 * PLANE)) & 15) | (0x4300 if BF16 else 0x6400)
            LESS: tl.constexpr = 128.0 if BF16 else 1024.0
        elif BF16:
            bits = ((words >> (4 * PLANE - 3)) & 0x78) | 0x4380
            LESS: tl.constexpr = 384.0
        else:
            bits = ((words >> (4 * PLANE - 4)) & 0xF0) | 0x6400
            LESS: tl.constexpr = 1152.0
        return bits.to(tl.int16).to(FLOAT, bitcast=True) - tl.full([], LESS, FLOAT)


@triton.jit
def four_planes(words, zero, KIND: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """All planes of words of whole numbers, see `halves`; with ASM two words at a time, three instructions a plane."""
    if ASM and KIND == "int4" and BF16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            lop3.b32 t, $4, 0x000F000F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $0, t, $5;
            shr.u32 t, $4, 4;
            lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $1, t, $5;
            shr.u32 t, $4, 8;
            lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $2, t, $5;
            shr.u32 t, $4, 12;
            lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
            sub.rn.bf16x2 $3, t, $5;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r",
            [words, zero],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return (
        halves(words, zero, 0, KIND, BF16),
        halves(words, zero, 1, KIND, BF16),
        halves(words, zero, 2, KIND, BF16),
        halves(words, zero, 3, KIND, BF16),
    )


@triton.jit
def two_planes(words, BF16: tl.constexpr, ASM: tl.constexpr):
    """Both planes of words of float8, times 2 ** -120 (float16: 2 ** -8)."""
    if ASM and BF16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 s, t;
            shl.b32 s, $2, 8;
            and.b32 s, s, 0x80008000;
            shl.b32 t, $2, 4;
            lop3.b32 $0, t, 0x07F007F0, s, 0xEA;
            and.b32 s, $2, 0x80008000;
            shr.u32 t, $2, 4;
            lop3.b32 $1, t, 0x07F007F0, s, 0xEA;
            }
            """,
            "=&r,=&r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return halves(words, 0.0, 0, "fp8", BF16), halves(words, 0.0, 1, "fp8", BF16)


@triton.jit
def scale_and_zero(meta, KIND: tl.constexpr, BF16: tl.constexpr):
    """(float32 scale, zero point as `halves` wants it) of what a group's outputs have: float32; or, with int4, a
    float16 scale and above it the zero point."""
    FLOAT: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    if KIND == "int4":
        scale = (meta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        zero = ((meta >> 16) & 255) + (128 if BF16 else 1024)
        return scale, zero.to(tl.float32).to(FLOAT)
    else:
        return meta, 0.0


@triton.jit
def _x_tile(at, offset, row_live, columns, k, EVEN: tl.constexpr):
    """A tile of x, `offset` inputs further on; zeros beyond its end."""
    if EVEN:
        return tl.load(at + offset, row_live, other=0.0)
    else:
        return tl.load(at + offset, row_live & (columns + offset < k)[None, :], other=0.0)


@triton.jit
def _metas(at, n, GROUPS: tl.constexpr):
    """What the outputs have for each of a tile's groups."""
    first = tl.load(at)
    if GROUPS == 1:
        return (first,)
    elif GROUPS == 2:
        return first, tl.load(at + n)
    else:
        return first, tl.load(at + n), tl.load(at + 2 * n), tl.load(at + 3 * n)


@triton.jit
def _accumulate(
    words, metas, xs, acc, KIND: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr, GROUPS: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] + the product of a tile of words [BN, BK] and tiles of x [BM, BK], one for each value of a word.

    metas: of each group in the tile, GROUPS (1, 2 or 4); SCALED: the product is multiplied with their scales.
    """
    PLANES: tl.constexpr = 2 if KIND == "fp8" else 4
    EACH: tl.constexpr = PLANES // GROUPS  # planes of a group
    FLOAT: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    lift: tl.constexpr = 2.0**120 if BF16 else 2.0**8
    if GROUPS == 1 and KIND == "int4":
        scale, zero = scale_and_zero(metas[0], KIND, BF16)
        planes = four_planes(words, tl.broadcast_to(zero[:, None], words.shape), KIND, BF16, ASM)
    elif KIND == "int8":
        planes = four_planes(words, 0.0, KIND, BF16, ASM)
    elif KIND == "fp8":
        planes = two_planes(words, BF16, ASM)
    total = acc
    for plane in tl.static_range(PLANES):
        if KIND == "int4" and GROUPS > 1:
            scale, zero = scale_and_zero(metas[plane // EACH], KIND, BF16)
            q = halves(words, zero[:, None], plane, KIND, BF16)
        elif KIND == "fp8":
            q = planes[plane] * tl.full([], lift, FLOAT)
            scale = metas[plane // EACH]
        elif KIND == "int8":
            q = planes[plane]
            scale = metas[plane // EACH]
        else:
            q = planes[plane]
        if SCALED and plane // EACH * EACH == plane:
            total = tl.zeros_like(acc)
        total = tl.dot(q, xs[plane // (2 if KIND == "int8" else 1)].T, total, input_precision="ieee")
        if SCALED and (plane + 1) // EACH * EACH == plane + 1:
            acc += total * scale[:, None]
    return acc if SCALED else total


@triton.jit(do_not_specialize=["rows", "early", "square_parts"])
def packed_kernel(
    x, w, meta, bias, out, parts, arrived, rows, n, k, width, early,
    squares, square_parts, eps, residual, scale, gain, new_residual, new_squares,
    qk_gains, qk_eps, table, slots, kv, kv_stride, heads, kv_heads,
    KIND: tl.constexpr, GROUP: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr, SQUARES: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr,
    KV_LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [rows, n] = x [rows, k] @ weight [n, k].T + bias; ACT, ADD, HEADS, SPLIT, BIAS, SQUARES as linear_kernel.

    w: words int16 [n (2 n with ACT), width] of KIND; meta: float32, with int4 int32, [groups, n (2 n)], see
    `scale_and_zero`; GROUP: inputs of a group, 0 if there is one. BK words a step: with groups of fewer inputs CHUNK,
    else whole steps make a group. EVEN: BK divides width, and the words are all of x. ASM: on a GPU.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    row_tiles = tl.cdiv(rows, BM)
    tile_n, tile_m = tile // row_tiles, tile % row_tiles
    rn, rm = tile_n * BN + tl.arange(0, BN), tile_m * BM + tl.arange(0, BM)
    UNIT: tl.constexpr = CHUNK * (4 if KIND == "int4" else 2)  # inputs of a chunk
    STEP: tl.constexpr = BK // CHUNK * UNIT  # inputs of a step
    GROUPS: tl.constexpr = STEP // GROUP if GROUP > 0 and GROUP < STEP else 1
    SCALED: tl.constexpr = GROUP > 0
    steps = tl.cdiv(width, BK)
    share = tl.cdiv(steps, SPLIT)
    begin = part * share
    end = tl.minimum(begin + share, steps)
    if PDL:  # noqa: SIM102 (a constant, and a number on the device)
        if early > 0:
            tl.extra.cuda.gdc_launch_dependents()

    column = tl.arange(0, BK)
    inputs = begin * STEP + column // CHUNK * UNIT + column % CHUNK
    row_live = (rm < rows)[:, None]
    safe_n = tl.minimum(rn, n - 1)
    w_at = w + safe_n.to(tl.int64)[:, None] * width + begin * BK + column[None, :]
    up_at = w_at + n.to(tl.int64) * width
    x_at = x + rm.to(tl.int64)[:, None] * k + inputs[None, :]
    stride = 2 * n if ACT != "" else n
    biases = (0.0, 0.0)
    if BIAS:
        biases = (tl.load(bias + rn, rn < n, other=0.0).to(tl.float32), 0.0)
        if ACT != "":
            biases = (biases[0], tl.load(bias + n + rn, rn < n, other=0.0).to(tl.float32))
    gains = 0.0
    if ADD:
        gains = tl.load(gain + rn, rn < n, other=0.0).to(tl.float32)
    metas = _metas(meta + safe_n, stride, 1)
    up_metas = _metas(meta + safe_n + n, stride, 1) if ACT != "" else metas
    if PDL:
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros((BN, BM), tl.float32)
    up = acc
    for step in tl.range(begin, end, num_stages=STAGES):
        columns = inputs + (step - begin) * STEP
        if EVEN:  # noqa: SIM108
            words = tl.load(w_at)
        else:
            words = tl.load(w_at, (step * BK + column < width)[None, :], other=0)
        xs = (_x_tile(x_at, 0, row_live, columns, k, EVEN), _x_tile(x_at, CHUNK, row_live, columns, k, EVEN))
        if KIND == "int4":
            more = (
                _x_tile(x_at, 2 * CHUNK, row_live, columns, k, EVEN),
                _x_tile(x_at, 3 * CHUNK, row_live, columns, k, EVEN),
            )
            xs = (xs[0], xs[1], more[0], more[1])  # type: ignore[assignment]
        if SCALED:
            meta_at = meta + step * STEP // GROUP * stride + safe_n
            acc = _accumulate(words, _metas(meta_at, stride, GROUPS), xs, acc, KIND, BF16, ASM, GROUPS, SCALED)
        else:
            acc = _accumulate(words, metas, xs, acc, KIND, BF16, ASM, GROUPS, SCALED)
        if ACT != "":
            if EVEN:  # noqa: SIM108
                words = tl.load(up_at)
            else:
                words = tl.load(up_at, (step * BK + column < width)[None, :], other=0)
            if SCALED:
                up = _accumulate(words, _metas(meta_at + n, stride, GROUPS), xs, up, KIND, BF16, ASM, GROUPS, SCALED)
            else:
                up = _accumulate(words, up_metas, xs, up, KIND, BF16, ASM, GROUPS, SCALED)
            up_at += BK
        w_at += BK
        x_at += STEP
    if not SCALED:
        acc *= scale_and_zero(metas[0], KIND, BF16)[0][:, None]
        if ACT != "":
            up *= scale_and_zero(up_metas[0], KIND, BF16)[0][:, None]

    LATE: tl.constexpr = BM * BN > 2048
    old, slot, turn, factors = operands_after(
        residual, slots, table, squares, square_parts, eps, rn, rm, rows, n, k, True, ADD, HEADS, ROTATE, LATE, D,
        SQUARES,
    )  # fmt: skip
    if LATE:
        old, turn = residual, table
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if ACT == "":
        up = acc
    conclude(
        acc, up, factors, biases, old, turn, out, parts, arrived, rn, rm, rows, n, tile, part, tile_n, row_tiles,
        (gains, scale, new_residual, new_squares), (slot, qk_gains, qk_eps, kv, kv_stride, heads, kv_heads),
        BM, BN, SPLIT, True, BIAS, SQUARES > 0, ACT, ADD, HEADS, LATE, D, QK_NORM, ROTATE, INTERLEAVED, KV_LIMIT,
    )  # fmt: skip


# ---------------------------------------------------------------------- many rows


@triton.jit
def unpack_kernel(
    w, meta, out, n, k, width, KIND: tl.constexpr, GROUP: tl.constexpr, BF16: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """out [n, k] = the weight of words w [n, width] and meta [groups, n]. Grid (tiles of BN outputs, chunks)."""
    UNIT: tl.constexpr = CHUNK * (4 if KIND == "int4" else 2)
    PLANES: tl.constexpr = 2 if KIND == "fp8" else 4
    FLOAT: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    lift: tl.constexpr = 2.0**120 if BF16 else 2.0**8
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.arange(0, CHUNK)
    live = (rn < n)[:, None]
    words = tl.load(w + rn.to(tl.int64)[:, None] * width + tl.program_id(1) * CHUNK + column[None, :], live, other=0)
    for plane in tl.static_range(PLANES):
        OFFSET: tl.constexpr = CHUNK * (plane // 2 if KIND == "int8" else plane)
        first = tl.program_id(1) * UNIT + OFFSET
        group = first // GROUP if GROUP > 0 else 0
        scale, zero = scale_and_zero(tl.load(meta + group * n + rn, rn < n, other=0), KIND, BF16)
        if KIND == "int4":
            q = halves(words, zero[:, None], plane, KIND, BF16).to(tl.float32)
        elif KIND == "fp8":
            q = halves(words, 0.0, plane, KIND, BF16).to(tl.float32) * lift
        elif plane % 2 == 0:
            q = halves(words, 0.0, plane, KIND, BF16).to(tl.float32)
        else:
            q += halves(words, 0.0, plane, KIND, BF16).to(tl.float32)
        if KIND != "int8" or plane % 2 == 1:
            at = out + rn.to(tl.int64)[:, None] * k + (first + column)[None, :]
            tl.store(at, (q * scale[:, None]).to(FLOAT), live & (first + column < k)[None, :])


@triton.jit
def quantise_rows_kernel(
    x, out, scales, static, k, width, GROUP: tl.constexpr, BLOCK: tl.constexpr, STATIC: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """x [T, k] to float8 out [T, width], in the order of the weights' bytes, and float32 scales.

    scales [T]: a row's largest magnitude is 448 of them; or, with GROUP, [T, width / GROUP]: each group's. STATIC:
    `static` float32 [] is the scale. One program a row, or, with GROUP, a row's BLOCK inputs of whole groups.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    value = tl.load(x + row * k + column, column < k, other=0.0).to(tl.float32)
    place = column // 64 * 64 + column % 32 * 2 + column % 64 // 32
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
    value = tl.clamp(value, -448.0, 448.0)
    tl.store(out + row * width + place, value.to(tl.float8e4nv), column < width)


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
