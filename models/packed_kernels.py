"""The Triton GEMM of a decode step with quantized weights, and the kernels beside it for many rows.

Used by packed_gemm.py. As gemm_kernels.py: few rows, a weight that is read from memory once, the same epilogues. A
weight is int16 words [outputs, inputs * bits / 16]; a word holds values of inputs CHUNK apart, in chunks of as many
words, so that the words of a tile, shifted, are tiles of values, and each meets a tile of x that is contiguous. With
chunks of 32, 4 bits: four values, of inputs c, c + 32, c + 64 and c + 96; 8 bits: two, of inputs c and c + 32.
A value becomes a 16-bit float without a conversion (Kim et al. 2022, "Who Says Elephants Can't Run"): its bits are the
mantissa's end of a power of two, of which that power and the zero point are subtracted. Exact, as whole numbers are;
scales are applied to the sums, in float32. Eight bits go as two times four, float8 is moved to its place.
Invariant: results are a function of the row, the weight and the tile; `arrived` is all zeros between launches.
"""

import triton
import triton.language as tl

from .fetch_kernels import ask_lines
from .gemm_epilogues import stacked_rows
from .gemm_kernels import conclude_stacked, operands_before, work_of


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


def _asm_of(kind: str, bf16: bool, plane: int) -> str:
    """PTX that makes one plane of two words, as `halves` does: output $0, the words $1, then int4's zeros $2."""
    both = lambda bits: f"0x{bits:04X}{bits:04X}"  # noqa: E731
    magic, sub = (0x4300, "sub.rn.bf16x2") if bf16 else (0x6400, "sub.rn.f16x2")
    if kind == "fp8":
        up, mask = (4, 0x07F0) if bf16 else (7, 0x3F80)
        signs = "mov.b32 s, $1;" if plane else "shl.b32 s, $1, 8;"
        rest = f"shr.u32 t, $1, {8 - up};" if plane else f"shl.b32 t, $1, {up};"
        lines = [signs, f"and.b32 s, s, {both(0x8000)};", rest, f"lop3.b32 $0, t, {both(mask)}, s, 0xEA;"]
    elif kind == "int4":
        lines = [f"shr.u32 t, $1, {4 * plane};", f"lop3.b32 t, t, {both(15)}, {both(magic)}, 0xEA;"]
        lines += [f"{sub} $0, t, $2;"]
    else:
        least = 128 if bf16 else 1024
        high, less, mask, back = (0x4380, 0x43C0, 0x78, 3) if bf16 else (0x6400, 0x6480, 0xF0, 4)
        if plane % 2 == 0:
            high, less, mask, back = magic, {128: 0x4300, 1024: 0x6400}[least], 15, 0
        lines = [f"shr.u32 t, $1, {4 * plane - back};", f"lop3.b32 t, t, {both(mask)}, {both(high)}, 0xEA;"]
        lines += [f"mov.b32 s, {both(less)};", f"{sub} $0, t, s;"]
    return "{\n" + "\n".join([".reg .b32 s, t;", *lines]) + "\n}"


INT4_BF16 = tl.constexpr(tuple(_asm_of("int4", True, plane) for plane in range(4)))
INT4_FP16 = tl.constexpr(tuple(_asm_of("int4", False, plane) for plane in range(4)))
INT8_BF16 = tl.constexpr(tuple(_asm_of("int8", True, plane) for plane in range(4)))
INT8_FP16 = tl.constexpr(tuple(_asm_of("int8", False, plane) for plane in range(4)))
FP8_BF16 = tl.constexpr(tuple(_asm_of("fp8", True, plane) for plane in range(2)))
FP8_FP16 = tl.constexpr(tuple(_asm_of("fp8", False, plane) for plane in range(2)))


