"""Page pool: hands out KV page numbers and takes them back; it never touches the KV data itself.

Used by the scheduler actor (pages of running sequences) and by the radix tree (pages of cached prefixes).
Invariant: every page is either on the free stack exactly once or in use, so `num_free` plus the pages in use is
`num_pages` at all times; a free that would break this is refused as a whole.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

_IN_USE = -1


class OutOfPages(Exception):
    """Fewer pages are free than were asked for; nothing was allocated. Evict or retract, then ask again."""


class PagePool:
    """A stack of free page numbers 0 .. num_pages-1. All operations cost O(pages moved), in numpy.

    Deterministic: a new pool hands out ascending numbers, later the most recently freed pages come first, in the
    order in which they were freed (what was one ascending run stays one).
    """

    def __init__(self, num_pages: int) -> None:
        """Raises ValueError for a negative number of pages."""
        self.num_pages = self.num_free = 0
        self.resize(num_pages)

    def resize(self, num_pages: int) -> None:
        """Becomes a new pool of so many pages. Raises ValueError while a page is in use, or for a negative number."""
        if num_pages < 0:
            raise ValueError(f"a pool cannot have {num_pages} pages")
        if self.num_free != self.num_pages:
            raise ValueError(f"{self.num_pages - self.num_free} pages are in use")
        self.num_pages = num_pages
        self.num_free = num_pages
        self._stack: Int32Array = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        # Where each page lies on the stack, or _IN_USE: finds a double free without a set.
        self._place: Int32Array = np.arange(num_pages - 1, -1, -1, dtype=np.int32)

    def allocate(self, n: int) -> Int32Array:
        """Takes n pages: int32 [n]. Raises OutOfPages (and takes none) if fewer are free, ValueError if n < 0."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if n > self.num_free:
            raise OutOfPages(f"{n} pages wanted, {self.num_free} of {self.num_pages} free")
        top = self.num_free
        pages = self._stack[top - n : top][::-1].copy()
        self._place[pages] = _IN_USE
        self.num_free = top - n
        return pages

    def free(self, pages: Sequence[int] | Int32Array) -> None:
        """Gives pages back. Raises ValueError, and frees none, if one is foreign, already free or named twice."""
        freed = np.asarray(pages, dtype=np.int32)
        n = len(freed)
        if n == 0:
            return
        # One comparison finds both ends: seen as unsigned, a negative number is larger than any page.
        if int(freed.view(np.uint32).max()) >= self.num_pages:
            raise ValueError(f"no page of this pool (0..{self.num_pages - 1}): {freed.min()} or {freed.max()}")
        if int(self._place[freed].max()) != _IN_USE:
            raise ValueError(f"double free: {freed[self._place[freed] != _IN_USE].tolist()} already free")
        top = self.num_free
        places = np.arange(top + n - 1, top - 1, -1, dtype=np.int32)
        self._place[freed] = places
        # Of a page named twice the last place wins, so the first no longer reads back.
        if n > 1 and not np.array_equal(self._place[freed], places):
            self._place[freed] = _IN_USE
            raise ValueError("double free: a page is named twice in one call")
        self._stack[top : top + n] = freed[::-1]
        self.num_free = top + n

    def is_free(self, pages: Sequence[int] | Int32Array) -> npt.NDArray[np.bool_]:
        """bool [n]: which of these pages of the pool are free."""
        free: npt.NDArray[np.bool_] = self._place[np.asarray(pages, dtype=np.int32)] != _IN_USE
        return free

    def check(self) -> None:
        """Asserts the invariant; O(num_pages)."""
        assert 0 <= self.num_free <= self.num_pages
        stack = self._stack[: self.num_free]
        assert np.array_equal(self._place[stack], np.arange(self.num_free)), "stack and places disagree"
        assert int((self._place != _IN_USE).sum()) == self.num_free, "a page is marked free and not on the stack"
