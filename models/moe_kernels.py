"""The Triton kernels of a mixture of experts for few tokens: the router, whose turn it is at each expert, two products.

Used by moe_gemm.py. At few tokens an expert's weights are everything and its rows nothing: a program streams some
outputs of one expert past all its rows, as gemm_kernels.py does, and takes what rows there are from the tokens where
they lie. Nothing is sorted and no size depends on the choice, so steps can be captured.
Legend: T tokens, E experts, k experts of a token; pair t * k + j is token t at its j-th expert.
Invariant: results are a function of the token, the weights and the tile; who else chose an expert changes nothing.
"""

import triton
import triton.language as tl

from .gemm_epilogues import rounded
from .layer_kernels import activate


@triton.jit
def route_kernel(
    x, router, bias, weights, ids, width, experts, top_k, scale, cap,
    E: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr,
    RENORM: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """weights float32 and ids int32 [T, top_k] of x [T, width] and router float32 [experts, width], a program a token.

    What moe.route does where all experts are in one group. E, K: experts and top_k rounded up to powers of two. A
    token whose numbers are none has top_k experts like any other, its weights are NaN.
    """
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E)
    column = tl.arange(0, BK)
    live = e < experts
    at = router + e[:, None] * width + column[None, :]
    x_at = x + token * width + column
    sums = tl.zeros((E, BK), tl.float32)
    for start in range(0, width, BK):
        inside = start + column < width
        row = tl.load(x_at + start, inside, other=0.0).to(tl.float32)
        sums += tl.load(at + start, live[:, None] & inside[None, :], other=0.0) * row[None, :]
    logits = tl.sum(sums, 1)
    if CAP:
        logits = cap * (2 * tl.sigmoid(2 * logits / cap) - 1)  # tanh
    logits = tl.where(live, logits, -float("inf"))
    if SOFTMAX:
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    else:
        scores = tl.sigmoid(logits)
    choice = scores
    if BIAS:
        choice += tl.load(bias + e, live, other=0.0)
    # Of NaN argmax finds any place, and again and again: then one expert's queue had more pairs than there is room for.
    choice = tl.where(choice == choice, choice, -3.0e38)
    choice = tl.where(live, choice, -float("inf"))
    place = tl.arange(0, K)
    chosen = tl.zeros((K,), tl.int32)
    weight = tl.zeros((K,), tl.float32)
    for j in range(top_k):
        best = tl.argmax(choice, 0)
        chosen = tl.where(place == j, best, chosen)
        weight = tl.where(place == j, tl.sum(tl.where(e == best, scores, 0.0), 0), weight)
        choice = tl.where(e == best, -float("inf"), choice)
    if RENORM:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    out = token * top_k + place
    tl.store(weights + out, weight * scale, place < top_k)
    tl.store(ids + out, chosen, place < top_k)


@triton.jit
def queue_kernel(ids, queues, counts, pairs, tokens, BLOCK: tl.constexpr):
    """queues int32 [E, tokens]: the pairs of each expert in rising order, counts int32 [E] of them; one program each.

    ids [pairs]. An expert has at most one pair of a token.
    """
    expert = tl.program_id(0)
    count = 0
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        ours = tl.load(ids + pair, pair < pairs, other=-1) == expert
        place = count + tl.cumsum(ours.to(tl.int32), 0) - 1
        tl.store(queues + expert * tokens + place, pair, ours)
        count += tl.sum(ours.to(tl.int32), 0)
    tl.store(counts + expert, count)


@triton.jit
def experts_kernel(
    x, w, out, queues, counts, tokens, n, k, top_k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, ACT: tl.constexpr,
    OF_TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [T * top_k, n] of the pairs in the queues = x [T (T * top_k), k] @ w [E, n, k] of their expert, transposed.

    With ACT w is [E, 2 n, k] and out = ACT(first half) * second half. OF_TOKENS: x has a row a token, else a row a
    pair. EVEN: BK divides k. Grid (tiles of BM rows of a queue, tiles of BN outputs, E).
    """
    expert = tl.program_id(2)
    count = tl.load(counts + expert)
    first = tl.program_id(0) * BM
    if first < count:
        place = first + tl.arange(0, BM)
        there = place < count
        pair = tl.load(queues + expert * tokens + place, there, other=0)
        rn = tl.program_id(1) * BN + tl.arange(0, BN)
        kk = tl.arange(0, BK)
        row = (pair // top_k if OF_TOKENS else pair).to(tl.int64)
        x_at = x + row[:, None] * k + kk[None, :]
        halves: tl.constexpr = 2 if ACT != "" else 1
        w_at = w + (expert.to(tl.int64) * n * halves + tl.minimum(rn, n - 1))[:, None] * k + kk[None, :]
        up_at = w_at + n.to(tl.int64) * k
        acc = tl.zeros((BN, BM), tl.float32)
        up = acc
        for step in tl.range(0, tl.cdiv(k, BK), num_stages=STAGES):
            if EVEN:
                x_tile = tl.load(x_at, there[:, None], other=0.0)
                w_tile = tl.load(w_at)
                if ACT != "":
                    up_tile = tl.load(up_at)
            else:
                live = (step * BK + kk < k)[None, :]
                x_tile = tl.load(x_at, there[:, None] & live, other=0.0)
                w_tile = tl.load(w_at, live, other=0.0)
                if ACT != "":
                    up_tile = tl.load(up_at, live, other=0.0)
            acc = tl.dot(w_tile, x_tile.T, acc, input_precision="ieee")
            if ACT != "":
                up = tl.dot(up_tile, x_tile.T, up, input_precision="ieee")
            x_at += BK
            w_at += BK
            up_at += BK
        if ACT != "":
            acc = activate(rounded(acc, out), ACT) * rounded(up, out)
        at = out + pair.to(tl.int64)[None, :] * n + rn[:, None]
        tl.store(at, acc.to(out.dtype.element_ty), there[None, :] & (rn < n)[:, None])


@triton.jit
def mix_kernel(
    y, weights, shared, gate, out, width, top_k, BLOCK: tl.constexpr, SHARED: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """out [T, width] = the sum of weights [T, top_k] * y [T, top_k, width] + shared [T, width] * sigmoid(gate [T])."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(top_k):
        pair = token * top_k + j
        total += tl.load(weights + pair) * tl.load(y + pair * width + column, live, other=0.0).to(tl.float32)
    if SHARED:
        total = rounded(total, out)
        common = tl.load(shared + token * width + column, live, other=0.0).to(tl.float32)
        if GATE:
            common = common * tl.sigmoid(tl.load(gate + token).to(tl.float32))
        total += common
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), live)
