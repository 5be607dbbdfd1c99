"""The kernel of primed_attention.py: decode attention over keys and values that came before they are asked for.

As Triton knows no buffers and barriers of one's own it is in Gluon (see primed_kernels.py). A warp of its own asks for
keys and values, page by page, the others compute. Keys are the left operand of the tensor cores, so that a group's few
queries fill the right one: scores are [keys, heads]. Nothing passes through registers on its way, which takes a tenth
less energy than attention_kernels.decode.
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

from .primed_kernels import all_threads, barriers, load_block, reinterpreted

BEYOND = gl.constexpr(1 << 30)
"""A slot that no cache has: what a block loads from there is zero."""
W = gl.constexpr(64)
"""Numbers of a head, or of half of one: as wide as a block can be, whose lines the tensor cores read."""


@gluon.jit
def _places(table, first, newest, PAGE: gl.constexpr, COUNT: gl.constexpr):
    """Where the pages from entry `first` of the table on begin, in slots; BEYOND those that the sequence has."""
    places = ()
    for p in gl.static_range(COUNT):  # all loads are under way at once
        there = (first + p) * PAGE <= newest
        page = gl.load(table + first + p, there, other=0)
        places = places + (gl.where(there, page * PAGE, BEYOND),)  # type: ignore[assignment]  # noqa: RUF005
    return places


@gluon.jit
def _ask(blocks, places, head, bars, buffers, at, PARTS: gl.constexpr, PAGE: gl.constexpr, CHUNK: gl.constexpr):
    """Ask for a head of the rows of these pages, keys or values, for buffer `at`, PARTS times [CHUNK, W]."""
    COUNT: gl.constexpr = CHUNK // PAGE
    LAYOUT: gl.constexpr = blocks.layout
    bar = bars.index(at)
    mbarrier.expect(bar, CHUNK * PARTS * W * 2)
    for p in gl.static_range(COUNT):
        for h in gl.static_range(PARTS):
            target = reinterpreted(buffers.index(at * PARTS + h), [COUNT, PAGE, W], LAYOUT).index(p)
            load_block(blocks, [places[p], (head * PARTS + h) * W], bar, target)


@gluon.jit
def _parts(x, live, cos, sin, PARTS: gl.constexpr, ROTATE: gl.constexpr):
    """The parts of a head at x, W numbers each; with ROTATE rotated, pairs are one of each of its two parts."""
    if ROTATE:
        one = gl.load(x, live, other=0.0).to(gl.float32)
        two = gl.load(x + W, live, other=0.0).to(gl.float32)
        return (one * cos - two * sin, two * cos + one * sin)
    else:
        parts = ()
        for h in gl.static_range(PARTS):
            parts = parts + (gl.load(x + h * W, live, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        return parts


@gluon.jit
def _end(buffer, page, row, newest, new, PAGE: gl.constexpr, CHUNK: gl.constexpr, L: gl.constexpr):
    """Put the newest row, which a block may have read too early, in its place, and zeros behind it on its page."""
    LAYOUT: gl.constexpr = buffer.layout
    target = reinterpreted(buffer, [CHUNK // PAGE, PAGE, W], LAYOUT).index(page)
    target.store(gl.where(row < newest % PAGE, target.load(L), new.to(buffer.dtype)))


@gluon.jit
def _keys_of(n, tables, rows, lengths, width, K: gl.constexpr):
    """(its entries of the tables, the place of its newest key) of a problem's row."""
    row = gl.load(rows + n // K).to(gl.int64)
    return tables + row * width, gl.load(lengths + n // K) - 1


@gluon.jit
def _draw(counter, programs, problems, full, empty, ids, turn):
    """The loading warp's next problem, of which it tells the others; the last one to draw sets the counter to zero."""
    drawn = gl.atomic_add(counter, 1, sem="relaxed", scope="gpu")
    if drawn == problems - 1:
        gl.store(counter, 0)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(empty.index(turn % 2), (turn // 2 + 1) & 1)
    ids.index(turn % 2).store(gl.zeros([32], gl.int32, LINE) + (drawn + programs))
    all_threads()
    mbarrier.arrive(full.index(turn % 2), count=1)
    return drawn + programs


@gluon.jit
def _drawn(full, empty, ids, turn):
    """What the loading warp has drawn."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(full.index(turn % 2), (turn // 2) & 1)
    n = gl.max(ids.index(turn % 2).load(LINE), 0)
    all_threads()
    mbarrier.arrive(empty.index(turn % 2), count=1)
    return n


@gluon.jit
def _load_problems(
    blocks, sequences, draws, buffers,
    K: gl.constexpr, PARTS: gl.constexpr, PAGE: gl.constexpr, CHUNK: gl.constexpr, BUFFERS: gl.constexpr,
    LOOP: gl.constexpr,
):  # fmt: skip
    """The warp that loads: each chunk when what was in its buffers has been read, of one problem after another."""
    tables, rows, lengths, width = sequences
    counter, programs, problems, full, empty, ids = draws
    ks, vs, k_full, v_full, k_empty, v_empty = buffers
    COUNT: gl.constexpr = CHUNK // PAGE
    n = gl.program_id(0)
    turn, before = 0, 0
    while n < problems:
        head = n % K
        table, newest = _keys_of(n, tables, rows, lengths, width, K)
        n = _draw(counter, programs, problems, full, empty, ids, turn) if LOOP else n + problems
        steps = newest // CHUNK + 1
        for i in range(steps):
            at, phase = (before + i) % BUFFERS, ((before + i) // BUFFERS + 1) & 1
            places = _places(table, i * COUNT, newest, PAGE, COUNT)
            mbarrier.wait(k_empty.index(at), phase)
            _ask(blocks, places, head, k_full, ks, at, PARTS, PAGE, CHUNK)
            mbarrier.wait(v_empty.index(at), phase)
            _ask(blocks, places, K + head, v_full, vs, at, PARTS, PAGE, CHUNK)
        turn = turn + 1
        before = before + steps


@gluon.jit
def _begin(
    n, table, newest, heads, queries, place, d, g,
    K: gl.constexpr, G: gl.constexpr, PARTS: gl.constexpr, PDL: gl.constexpr, ROTATE: gl.constexpr,
):  # fmt: skip
    """Put a problem's queries into shared memory; (its newest key, its newest value), in parts [PAGE, W] of zeros but
    for their place on the page. ROTATE: written to the cache, too."""
    q, q_stride, cache, turns, slots = heads
    T: gl.constexpr = cache.dtype.element_ty
    D: gl.constexpr = PARTS * W
    PAGE: gl.constexpr = place.shape[0]
    head, b = n % K, n // K
    own = q + b.to(gl.int64) * q_stride
    is_new = (place == newest % PAGE) & (d < W)
    cos, sin = None, None
    if ROTATE:  # not where the table says: what a row that is done computes goes to a slot of no sequence
        slot = gl.load(slots + b).to(gl.int64)
        cos = gl.load(turns + b * D + d)
        sin = gl.load(turns + b * D + W + d)
    else:
        slot = gl.load(table + newest // PAGE).to(gl.int64) * PAGE + newest % PAGE
    new = cache + slot * (2 * K * D) + head * D + d + place * 0
    if PDL:
        tl.extra.cuda.gdc_wait()
    query = _parts(own + (head * G + g) * D + d, (g < G) & (d < W), cos, sin, PARTS, ROTATE)
    if ROTATE:
        at_key = own + (K * G + head) * D + d + place * 0
        new_k = _parts(at_key, is_new, cos, sin, PARTS, True)
        new_v = _parts(at_key + K * D, is_new, cos, sin, PARTS, False)
        for h in gl.static_range(PARTS):
            gl.store(new + h * W, new_k[h].to(T), is_new)
            gl.store(new + K * D + h * W, new_v[h].to(T), is_new)
    else:
        new_k = _parts(new, is_new, cos, sin, PARTS, False)
        new_v = _parts(new + K * D, is_new, cos, sin, PARTS, False)
    for h in gl.static_range(PARTS):
        queries.index(h).store(query[h].to(T))
    fence_async_shared()
    return new_k, new_v


@gluon.jit
def _attend(
    n, before, table, newest, heads, buffers, queries, weights, out, scale,
    K: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, PARTS: gl.constexpr, PAGE: gl.constexpr, CHUNK: gl.constexpr,
    BUFFERS: gl.constexpr, PDL: gl.constexpr, ROTATE: gl.constexpr,
):  # fmt: skip
    """One problem, whose first chunk is the program's number `before`."""
    ks, vs, k_full, v_full, k_empty, v_empty = buffers
    T: gl.constexpr = out.dtype.element_ty
    D: gl.constexpr = PARTS * W
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    place = gl.arange(0, PAGE, gl.SliceLayout(1, L))[:, None]
    d = gl.arange(0, W, gl.SliceLayout(0, L))[None, :]
    g = gl.arange(0, GP, gl.SliceLayout(1, L))[:, None]
    new_k, new_v = _begin(n, table, newest, heads, queries, place, d, g, K, G, PARTS, PDL, ROTATE)

    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, GP, 16])
    key = gl.arange(0, CHUNK, gl.SliceLayout(1, ACC))
    m = gl.full([GP], -float("inf"), gl.float32, gl.SliceLayout(0, ACC))
    totals = gl.zeros([CHUNK, GP], gl.float32, ACC)  # added up at the end
    accs = ()
    for _h in gl.static_range(PARTS):
        accs = accs + (gl.zeros([W, GP], gl.float32, ACC),)  # type: ignore[assignment]  # noqa: RUF005
    steps = newest // CHUNK + 1
    for i in range(steps):
        at, phase = (before + i) % BUFFERS, ((before + i) // BUFFERS) & 1
        is_last = i == steps - 1
        page = newest // PAGE - i * (CHUNK // PAGE)
        mbarrier.wait(k_full.index(at), phase)
        if is_last:
            for h in gl.static_range(PARTS):
                _end(ks.index(at * PARTS + h), page, place, newest, new_k[h], PAGE, CHUNK, L)
            fence_async_shared()
        s = gl.zeros([CHUNK, GP], gl.float32, ACC)
        for h in gl.static_range(PARTS):
            k = ks.index(at * PARTS + h)
            s = warpgroup_mma(k, queries.index(h).permute((1, 0)), s, use_acc=h > 0, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        s = gl.where((i * CHUNK + key <= newest)[:, None], s * scale, -float("inf"))
        top = gl.maximum(m, gl.max(s, 0))
        shrink = gl.exp2(m - top)
        p = gl.exp2(s - top[None, :])
        totals = totals * shrink[None, :] + p
        m = top
        weights.store(p.to(T).permute((1, 0)))
        mbarrier.wait(v_full.index(at), phase)
        if is_last:
            for h in gl.static_range(PARTS):
                _end(vs.index(at * PARTS + h), page, place, newest, new_v[h], PAGE, CHUNK, L)
        fence_async_shared()
        all_threads()  # have read these keys, and the values before
        mbarrier.arrive(k_empty.index(at), count=1)
        if before + i > 0:
            mbarrier.arrive(v_empty.index((before + i - 1) % BUFFERS), count=1)
        products = ()
        for h in gl.static_range(PARTS):
            acc = accs[h] * shrink[None, :]
            v = vs.index(at * PARTS + h).permute((1, 0))
            acc = warpgroup_mma(v, weights.permute((1, 0)), acc, is_async=True)
            products = products + (acc,)  # type: ignore[assignment]  # noqa: RUF005
        done = warpgroup_mma_wait(0, deps=products)
        accs = (done,) if PARTS == 1 else done  # type: ignore[assignment]
    total = gl.sum(totals, 0)[None, :]
    d = gl.arange(0, W, gl.SliceLayout(1, ACC))[:, None]
    g = gl.arange(0, GP, gl.SliceLayout(0, ACC))[None, :]
    to = out + n.to(gl.int64) * (G * D) + g * D + d
    for h in gl.static_range(PARTS):
        gl.store(to + h * W, (accs[h] / total).to(out.dtype.element_ty), g < G)
    return before + steps


@gluon.jit
def _attend_problems(
    sequences, draws, heads, buffers, out, scale,
    K: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, PARTS: gl.constexpr, PAGE: gl.constexpr, CHUNK: gl.constexpr,
    BUFFERS: gl.constexpr, LOOP: gl.constexpr, PDL: gl.constexpr, ROTATE: gl.constexpr,
):  # fmt: skip
    """The warps that compute."""
    tables, rows, lengths, width = sequences
    _counter, _programs, problems, full, empty, ids = draws
    T: gl.constexpr = out.dtype.element_ty
    queries = gl.allocate_shared_memory(T, [PARTS, GP, W], buffers[0].layout)
    weights = gl.allocate_shared_memory(T, [GP, CHUNK], gl.NVMMASharedLayout.get_default_for([GP, CHUNK], T))
    n = gl.program_id(0)
    turn, before = 0, 0
    while n < problems:
        table, newest = _keys_of(n, tables, rows, lengths, width, K)
        before = _attend(
            n, before, table, newest, heads, buffers, queries, weights, out, scale * 1.4426950408889634, K, G, GP,
            PARTS, PAGE, CHUNK, BUFFERS, PDL, ROTATE,
        )  # fmt: skip
        n = _drawn(full, empty, ids, turn) if LOOP else n + problems
        turn = turn + 1


@gluon.jit(do_not_specialize=["problems", "programs"])
def attend_kernel(
    q, cache, blocks, tables, rows, lengths, out, turns, slots, counter, problems, programs, scale, q_stride, width,
    K: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, PARTS: gl.constexpr, PAGE: gl.constexpr, CHUNK: gl.constexpr,
    BUFFERS: gl.constexpr, LOOP: gl.constexpr, PDL: gl.constexpr, ROTATE: gl.constexpr,
):  # fmt: skip
    """Problem (row, KV head): the group's G queries, padded to GP, over all keys, CHUNK at a time; softmax online.

    LOOP: there are more problems than programs; who has done one draws another. The counter is zero before and after.
    A head has PARTS * W numbers. blocks: a descriptor of the cache [slots, 2 * K * D], blocks [PAGE, W]. The rest is as
    in attention_kernels.decode.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    T: gl.constexpr = cache.dtype.element_ty
    ks = gl.allocate_shared_memory(T, [BUFFERS * PARTS, CHUNK, W], blocks.layout)
    vs = gl.allocate_shared_memory(T, [BUFFERS * PARTS, CHUNK, W], blocks.layout)
    ids = gl.allocate_shared_memory(gl.int32, [2, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    buffers = (ks, vs, barriers(BUFFERS), barriers(BUFFERS), barriers(BUFFERS), barriers(BUFFERS))
    draws = (counter, programs, problems, barriers(2), barriers(2), ids)
    sequences = (tables, rows, lengths, width)
    heads = (q, q_stride, cache, turns, slots)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _attend_problems,
                (
                    sequences, draws, heads, buffers, out, scale, K, G, GP, PARTS, PAGE, CHUNK, BUFFERS, LOOP, PDL,
                    ROTATE,
                ),
            ),
            (_load_problems, (blocks, sequences, draws, buffers, K, PARTS, PAGE, CHUNK, BUFFERS, LOOP)),
        ],
        [1],
        [40],
    )  # fmt: skip
