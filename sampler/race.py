"""Step 8 of sampling (see reference.py): the draw, a race of all kept tokens.

Used by reference.py and weights.py. Each token runs for an exponentially distributed time E / p, p its probability,
and the first one home is drawn: token i wins with probability p_i. In logarithms the winner has the largest
log p_i - log E_i, logits plus Gumbel noise (Efraimidis and Spirakis, "Weighted random sampling with a reservoir",
2006). Invariant: a token's time is a function of (seed, position, id); nothing is ever summed over tokens.
"""

import math
from typing import Final

import torch
from torch import Tensor

from .philox import MASK

ID_FACTOR: Final = 0x9E3779B1
FACTORS: Final = (0x21F0AAAD, 0x735A2D97)
BELOW_ONE: Final = 1 - 2.0**-24

BLOCK: Final = 512
CACHED: Final = 1 << 18
"""A CPU takes this many tokens at a time, so that the passes over them stay in its cache."""
LOG_STEP: Final = math.log(2) / (1 << 23)
LOG_ONE: Final = 159 * math.log(2)
"""The bits of a float32 f > 0, as an integer b, say that log f >= b * LOG_STEP - 127 log 2; 32 log 2 are of 2**-32."""
MARGIN: Final = 1e-3
"""Far above the rounding errors of a bound or a score, which are below 1e-4 for all that can win."""


def id_terms(vocab_size: int, device: torch.device) -> Tensor:
    """Return id * ID_FACTOR mod 2**32 of every id, int32 [vocab] holding the bits: the part no key changes."""
    terms = torch.arange(vocab_size, device=device) * ID_FACTOR
    return (terms << 32 >> 32).to(torch.int32)


def hashes(terms: Tensor, keys: Tensor) -> Tensor:
    """Return 32 random bits per row and token, int32 [rows, n].

    terms: id_terms of the tokens, int32 [n] or [rows, n]; keys: philox.row_keys, int64 [rows]. A mix of the "lowbias32"
    kind (C. Wellons, hash-prospector; the constants are those of its issue 19). Ten integer instructions: a Philox call
    per token made a kernel several times as slow as reading the logits does. The key's first word shifts the ids; the
    second enters between the products, where it makes the hash of each id exactly uniform and those of two ids
    independent as far as tests see (tests/sampler/test_race.py).
    """
    words = keys[:, None].view(torch.int32)  # [rows, 2]: little-endian, as all our machines are
    h = terms + words[:, :1]
    room = torch.empty_like(h)
    _fold(h, 16, room).mul_(FACTORS[0])
    _fold(h, 15, room).bitwise_xor_(words[:, 1:]).mul_(FACTORS[1])
    return _fold(h, 15, room)


def log_times(h: Tensor) -> Tensor:
    """Return log E, float32 from -22.9 to 2.9, of hashes int32 of any shape."""
    v = h.view(torch.uint32).to(torch.float32)
    v.add_(0.5).mul_(-(2.0**-32)).clamp_(min=-BELOW_ONE)  # this is -v, which rounding made -1 here and there
    return v.log1p_().neg_().log_()  # log1p: winners have a small v, of which it keeps all bits


def race(z: Tensor, terms: Tensor, keys: Tensor) -> Tensor:
    """Return the column with the largest z - log E of each row, the lowest among equals; int64 [rows].

    z float32 [rows, n]: log probabilities up to a constant per row, at most 0, -inf for tokens that are out, and 0 for
    one token at least. terms int32 [n] or [rows, n] and keys int64 [rows] as for hashes(). The logarithms would cost
    more than all else, so only blocks of tokens in which a bound of the scores says that the winner may be get them.
    """
    terms = terms.expand(z.shape)
    step = max(1, CACHED // z.shape[1]) if z.device.type == "cpu" else len(z)
    some = [slice(start, start + step) for start in range(0, len(z), step)]
    parts = [_race(z[s], hashes(terms[s], keys[s])) for s in some]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _race(z: Tensor, h: Tensor) -> Tensor:
    """race() given the hashes int32 [rows, n], for as many rows as the cache holds."""
    rows, width = len(z), math.gcd(z.shape[1], BLOCK)
    most = _bounds(z, h).reshape(rows, -1, width).amax(-1)
    first = torch.arange(0, most.numel(), most.shape[1], device=z.device)  # each row's first block
    blocks = first + most.argmax(-1)
    z, h = z.reshape(-1, width), h.view(-1, width)
    reached = _scores(z, h, blocks).amax(-1, keepdim=True)
    blocks = (most >= reached - (LOG_ONE + MARGIN)).view(-1).nonzero()[:, 0]
    score, column = _scores(z, h, blocks).max(-1)  # the first among equals
    if len(blocks) == rows:
        return (blocks - first) * width + column
    row = blocks // most.shape[1]
    best = reached[:, 0].scatter_reduce_(0, row, score, "amax")
    winner = torch.where(score == best.index_select(0, row), blocks * width + column, z.numel())
    return torch.full_like(first, z.numel()).scatter_reduce_(0, row, winner, "amin") - first * width


def _bounds(z: Tensor, h: Tensor) -> Tensor:
    """Return LOG_ONE less than bounds of all scores from above, float32 [rows, n].

    E >= v, and the bits of v as a float32 are nearly its logarithm, never above it: that bounds log E from below.
    """
    bits = h.view(torch.uint32).to(torch.float32).view(torch.int32)
    return torch.add(z, bits.to(torch.float32), alpha=-LOG_STEP)


def _scores(z: Tensor, h: Tensor, blocks: Tensor) -> Tensor:
    return z.index_select(0, blocks) - log_times(h.index_select(0, blocks))


def _fold(h: Tensor, bits: int, room: Tensor) -> Tensor:
    """h ^= h >> bits in place, of unsigned words in int32: torch's shift copies the sign, so that is masked off."""
    torch.bitwise_right_shift(h, bits, out=room)
    return h.bitwise_xor_(room.bitwise_and_(MASK >> bits))