@triton.jit
def plane_of(words, zero, PLANE: tl.constexpr, KIND: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """A plane of words, see `halves`. ASM: two words at a time."""
    if not ASM:
        return halves(words, zero, PLANE, KIND, BF16)
    elif KIND == "int4":
        zeros = tl.broadcast_to(zero, words.shape)
        if BF16:
            return tl.inline_asm_elementwise(
                INT4_BF16[PLANE], "=r,r,r", [words, zeros], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                INT4_FP16[PLANE], "=r,r,r", [words, zeros], dtype=tl.float16, is_pure=True, pack=2
            )
    elif BF16:
        ASM_BF16: tl.constexpr = INT8_BF16 if KIND == "int8" else FP8_BF16
        return tl.inline_asm_elementwise(ASM_BF16[PLANE], "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        ASM_FP16: tl.constexpr = INT8_FP16 if KIND == "int8" else FP8_FP16
        return tl.inline_asm_elementwise(ASM_FP16[PLANE], "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def scale_and_zero(meta, KIND: tl.constexpr, BF16: tl.constexpr):
    """(float32 scale, zero point as `halves` wants it) of what a group's outputs have: float32; or, with int4, a
    float16 scale and above it the bits of that zero point."""
    FLOAT: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    if KIND == "int4":
        scale = meta.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return scale, (meta >> 16).to(tl.int16).to(FLOAT, bitcast=True)
    else:
        return meta, 0.0


@triton.jit
def _place(rn, width, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Where the first chunks of outputs rn lie: those of ROWS outputs lie together, then come their next chunks."""
    return (rn // ROWS).to(tl.int64) * (ROWS * width) + rn % ROWS * CHUNK


@triton.jit
def _prefetch(
    w, rn, width, begin, end, AHEAD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Ask the L2 for the words of the first AHEAD steps, a power of two, while the predecessor ends."""
    step = tl.minimum(begin + tl.arange(0, AHEAD), end - 1)
    at = w + _place(rn, width, CHUNK, ROWS)[:, None] + (step * (ROWS * BK))[None, :]
    ask_lines(at)


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
def _quotient(a, b, ASM: tl.constexpr):
    """a / b of float32 in a few units of the last place."""
    if ASM:
        return tl.inline_asm_elementwise(
            "div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a / b


@triton.jit
def _scale_and_zeros(meta, KIND: tl.constexpr, BF16: tl.constexpr):
    """As `scale_and_zero`, the zeros as a tile that broadcasts."""
    scale, zero = scale_and_zero(meta, KIND, BF16)
    return scale, tl.expand_dims(zero, -1)


@triton.jit
def _accumulate(
    words, metas, xs, acc, unit, KIND: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr, GROUPS: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] + the product of a tile of words [BN, BK] and tiles of x [BM, BK], one for each value of a word.

    All of them may have slices before that, [SLICES, BN, BM] and so on. metas: of each group in the tile, GROUPS (1, 2
    or 4). SCALED: few rows are multiplied with a group's scales when it has been summed up; of more, for which there
    are no registers twice, acc is in units of [BN], and changes to those of each group, its scales, so that the tensor
    cores add to it. Returned with the last units.
    """
    PLANES: tl.constexpr = 2 if KIND == "fp8" else 4
    EACH: tl.constexpr = PLANES // GROUPS  # planes of a group
    FLOAT: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    lift: tl.constexpr = 2.0**120 if BF16 else 2.0**8
    zeros = (0.0, 0.0, 0.0, 0.0)
    scales = metas
    if KIND == "int4":
        s0, z0 = _scale_and_zeros(metas[0], KIND, BF16)
        scales, zeros = (s0,), (z0, z0, z0, z0)
        if GROUPS > 1:
            s1, z1 = _scale_and_zeros(metas[1], KIND, BF16)
            scales, zeros = (s0, s1), (z0, z0, z1, z1)
        if GROUPS > 2:
            s2, z2 = _scale_and_zeros(metas[2], KIND, BF16)
            s3, z3 = _scale_and_zeros(metas[3], KIND, BF16)
            scales, zeros = (s0, s1, s2, s3), (z0, z1, z2, z3)
    APART: tl.constexpr = SCALED and xs[0].shape[-2] <= 16
    total = acc
    for plane in tl.static_range(PLANES):
        q = plane_of(words, zeros[plane], plane, KIND, BF16, ASM)
        if KIND == "fp8":
            q = q * tl.full([], lift, FLOAT)
        if SCALED and plane // EACH * EACH == plane:
            if APART:
                total = tl.zeros_like(acc)
            else:
                total *= tl.expand_dims(_quotient(unit, scales[plane // EACH], ASM), -1)
                unit = scales[plane // EACH]
        total = tl.dot(q, tl.trans(xs[plane // (2 if KIND == "int8" else 1)]), total, input_precision="ieee")
        if APART and (plane + 1) // EACH * EACH == plane + 1:
            acc += total * tl.expand_dims(scales[plane // EACH], -1)
    if not APART:
        acc = total
    return acc, unit


@triton.jit
def _multiply(
    x, w, meta, outputs, rm, rows, stride, k, width, begin, end,
    KIND: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BF16: tl.constexpr,
    ASM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """float32 [outputs, rm]: steps begin to end of the products; a group's meta lies `stride` behind that before."""
    UNIT: tl.constexpr = CHUNK * (4 if KIND == "int4" else 2)  # inputs of a chunk
    STEP: tl.constexpr = BK // CHUNK * UNIT  # inputs of a step
    GROUPS: tl.constexpr = STEP // GROUP if GROUP > 0 and GROUP < STEP else 1
    column = tl.arange(0, BK)
    inputs = begin * STEP + column // CHUNK * UNIT + column % CHUNK
    row_live = (rm < rows)[:, None]
    w_at = w + _place(outputs, width, CHUNK, ROWS)[:, None] + ROWS * begin * BK
    w_at += (column // CHUNK * ROWS * CHUNK + column % CHUNK)[None, :]
    x_at = x + rm.to(tl.int64)[:, None] * k + inputs[None, :]
    metas = _metas(meta + outputs, stride, GROUPS)
    if PDL:
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros((outputs.shape[0], rm.shape[0]), tl.float32)
    unit = tl.full((outputs.shape[0],), 1.0, tl.float32)
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
        if GROUP > 0:
            metas = _metas(meta + step * STEP // GROUP * stride + outputs, stride, GROUPS)
        acc, unit = _accumulate(words, metas, xs, acc, unit, KIND, BF16, ASM, GROUPS, GROUP > 0)
        w_at += ROWS * BK
        x_at += STEP
    if GROUP == 0:
        unit = scale_and_zero(metas[0], KIND, BF16)[0]
    return acc * unit[:, None]


@triton.jit
def _fragments(tile):
    """The columns of a tile [SLICES, R, 32] as operands of tensor cores have them whose threads hold eight neighbours.

    Lane 4 g + t of a warp has columns 2 t and 2 t + 1 of row g, and those 8, 16 and 24 further on. A product is a sum
    over all columns, so both operands may have them in any order: in this one what a thread loads is what it needs.
    """
    S: tl.constexpr = tile.shape[0]
    R: tl.constexpr = tile.shape[1]
    return tl.reshape(tl.permute(tl.reshape(tile, (S, R, 4, 4, 2)), (0, 1, 3, 2, 4)), (S, R, 32))


@triton.jit
def _wait():
    """tl.extra.cuda.gdc_wait, of which Triton 3.9 knows that nothing is to be loaded before it, not even words."""
    tl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _slice_xs(at, live, rows, CHUNK: tl.constexpr, KIND: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr):
    """Tiles of x [SLICES, BM, 32] from pointers [SLICES * BM, 32], one for each value of a word.

    PDL: in a branch, always taken, out of which the compiler's pipeline moves no load: so none comes before the wait.
    """
    x0 = tl.zeros(at.shape, at.dtype.element_ty)
    x1 = x0
    x2 = x0
    x3 = x0
    if PDL:
        if rows > 0:
            x0, x1 = tl.load(at, live, other=0.0), tl.load(at + CHUNK, live, other=0.0)
            if KIND == "int4":
                x2, x3 = tl.load(at + 2 * CHUNK, live, other=0.0), tl.load(at + 3 * CHUNK, live, other=0.0)
    else:
        x0, x1 = tl.load(at, live, other=0.0), tl.load(at + CHUNK, live, other=0.0)
        if KIND == "int4":
            x2, x3 = tl.load(at + 2 * CHUNK, live, other=0.0), tl.load(at + 3 * CHUNK, live, other=0.0)
    BM: tl.constexpr = at.shape[0] // SLICES
    x0 = _fragments(tl.reshape(x0, (SLICES, BM, 32)))
    x1 = _fragments(tl.reshape(x1, (SLICES, BM, 32)))
    if KIND == "int4":
        x2 = _fragments(tl.reshape(x2, (SLICES, BM, 32)))
        x3 = _fragments(tl.reshape(x3, (SLICES, BM, 32)))
        return x0, x1, x2, x3
    else:
        return x0, x1


@triton.jit
def _multiply_sliced(
    x, w, meta, outputs, eights, rm, first_m, rows, stride, k, width, begin, end,
    KIND: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BF16: tl.constexpr,
    ASM: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_multiply`, even; each of SLICES warps multiplies its own share of the steps, and what they have is added up.

    eights: the outputs, eight of them again for each slice, then the next eight. Loaded as rows, whose order compilers
    agree on, so that neither words nor x go to another thread; so parts of a tile need no memory, and no program that
    waits for them. A step's chunks are in one group. The words of the first STAGES - 1 steps are on their way into
    shared memory before the predecessor ends: the loop begins before, and waits in its first step.
    """
    UNIT: tl.constexpr = CHUNK * (4 if KIND == "int4" else 2)
    CHUNKS: tl.constexpr = BK // CHUNK
    GROUPS: tl.constexpr = UNIT // GROUP if GROUP > 0 and GROUP < UNIT else 1
    FULL: tl.constexpr = outputs.shape[0]
    BM: tl.constexpr = rm.shape[0]
    share = tl.maximum(tl.cdiv(end - begin, SLICES), 1)
    first = begin + tl.arange(0, SLICES) * share
    own = begin + tl.arange(0, FULL * SLICES) // 8 % SLICES * share
    w_at = w + _place(eights, width, CHUNK, ROWS)[:, None] + own[:, None] * (ROWS * BK) + tl.arange(0, CHUNK)[None, :]
    w_steps = tl.minimum(share, end - own)
    row = first_m + tl.arange(0, SLICES * BM) % BM
    own = begin + tl.arange(0, SLICES * BM) // BM * share
    x_at = x + row.to(tl.int64)[:, None] * k + (own * (CHUNKS * UNIT))[:, None] + tl.arange(0, CHUNK)[None, :]
    x_steps = tl.where(row < rows, tl.minimum(share, end - own), 0)
    of_all = 1.0
    if GROUP == 0:
        of_all = tl.load(meta + outputs)

    acc = tl.zeros((SLICES, FULL, BM), tl.float32)
    unit = tl.full((SLICES, FULL), 1.0, tl.float32)
    for i in tl.range(0, share, num_stages=STAGES):
        if PDL:  # noqa: SIM102 (a constant, and a number on the device)
            if i == 0:
                _wait()
        for chunk in tl.static_range(CHUNKS):
            j = i * CHUNKS + chunk
            words = tl.load(w_at + j * CHUNK * ROWS, (i < w_steps)[:, None], other=0)
            words = tl.permute(tl.reshape(words, (FULL // 8, SLICES, 8, CHUNK)), (1, 0, 2, 3))
            words = tl.reshape(words, (SLICES, FULL, CHUNK))
            xs = _slice_xs(x_at + j * UNIT, (i < x_steps)[:, None], rows, CHUNK, KIND, SLICES, PDL)
            if GROUP > 0:
                group = tl.minimum((first * CHUNKS + j) * UNIT, k - UNIT) // GROUP
                metas = _metas(meta + group[:, None] * stride + outputs[None, :], stride, GROUPS)
            else:
                metas = (of_all[None, :],)  # type: ignore[index]
            acc, unit = _accumulate(_fragments(words), metas, xs, acc, unit, KIND, BF16, ASM, GROUPS, GROUP > 0)
    total = tl.sum(acc, 0)
    if GROUP == 0:
        total *= scale_and_zero(of_all, KIND, BF16)[0][:, None]
    return total


@triton.jit(do_not_specialize=["rows", "early", "square_parts"])
def packed_kernel(
    x, w, meta, bias, out, parts, arrived, rows, n, k, width, early,
    squares, square_parts, eps, residual, scale, gain, new_residual, new_squares,
    qk_gains, qk_eps, table, slots, kv, kv_stride, heads, kv_heads,
    KIND: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BF16: tl.constexpr,
    ASM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    BIAS: tl.constexpr, SQUARES: tl.constexpr, ACT: tl.constexpr, ADD: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, QK_NORM: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, KV_LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [rows, n] = x [rows, k] @ weight [n, k].T + bias; ACT, ADD, HEADS, SPLIT, BIAS, SQUARES as linear_kernel.

    w: words int16 [n (2 n with ACT), width] of KIND, in the order of `_place`; meta: float32, with int4 int32,
    [groups, n (2 n)], see `scale_and_zero`; GROUP: inputs of a group, 0 if there is one. BK words a step: with groups
    of fewer inputs CHUNK, else whole steps make a group. EVEN: BK divides width, and the words are all of x. ASM: on a
    GPU. AHEAD: see `_prefetch`; SLICES: see `_multiply_sliced`.
    """
    steps = tl.cdiv(width, BK)
    tile, part, begin, end, place, rn, rm = work_of(steps, rows, early, BM, BN, SPLIT, WHOLE, HEADS, D, PDL)
    tile_n = place[0]

    biases, gains = operands_before(bias, gain, rn, n, BIAS, ACT, ADD)
    # The tile's outputs of both halves lie under one another, so that a step's products are as few and large.
    FULL: tl.constexpr = 2 * BN if ACT != "" else BN
    safe_n = stacked_rows(tl.arange(0, FULL), tile_n, n, BN, D, ACT, HEADS)
    if PDL and AHEAD > 0:
        _prefetch(w, safe_n, width, begin, end, AHEAD, CHUNK, ROWS, BK)
    if SLICES > 1:
        index = tl.arange(0, FULL * SLICES)
        eights = stacked_rows(index // (8 * SLICES) * 8 + index % 8, tile_n, n, BN, D, ACT, HEADS)
        both = _multiply_sliced(
            x, w, meta, safe_n, eights, rm, place[1] * BM, rows, FULL // BN * n, k, width, begin, end, KIND, GROUP,
            CHUNK, ROWS, BF16, ASM, BK, SLICES, STAGES, PDL,
        )  # fmt: skip
    else:
        both = _multiply(
            x, w, meta, safe_n, rm, rows, FULL // BN * n, k, width, begin, end, KIND, GROUP, CHUNK, ROWS, BF16, ASM, BK,
            EVEN, STAGES, PDL,
        )  # fmt: skip
    conclude_stacked(
        both, biases, out, parts, arrived, rn, rm, rows, n, k, tile, part, tile_n,
        (squares, square_parts, eps), (residual, gains, scale, new_residual, new_squares),
        (table, slots, qk_gains, qk_eps, kv, kv_stride, heads, kv_heads),
        BM, BN, SPLIT, WHOLE, BIAS, SQUARES, ACT, ADD, HEADS, D, QK_NORM, ROTATE, INTERLEAVED, KV_LIMIT, PDL,
    )  # fmt: skip


# ---------------------------------------------------------------------- many rows


@triton.jit
def unpack_kernel(
    w, meta, out, n, k, width, KIND: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BF16: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [n, k] = the weight of words w [n, width] and meta [groups, n]. Grid (tiles of BN outputs, chunks)."""
    UNIT: tl.constexpr = CHUNK * (4 if KIND == "int4" else 2)
    PLANES: tl.constexpr = 2 if KIND == "fp8" else 4
    FLOAT: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    lift: tl.constexpr = 2.0**120 if BF16 else 2.0**8
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.arange(0, CHUNK)
    live = (rn < n)[:, None]
    at = w + _place(rn, width, CHUNK, ROWS)[:, None] + ROWS * CHUNK * tl.program_id(1) + column[None, :]
    words = tl.load(at, live, other=0)
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
