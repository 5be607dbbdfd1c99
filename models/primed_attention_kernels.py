"""The kernel of primed_attention.py: decode attention over keys and values that came before the queries.

As Triton knows no buffers and barriers of one's own it is in Gluon (see primed_kernels.py). Keys are the left operand
of the tensor cores, so that a group's few queries fill the right one: scores are [keys, heads].
Invariant: results are those of attention_kernels.decode, up to rounding. What is outside of a sequence is loaded as
zeros, or replaced by them: a stale NaN times a weight of zero would be a NaN.
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

from .primed_kernels import barriers, load_block, reinterpreted

BEYOND = gl.constexpr(1 << 30)
"""A slot that no cache has: what a block loads from there is zero."""


@gluon.jit
def _fetch(
    blocks, table, first, newest, head, k_bar, v_bar, k, v,
    K: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Ask for the keys and values of the pages from entry `first` of the table on, [CHUNK, D] each.

    A page's keys and values one after the other: they lie next to each other in memory.
    """
    COUNT: gl.constexpr = CHUNK // PAGE
    LAYOUT: gl.constexpr = blocks.layout
    places = ()
    for p in gl.static_range(COUNT):  # all loads are under way at once
        there = (first + p) * PAGE <= newest
        page = gl.load(table + first + p, there, other=0)
        places = places + (gl.where(there, page * PAGE, BEYOND),)  # type: ignore[assignment]  # noqa: RUF005
    k_pages = reinterpreted(k, [COUNT, PAGE, D], LAYOUT)
    v_pages = reinterpreted(v, [COUNT, PAGE, D], LAYOUT)
    mbarrier.expect(k_bar, CHUNK * D * 2)
    mbarrier.expect(v_bar, CHUNK * D * 2)
    for p in gl.static_range(COUNT):
        load_block(blocks, [places[p], head * D], k_bar, k_pages.index(p))
        load_block(blocks, [places[p], (K + head) * D], v_bar, v_pages.index(p))


@gluon.jit
def _end(buffer, page, row, newest, new, PAGE: gl.constexpr, D: gl.constexpr, CHUNK: gl.constexpr, L: gl.constexpr):
    """Put the newest row, which a block may have read too early, in its place, and zeros behind it on its page."""
    LAYOUT: gl.constexpr = buffer.layout
    target = reinterpreted(buffer, [CHUNK // PAGE, PAGE, D], LAYOUT).index(page)
    target.store(gl.where(row < newest % PAGE, target.load(L), new))


@gluon.jit
def attend_kernel(
    q, cache, blocks, tables, rows, lengths, out, scale, q_stride, width,
    K: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, CHUNK: gl.constexpr,
    BUFFERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program (KV head, row): the group's G queries, padded to GP, over all keys, CHUNK at a time; softmax online.

    blocks: a descriptor of the cache [slots, 2 * K * D], blocks [PAGE, D]. The rest is as in attention_kernels.decode.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head, b = gl.program_id(0), gl.program_id(1)
    T: gl.constexpr = q.dtype.element_ty
    length = gl.load(lengths + b)
    row = gl.load(rows + b).to(gl.int32)
    table = tables + row.to(gl.int64) * width
    newest = length - 1
    steps = gl.cdiv(length, CHUNK)
    COUNT: gl.constexpr = CHUNK // PAGE
    KV: gl.constexpr = blocks.layout
    ks = gl.allocate_shared_memory(T, [BUFFERS, CHUNK, D], KV)
    vs = gl.allocate_shared_memory(T, [BUFFERS, CHUNK, D], KV)
    queries = gl.allocate_shared_memory(T, [GP, D], KV)
    weights = gl.allocate_shared_memory(T, [GP, CHUNK], gl.NVMMASharedLayout.get_default_for([GP, CHUNK], T))
    k_bars = barriers(BUFFERS)
    v_bars = barriers(BUFFERS)
    fence_async_shared()
    for i in gl.static_range(BUFFERS):
        if i < steps:
            k_bar, v_bar = k_bars.index(i), v_bars.index(i)
            _fetch(blocks, table, i * COUNT, newest, head, k_bar, v_bar, ks.index(i), vs.index(i), K, D, PAGE, CHUNK)

    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    place = gl.arange(0, PAGE, gl.SliceLayout(1, L))[:, None]
    d = gl.arange(0, D, gl.SliceLayout(0, L))[None, :]
    g = gl.arange(0, GP, gl.SliceLayout(1, L))[:, None]
    page = gl.load(table + newest // PAGE).to(gl.int64)
    new = cache + (page * PAGE + newest % PAGE) * (2 * K * D) + head * D + d + place * 0
    is_new = (place == newest % PAGE) & (d < D)
    if PDL:
        tl.extra.cuda.gdc_wait()
    query = gl.load(q + b.to(gl.int64) * q_stride + (head * G + g) * D + d, (g < G) & (d < D), other=0.0)
    new_k = gl.load(new, is_new, other=0.0)
    new_v = gl.load(new + K * D, is_new, other=0.0)
    queries.store(query)
    fence_async_shared()

    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, GP, 16])
    key = gl.arange(0, CHUNK, gl.SliceLayout(1, ACC))
    m = gl.full([GP], -float("inf"), gl.float32, gl.SliceLayout(0, ACC))
    totals = gl.zeros([CHUNK, GP], gl.float32, ACC)  # added up at the end
    acc = gl.zeros([D, GP], gl.float32, ACC)
    scale *= 1.4426950408889634
    for i in range(steps):
        at = i % BUFFERS
        k, v = ks.index(at), vs.index(at)
        is_last = i == steps - 1
        mbarrier.wait(k_bars.index(at), (i // BUFFERS) & 1)
        if is_last:
            _end(k, newest // PAGE - i * COUNT, place, newest, new_k, PAGE, D, CHUNK, L)
            fence_async_shared()
        s = gl.zeros([CHUNK, GP], gl.float32, ACC)
        s = warpgroup_mma(k, queries.permute((1, 0)), s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        s = gl.where((i * CHUNK + key <= newest)[:, None], s * scale, -float("inf"))
        top = gl.maximum(m, gl.max(s, 0))
        shrink = gl.exp2(m - top)
        p = gl.exp2(s - top[None, :])
        totals = totals * shrink[None, :] + p
        acc = acc * shrink[None, :]
        m = top
        weights.store(p.to(T).permute((1, 0)))
        mbarrier.wait(v_bars.index(at), (i // BUFFERS) & 1)
        if is_last:
            _end(v, newest // PAGE - i * COUNT, place, newest, new_v, PAGE, D, CHUNK, L)
        fence_async_shared()
        acc = warpgroup_mma(v.permute((1, 0)), weights.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if i + BUFFERS < steps:
            k_bar, v_bar = k_bars.index(at), v_bars.index(at)
            _fetch(blocks, table, (i + BUFFERS) * COUNT, newest, head, k_bar, v_bar, k, v, K, D, PAGE, CHUNK)
    result = acc / gl.sum(totals, 0)[None, :]
    d = gl.arange(0, D, gl.SliceLayout(1, ACC))[:, None]
    g = gl.arange(0, GP, gl.SliceLayout(0, ACC))[None, :]
    gl.store(out + (b.to(gl.int64) * K + head) * (G * D) + g * D + d, result.to(out.dtype.element_ty), g < G)
