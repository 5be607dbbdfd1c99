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

from .gemm_epilogues import rounded
from .gemm_kernels import conclude, operands_after, operands_before
from .layer_kernels import activate

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
        LOW: tl.constexpr = PLANE % 2 == 0
        LESS: tl.constexpr = (128.0 if LOW else 384.0) if BF16 else (1024.0 if LOW else 1152.0)
        if LOW:
            bits = ((words >> (4 * PLANE)) & 15) | (0x4300 if BF16 else 0x6400)
        elif BF16:
            bits = ((words >> (4 * PLANE - 3)) & 0x78) | 0x4380
        else:
            bits = ((words >> (4 * PLANE - 4)) & 0xF0) | 0x6400
        return bits.to(tl.int16).to(FLOAT, bitcast=True) - tl.full([], LESS, FLOAT)


def _asm_of(kind: str, bf16: bool) -> str:
    """PTX that makes all planes of two words, as `halves` does: outputs $0 on, the words, then int4's four zeros."""
    both = lambda bits: f"0x{bits:04X}{bits:04X}"  # noqa: E731
    magic, add = (0x4300, "sub.rn.bf16x2") if bf16 else (0x6400, "sub.rn.f16x2")
    lines = [".reg .b32 s, t;"]
    if kind == "int4":
        for plane in range(4):
            lines += [f"shr.u32 t, $4, {4 * plane};", f"lop3.b32 t, t, {both(15)}, {both(magic)}, 0xEA;"]
            lines += [f"{add} ${plane}, t, ${5 + plane};"]
    elif kind == "int8":
        high, less, mask, back = (0x4380, 0x43C0, 0x78, 3) if bf16 else (0x6400, 0x6480, 0xF0, 4)
        for byte in range(2):
            lines += [f"shr.u32 t, $4, {8 * byte};", f"lop3.b32 t, t, {both(15)}, {both(magic)}, 0xEA;"]
            lines += [f"mov.b32 s, {both(magic)};", f"{add} ${2 * byte}, t, s;"]
            lines += [f"shr.u32 t, $4, {8 * byte + 4 - back};", f"lop3.b32 t, t, {both(mask)}, {both(high)}, 0xEA;"]
            lines += [f"mov.b32 s, {both(less)};", f"{add} ${2 * byte + 1}, t, s;"]
    else:
        up, mask = (4, 0x07F0) if bf16 else (7, 0x3F80)
        for plane, signs, rest in ((0, "shl.b32 s, $2, 8;", f"shl.b32 t, $2, {up};"), (1, "mov.b32 s, $2;", "")):
            rest = rest or f"shr.u32 t, $2, {8 - up};"
            lines += [signs, f"and.b32 s, s, {both(0x8000)};", rest, f"lop3.b32 ${plane}, t, {both(mask)}, s, 0xEA;"]
    return "{\n" + "\n".join(lines) + "\n}"


INT4_BF16 = tl.constexpr(_asm_of("int4", True))
INT4_FP16 = tl.constexpr(_asm_of("int4", False))
INT8_BF16 = tl.constexpr(_asm_of("int8", True))
INT8_FP16 = tl.constexpr(_asm_of("int8", False))
FP8_BF16 = tl.constexpr(_asm_of("fp8", True))
FP8_FP16 = tl.constexpr(_asm_of("fp8", False))


@triton.jit
def four_planes(words, zeros, KIND: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """All planes of words of whole numbers, see `halves`; zeros: one for each. ASM: two words at a time."""
    if not ASM:
        return (
            halves(words, zeros[0], 0, KIND, BF16),
            halves(words, zeros[1], 1, KIND, BF16),
            halves(words, zeros[2], 2, KIND, BF16),
            halves(words, zeros[3], 3, KIND, BF16),
        )
    elif KIND == "int4":
        z0, z1 = tl.broadcast_to(zeros[0], words.shape), tl.broadcast_to(zeros[1], words.shape)
        z2, z3 = tl.broadcast_to(zeros[2], words.shape), tl.broadcast_to(zeros[3], words.shape)
        args = [words, z0, z1, z2, z3]
        if BF16:
            return tl.inline_asm_elementwise(
                INT4_BF16, "=&r,=&r,=&r,=&r,r,r,r,r,r", args,
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                INT4_FP16, "=&r,=&r,=&r,=&r,r,r,r,r,r", args,
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
            )  # fmt: skip
    elif BF16:
        return tl.inline_asm_elementwise(
            INT8_BF16, "=&r,=&r,=&r,=&r,r", [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            INT8_FP16, "=&r,=&r,=&r,=&r,r", [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def two_planes(words, BF16: tl.constexpr, ASM: tl.constexpr):
    """Both planes of words of float8, see `halves`."""
    if ASM and BF16:
        return tl.inline_asm_elementwise(
            FP8_BF16, "=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            FP8_FP16, "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
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
    if KIND == "int4":
        s0, z0 = scale_and_zero(metas[0], KIND, BF16)
        scales, zeros = (s0,), (z0[:, None], z0[:, None], z0[:, None], z0[:, None])
        if GROUPS > 1:
            s1, z1 = scale_and_zero(metas[1], KIND, BF16)
            scales, zeros = (s0, s1), (z0[:, None], z0[:, None], z1[:, None], z1[:, None])  # type: ignore[assignment]
        if GROUPS > 2:
            s2, z2 = scale_and_zero(metas[2], KIND, BF16)
            s3, z3 = scale_and_zero(metas[3], KIND, BF16)
            scales, zeros = (s0, s1, s2, s3), (z0[:, None], z1[:, None], z2[:, None], z3[:, None])  # type: ignore[assignment]
        planes = four_planes(words, zeros, KIND, BF16, ASM)
    elif KIND == "int8":
        scales = metas
        planes = four_planes(words, (0.0, 0.0, 0.0, 0.0), KIND, BF16, ASM)
    else:
        scales = metas
        planes = two_planes(words, BF16, ASM)
    total = acc
    for plane in tl.static_range(PLANES):
        q = planes[plane]
        if KIND == "fp8":
            q = q * tl.full([], lift, FLOAT)
        if SCALED and plane // EACH * EACH == plane:
            total = tl.zeros_like(acc)
        total = tl.dot(q, xs[plane // (2 if KIND == "int8" else 1)].T, total, input_precision="ieee")
        if SCALED and (plane + 1) // EACH * EACH == plane + 1:
            acc += total * scales[plane // EACH][:, None]
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
    biases, gains = operands_before(bias, gain, rn, n, BIAS, ACT, ADD)
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
        first = tl.program_id(1) * UNIT + CHUNK * (plane // 2 if KIND == "int8" else plane)
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
    x, out, scales, static, k, width, GROUP: tl.constexpr, BLOCK: tl.constexpr, STATIC: tl.constexpr, ACT: tl.constexpr
):  # fmt: skip
    """x [T, k] to float8 out [T, width], in the order of the weights' bytes, and float32 scales.

    With ACT x is [T, 2 k], and what is quantized ACT(first half) * second half.

    scales [T]: a row's largest magnitude is 448 of them; or, with GROUP, [T, width / GROUP]: each group's. STATIC:
    `static` float32 [] is the scale. One program a row, or, with GROUP, a row's BLOCK inputs of whole groups.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    at = x + row * (k if ACT == "" else 2 * k) + column
    value = tl.load(at, column < k, other=0.0).to(tl.float32)
    if ACT != "":
        value = rounded(activate(value, ACT) * tl.load(at + k, column < k, other=0.0).to(tl.float32), x)
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
