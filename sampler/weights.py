"""Steps 6 and 7 of sampling (see reference.py): integer weights, which of them are kept, and the race of those.

Used by reference.py, and by the kernels' tests. A weight q is an int64 in units of 2**-40 of the row's largest; it
comes from a float32 and so has at most 24 significant bits. Invariant: what is kept follows from q in exact integer
arithmetic, so it does not depend on an order of summation, on ties, or on which of the ways below computed it.
"""

import math
from typing import Final

import torch
from torch import Tensor

from .race import race
from .state import SHARE_BITS, WEIGHT_BITS

WHOLE: Final = 1 << SHARE_BITS
PROBE: Final = 256
"""Filters look at this many of the largest weights first; they nearly always hold all that is kept."""


def weights(z: Tensor) -> Tensor:
    """Return q int64 [rows, vocab] of z float32 [rows, vocab], logarithms of multiples of the largest probability."""
    return z.exp().mul_(2.0**WEIGHT_BITS).to(torch.int64)


def threshold(q: Tensor, top_k: Tensor, top_p: Tensor, min_weight: Tensor) -> Tensor:
    """Return the smallest weight that top_k, top_p and min_p together keep, int64 [rows].

    q int64 [rows, vocab]; parameters int64 [rows]: top_k 0 is off, top_p in units of 2**-24, min_weight a weight.
    """
    by_rank = _kth(q.topk(max(1, int(top_k.max()))).values, top_k)
    return _threshold(q, by_rank, top_p, min_weight)


def race_kept(z: Tensor, terms: Tensor, keys: Tensor, top_k: Tensor, top_p: Tensor, min_weight: Tensor) -> Tensor:
    """Return the id that wins the race of the ids whose weights threshold(...) keeps, int64 [rows].

    z, terms [vocab] and keys as for race.race; parameters as for threshold. Where all that is kept is among the PROBE
    largest weights, only these are looked at.
    """
    q = weights(z)
    largest, ids = q.topk(min(max(PROBE, int(top_k.max())), q.shape[1]))
    by_rank = _kth(largest, top_k)
    ranked = torch.where(top_k > 0, torch.where(largest >= by_rank[:, None], largest, 0).sum(-1), q.sum(-1))
    limit = share(ranked, top_p).clamp(min=1)[:, None]
    nucleus = ((largest.cumsum(-1) - largest) < limit).sum(-1)  # how many have less than the limit above them
    by_mass = torch.where(top_p < WHOLE, _kth(largest, nucleus), 0)
    keep = torch.maximum(torch.maximum(by_rank, by_mass), min_weight)
    last = largest[:, -1]
    inside = (last < keep) & ((top_k == 0) | (last < by_rank))
    ids, order = ids.sort()  # back into the vocabulary's order
    out = largest.gather(1, order) < keep[:, None]
    drawn = ids.gather(1, race(z.gather(1, ids).masked_fill_(out, -math.inf), terms[ids], keys)[:, None])[:, 0]
    if not bool(inside.all()):
        rest = (~inside).nonzero()[:, 0]
        q, z, keys, by_rank, top_p, min_weight = (
            t.index_select(0, rest) for t in (q, z, keys, by_rank, top_p, min_weight)
        )
        keep = _threshold(q, by_rank, top_p, min_weight)
        drawn[rest] = race(z.masked_fill_(q < keep[:, None], -math.inf), terms, keys)
    return drawn


def share(total: Tensor, fraction: Tensor) -> Tensor:
    """Return floor(total * fraction / 2**24), exact for total < 2**62 and fraction <= 2**24, without overflow."""
    high, low = total >> SHARE_BITS, total & (WHOLE - 1)
    return high * fraction + ((low * fraction) >> SHARE_BITS)


def _kth(falling: Tensor, k: Tensor) -> Tensor:
    """Return each row's k-th value (k from 1), 0 where k is 0. falling [rows, n], k and the result [rows]."""
    return torch.where(k > 0, falling.gather(1, (k - 1).clamp(min=0)[:, None])[:, 0], 0)


def _threshold(q: Tensor, by_rank: Tensor, top_p: Tensor, min_weight: Tensor) -> Tensor:
    """threshold(), given the k-th weight."""
    total = q.masked_fill(q < by_rank[:, None], 0).sum(-1)
    by_mass = torch.where(top_p < WHOLE, _crossing(q, share(total, top_p).clamp(min=1)), 0)
    return torch.maximum(torch.maximum(by_rank, by_mass), min_weight)


def _crossing(q: Tensor, limit: Tensor) -> Tensor:
    """Return the weight at which the sum of the weights, from the largest down, reaches `limit`; int64 [rows].

    Radix select: the bits of a float32 above 0 order as the number does, and q fits one exactly. Two histograms of
    mass, by the upper and by the lower half of the bits, find it in a tenth of a sort's time.
    """
    bits = q.to(torch.float32).view(torch.int32)
    upper, lower = bits >> 16, bits & 0xFFFF
    first, above = _crossing_bucket(q, upper, 1 << 15, limit)
    second, _ = _crossing_bucket(q.masked_fill(upper != first[:, None], 0), lower, 1 << 16, limit - above)
    return (first << 16 | second).to(torch.int32).view(torch.float32).to(torch.int64)


def _crossing_bucket(q: Tensor, bucket: Tensor, size: int, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bucket in which the mass, summed from the highest bucket down, reaches `limit`, and the mass above."""
    below = q.new_zeros(len(q), size).scatter_add_(1, bucket.to(torch.int64), q).cumsum(-1)  # up to each bucket
    total = below[:, -1:]
    at = torch.searchsorted(below, total - limit[:, None], right=True)
    return at[:, 0], (total - below.gather(1, at))[:, 0]
