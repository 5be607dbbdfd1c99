"""Checksums of KV pages, to find memory that changes between being written and being read again (--kv-checksums).

Made by the executor beside its KVCache, on a CPU. Each token's keys and values, over all layers, have one sum, taken
when they are written and compared when another sequence is to use them. Invariant: any change of one bit changes the
sum of its token.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .kv_cache import KVCache

AT_ONCE: Final = 512
"""Tokens looked at in one go: the copies that it takes stay small."""
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class CorruptPage(RuntimeError):
    """A page is not what was written into it."""


class KVChecksums:
    """The sums of all tokens of `kv`."""

    def __init__(self, kv: KVCache) -> None:
        self._kv = kv
        rows = kv.storage.view(_INTEGERS[kv.storage.dtype.itemsize])
        self._rows = rows.flatten(2)  # [layers, slots, values]
        layers, slots, values = self._rows.shape
        generator = torch.Generator().manual_seed(0)
        weights = torch.randint(-(1 << 62), 1 << 62, (layers, 1, values), generator=generator)
        self._weights = weights * 2 + 1  # odd: a power of two times it is never 0 in 64 bits
        self._sums = np.zeros(slots, np.int64)

    def written(self, slots: NDArray[np.int64]) -> None:
        """Take the sums of tokens just written: `slots` [n] as KVCache counts them."""
        self._sums[slots] = self._of(slots)

    def copied(self, copies: NDArray[np.int32]) -> None:
        """The first tokens of pages were copied; see KVCache.copy_pages. Their sums go with them."""
        page = self._kv.page_size
        spans = [(s * page, d * page, n) for s, d, n in copies.astype(np.int64).tolist()]
        before = [self._sums[source : source + n].copy() for source, _, n in spans]
        for (_, target, n), sums in zip(spans, before, strict=True):
            self._sums[target : target + n] = sums

    def verify(self, pages: NDArray[np.int32], tokens: int) -> None:
        """Raise CorruptPage if one of the first `tokens` tokens in these pages [n] is not what was written."""
        page = self._kv.page_size
        slots = (pages.astype(np.int64)[:, None] * page + np.arange(page)).reshape(-1)[:tokens]
        wrong = slots[self._of(slots) != self._sums[slots]]
        if len(wrong):
            number, offset = divmod(int(wrong[0]), page)
            what = f"KV page {number}, token {offset} of it, is not what was written there"
            raise CorruptPage(f"{what} ({len(wrong)} tokens of {len(slots)} are wrong): the memory is not sound")

    def _of(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        with torch.inference_mode():
            parts = [self._sum(torch.from_numpy(slots[at : at + AT_ONCE])) for at in range(0, len(slots), AT_ONCE)]
        return np.concatenate([np.zeros(0, np.int64), *(part.numpy() for part in parts)])

    def _sum(self, slots: Tensor) -> Tensor:
        return (self._rows.index_select(1, slots).to(torch.int64) * self._weights).sum((0, 2))
