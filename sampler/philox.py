"""Philox4x32-10: the randomness of sampling, as a pure function of (seed, position).

Used by the sampler's state, and reproduced bit for bit by the GPU kernels. There is no generator state: the token at an
absolute position of a request is drawn with the same words whatever the batch, the window, a retraction or a restart.
Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11.

Bit layout (the contract with the kernels; `tl.philox(seed, c0, c1, c2, c3)` of Triton takes the same words):
    key      k0 = seed bits 0-31, k1 = seed bits 32-63 (two's complement: any int64 is a seed)
    counter  c0 = position bits 0-31, c1 = position bits 32-63, c2 = block, c3 = stream
Stream 0, block 0 belongs to the draw of the token: words 0 and 1 are the row's key, which race.hashes mixes with each
token id; words 2 and 3 are unused. New uses take a new stream and never share words.
A kernel gets the same words and hashes, for they are integers, and the same kept ids. Its exp and log may differ from
torch's in the last bit, so it draws the same token but where the best two scores are within about 1e-6 of each other.
"""

from typing import Final

import torch
from torch import Tensor

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)
MASK: Final = 0xFFFFFFFF


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Return the 4 output words for each 4-word counter and 2-word key.

    counter [4, rows] and key [2, rows]: int64 holding 32-bit words (0 to 2**32 - 1); so is the result [4, rows].
    """
    device = counter.device
    steps = torch.arange(ROUNDS, device=device)[:, None, None]
    multipliers = torch.tensor(MULTIPLIERS, device=device)[:, None]
    keys = (key + steps * torch.tensor(WEYL, device=device)[:, None]) & MASK  # all rounds' keys in one go
    even, odd = counter[0::2], counter[1::2]  # words (0, 2), which are multiplied, and (1, 3)
    for round_key in keys.unbind():
        # 32 x 32 -> 64 bits. The product wraps in int64, which keeps all of its 64 bits; the high word's sign
        # extension is masked away below.
        product = even * multipliers
        even = ((product >> 32).flip(0) ^ odd ^ round_key) & MASK
        odd = (product & MASK).flip(0)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def row_keys(seed: Tensor, position: Tensor) -> Tensor:
    """Return the key of each draw: word 0 of stream 0, block 0 in the low half of an int64, word 1 in the high half.

    seed and position: int64 of any shapes that broadcast to the position's, which is the result's.
    """
    flat, seeds = position.flatten(), seed.expand_as(position).flatten()
    zero = torch.zeros_like(flat)
    counter = torch.stack((flat & MASK, (flat >> 32) & MASK, zero, zero))
    key = torch.stack((seeds & MASK, (seeds >> 32) & MASK))
    words = philox(counter, key)
    return (words[0] | words[1] << 32).view(position.shape)
