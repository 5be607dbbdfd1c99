"""The Triton kernels between the GEMMs of a layer, one launch each. They compute in float32 and round once, at the end.

Used by triton_ops.py. With PDL (programmatic dependent launch) a kernel is launched while its predecessor still runs,
so it touches only parameters until it has waited.
Invariants: every program of a kernel launched with PDL waits, so "my predecessor is complete" means that all before it
are. A step begins with kernels that are launched without, so what earlier steps left is complete for all that follow.
"""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation function ACT of float32 x."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACT == "gelu_tanh")
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 0.5 (1 + tanh z) = sigmoid(2 z)


@triton.jit
def rotation_kernel(
    positions, frequencies, out, count, half, factor, rows_from, columns_from, BLOCK: tl.constexpr, AXES: tl.constexpr
):  # fmt: skip
    """Write out float32 [T, 2, half]: cosines, then sines, of position * frequency; `count` is T * half.

    With AXES positions are [3, T]: pairs before `rows_from` turn by the first, from `columns_from` on by the last.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    token, pair = i // half, i % half
    place = token
    if AXES:
        axis = (pair >= rows_from).to(tl.int32) + (pair >= columns_from).to(tl.int32)
        place += axis * (count // half)
    position = tl.load(positions + place, live, other=0).to(tl.float32)
    angle = position * tl.load(frequencies + pair, live, other=0.0)
    at = token.to(tl.int64) * 2 * half + pair
    tl.store(out + at, tl.cos(angle) * factor, live)
    tl.store(out + at + half, tl.sin(angle) * factor, live)


@triton.jit
def norm_kernel(
    delta, residual, weight, out, new_residual, part, width, scale, eps,
    ADD: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = rms_norm(r) * weight with r = residual (+ scale * delta, stored if ADD); one program a row [width].

    With PARTS > 1 delta is the sum of as many float32 tensors, `part` numbers apart, rounded to the residual's dtype.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    live = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    gain = tl.load(weight + column, live, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(residual + at, live, other=0.0)
    if ADD:
        y = tl.load(delta + at, live, other=0.0).to(tl.float32)
        for i in tl.static_range(1, PARTS):
            y += tl.load(delta + i * part + at, live, other=0.0)
        if PARTS > 1:
            y = y.to(x.dtype).to(tl.float32)
        added = x.to(tl.float32) + scale * y
        x = added.to(x.dtype)
        tl.store(new_residual + at, x, live)
    x = x.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / width + eps) * gain
    tl.store(out + at, y.to(out.dtype.element_ty), live)


@triton.jit
def _store_heads(
    x, column, live, qkv_at, kv_at, heads, query, KV_LIMIT: tl.constexpr, WRITE_QUERIES: tl.constexpr
):  # fmt: skip
    """Store x [HEADS, columns]: query heads in place, the others to the cache row."""
    if WRITE_QUERIES:
        tl.store(qkv_at[:, None] + column[None, :], x.to(qkv_at.dtype.element_ty), live & query[:, None])
    if KV_LIMIT:
        limit = tl.full([], KV_LIMIT, tl.float32)
        x = tl.clamp(x, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    tl.store(kv_at[:, None] + column[None, :], x.to(kv_at.dtype.element_ty), live & ~query[:, None])


@triton.jit
def rope_kernel(
    qkv, gains, table, slots, kv, qkv_stride, kv_stride, heads, kv_heads, eps,
    D: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
    BLOCKS: tl.constexpr, SKIP_QUERIES: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    ROTATE: tl.constexpr, KV_LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """QK-norm and rotate qkv [T, H + 2K, D]: queries in place, keys and values to kv [slots, 2, K, D].

    One program does HEADS heads of a token. DIM leading elements of a head make pairs (HALF and REST: DIM / 2 and
    D - DIM rounded up to powers of two, REST 0 for none). table float32 [T, 2, DIM / 2]. KV_LIMIT: saturate there.
    A pair is loaded and stored by the same thread, so doing it in place is safe.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    token = (program // BLOCKS).to(tl.int64)
    head = (program % BLOCKS) * HEADS + tl.arange(0, HEADS)
    if SKIP_QUERIES:
        head += heads
    exists = head < heads + 2 * kv_heads
    query, value = head < heads, head >= heads + kv_heads
    slot = tl.load(slots + token).to(tl.int64)
    qkv_at = qkv + token * qkv_stride + head * D
    kv_at = kv + slot * kv_stride + (head - heads) * D

    pair = tl.arange(0, HALF)
    both = tl.arange(0, 2 * HALF)
    pair_live = exists[:, None] & (pair < DIM // 2)[None, :]
    both_live = exists[:, None] & (both < DIM)[None, :]
    if INTERLEAVED:
        x = tl.load(qkv_at[:, None] + both[None, :], both_live, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (HEADS, HALF, 2)))
    else:
        first = tl.load(qkv_at[:, None] + pair[None, :], pair_live, other=0.0).to(tl.float32)
        second = tl.load(qkv_at[:, None] + DIM // 2 + pair[None, :], pair_live, other=0.0).to(tl.float32)
    if REST:
        column = tl.arange(0, REST)
        rest_live = exists[:, None] & (column < D - DIM)[None, :]
        rest = tl.load(qkv_at[:, None] + DIM + column[None, :], rest_live, other=0.0).to(tl.float32)

    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST:
            squares += tl.sum(rest * rest, 1)
        factor = tl.where(value, 1.0, tl.rsqrt(squares / D + eps))[:, None]
        gain_at = gains + head[:, None] * D  # [H + K, D]: the values have no gain
        normed = ~value[:, None]
        if INTERLEAVED:
            gain = tl.load(gain_at + both[None, :], both_live & normed, other=1.0).to(tl.float32)
            first_gain, second_gain = tl.split(tl.reshape(gain, (HEADS, HALF, 2)))
        else:
            first_gain = tl.load(gain_at + pair[None, :], pair_live & normed, other=1.0).to(tl.float32)
            second_gain = tl.load(gain_at + DIM // 2 + pair[None, :], pair_live & normed, other=1.0).to(tl.float32)
        first, second = first * factor * first_gain, second * factor * second_gain
        if REST:
            rest *= factor * tl.load(gain_at + DIM + column[None, :], rest_live & normed, other=1.0).to(tl.float32)
    if ROTATE:
        at = table + token * DIM + pair
        cos = tl.load(at, pair < DIM // 2, other=1.0)[None, :]
        sin = tl.load(at + DIM // 2, pair < DIM // 2, other=0.0)[None, :]
        still = value[:, None]
        rotated = tl.where(still, first, first * cos - second * sin)
        second = tl.where(still, second, second * cos + first * sin)
        first = rotated

    if INTERLEAVED:
        x = tl.reshape(tl.join(first, second), (HEADS, 2 * HALF))
        _store_heads(x, both, both_live, qkv_at, kv_at, heads, query, KV_LIMIT, not SKIP_QUERIES)
    else:
        _store_heads(first, pair, pair_live, qkv_at, kv_at, heads, query, KV_LIMIT, not SKIP_QUERIES)
        other = DIM // 2 + pair
        _store_heads(second, other, pair_live, qkv_at, kv_at, heads, query, KV_LIMIT, not SKIP_QUERIES)
    if REST:
        _store_heads(rest, DIM + column, rest_live, qkv_at, kv_at, heads, query, KV_LIMIT, NORM)


@triton.jit
def act_mul_kernel(gate_up, out, width, ACT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out [T, width] = ACT(gate) * up of gate_up [T, 2 * width]; one program a block of a row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    blocks = tl.cdiv(width, BLOCK)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = column < width
    at = gate_up + row * 2 * width + column
    gate = tl.load(at, live, other=0.0).to(tl.float32)
    up = tl.load(at + width, live, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (activate(gate, ACT) * up).to(out.dtype.element_ty), live)


@triton.jit
def split_kernel(x, parts, count, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """parts int16 [PARTS, count]: the bits of bfloat16 numbers whose sum is x float32 [count], the largest first.

    Cut off, not rounded: what is left has as many bits less, and large numbers do not become infinite.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    rest = tl.load(x + at, live, other=0.0)
    for _ in tl.static_range(PARTS):
        bits = rest.to(tl.int32, bitcast=True) >> 16
        tl.store(parts + at, bits.to(tl.int16), live)
        rest -= (bits << 16).to(tl.float32, bitcast=True)
        parts += count


@triton.jit
def join_kernel(sums, bias, out, count, width, BIAS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """out [count], rows of `width` numbers: the sum of sums [PARTS, count], the smallest, which is the last, first, and
    bias [width]; all float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(sums + (PARTS - 1 - part) * count + at, live, other=0.0)
    if BIAS:
        total += tl.load(bias + at % width, live, other=0.0)
    tl.store(out + at, total, live)
