"""SentPrefixes: which beginnings of prompts were sent to which of several caches, roughly and in bounded memory.

The text actor has one to send a request where its prompt's beginning is cached. It keeps no tokens, but a hash of each
prefix whose length is a mark (`marks`), and for each the caches that it was sent to; the prefixes used longest ago are
forgotten. Invariants: what it holds never exceeds `most`, however long prompts are; what it answers depends on the
calls before and nothing else; it may be wrong, since a cache evicts by rules of its own, and then only costs time.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

MOST: Final = 1 << 16
"""Prefixes: about ten megabytes, and at 64 tokens from one mark to the next four million tokens."""
FINENESS: Final = 8
"""Marks are at most an eighth of their length apart, from where that is more than a page."""


class SentPrefixes:
    """See the module's text. Caches are numbers from 0."""

    def __init__(self, page: int, most: int = MOST) -> None:
        """`page`: tokens that a cache shares at once; shorter matches are worth nothing."""
        self._page = page
        self._most = most
        self._caches: OrderedDict[int, int] = OrderedDict()
        """By prefix: bit i is set if it was sent to cache i. The one used longest ago first."""

    def __len__(self) -> int:
        return len(self._caches)

    def hashes(self, ids: NDArray[np.int32], salt: str) -> list[int]:
        """Of the prompt's prefixes at the marks. `salt`: prompts of different salts share nothing."""
        places = marks(len(ids), self._page)
        if not places:
            return []
        # A sum over mixed (token, place) pairs: all prefixes' in one pass, whose order is in the places.
        mixed = _mixed(ids.astype(np.uint64) + (np.arange(len(ids), dtype=np.uint64) << np.uint64(32)))
        sums = np.cumsum(mixed, dtype=np.uint64)[np.array(places) - 1]
        digest = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        hashes: list[int] = (sums ^ np.frombuffer(digest, dtype=np.uint64)).tolist()
        return hashes

    def known(self, hashes: Sequence[int], caches: int) -> list[int]:
        """How many tokens of the prompt each of the first `caches` caches was sent before, at least."""
        lengths = [0] * caches
        everywhere = (1 << caches) - 1
        for hashed, length in zip(hashes, _marks_of(len(hashes), self._page), strict=True):
            everywhere &= self._caches.get(hashed, 0)
            if not everywhere:
                break
            for cache in range(caches):
                if everywhere >> cache & 1:
                    lengths[cache] = length
        return lengths

    def sent(self, hashes: Sequence[int], cache: int) -> None:
        """The prompt goes to this cache."""
        caches = self._caches
        # The shortest prefix last, so that a longer one is forgotten before what it begins with.
        for hashed in reversed(hashes[: self._most]):
            caches[hashed] = caches.pop(hashed, 0) | 1 << cache
        while len(caches) > self._most:
            caches.popitem(last=False)

    def forget(self, cache: int) -> None:
        """This cache has lost all."""
        self._caches = OrderedDict(
            (hashed, rest) for hashed, caches in self._caches.items() if (rest := caches & ~(1 << cache))
        )


def marks(length: int, page: int) -> Sequence[int]:
    """The lengths up to this one at which prefixes are told apart: multiples of the page, then of 2, 4, 8 pages, ..."""
    found = _marks(max(1, length).bit_length(), page)
    return found[: bisect_right(found, length)]


@lru_cache
def _marks(bits: int, page: int) -> tuple[int, ...]:
    """All marks below 2 ** bits."""
    found, stride, length = [], page, page
    while length < 1 << bits:
        found.append(length)
        if length >= 2 * FINENESS * stride:
            stride *= 2
        length += stride
    return tuple(found)


def _marks_of(count: int, page: int) -> Sequence[int]:
    """The first so many marks."""
    bits = page.bit_length() + 1
    while len(_marks(bits, page)) < count:
        bits += 1
    return _marks(bits, page)[:count]


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser of each (Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
