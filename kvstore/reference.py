"""The prefix cache as slowly and plainly as possible: a dict from token prefixes to pages. Used by tests only.

Must behave as kvstore/radix.py does, page for page, evictions included. Invariant: an entry's key is the whole
sequence from position 0 up to and including its page, so an entry never exists without those of all earlier pages.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

Tokens = tuple[int, ...]


@dataclass
class Entry:
    """One cached page."""

    page: int
    locks: int = 0
    hits: int = 0
    used: int = 0  # the clock when it was last matched, inserted or unlocked


class Path(NamedTuple):
    """What `lock` takes: all pages of `tokens` in a namespace."""

    namespace: str
    tokens: Tokens


class ReferenceCache:
    """Same questions and answers as RadixTree, each by a search over all entries."""

    def __init__(self, page_size: int = 16, least_hits_first: bool = False) -> None:
        self.page_size = page_size
        self.least_hits_first = least_hits_first
        self.entries: dict[Path, Entry] = {}
        self.clock = 0

    @property
    def num_pages(self) -> int:
        return len(self.entries)

    @property
    def num_evictable(self) -> int:
        return sum(not entry.locks for entry in self.entries.values())

    def match(self, tokens: Tokens, namespace: str) -> tuple[list[int], int, set[int], Path]:
        """Returns the whole pages, how many tokens another page shares, the pages that share so many, the path."""
        path = Path(namespace, ())
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            if Path(namespace, tokens[:end]) in self.entries:
                path = Path(namespace, tokens[:end])
        self._use(path, hits=1)
        pages = [self.entries[step].page for step in self._steps(path)]
        shared = {
            entry.page: _common(key, tokens) - len(path.tokens)
            for (name, key), entry in self.entries.items()
            if name == namespace and self._parent(key) == path.tokens
        }
        longest = max(shared.values(), default=0)
        return pages, longest, {page for page, n in shared.items() if n == longest > 0} or {-1}, path

    def insert(self, tokens: Tokens, pages: list[int], namespace: str) -> tuple[int, Path, list[int]]:
        """Returns taken_from, the path to lock and the pages freed because a longer page contains theirs."""
        taken_from, path, freed = 0, Path(namespace, ()), []
        for i, page in enumerate(pages):
            step = Path(namespace, tokens[: (i + 1) * self.page_size])
            if step in self.entries or self._is_tail_of_another(step):
                taken_from = i + 1
                path = step if len(step.tokens) % self.page_size == 0 else path
            else:
                freed += self._drop_prefixes_of(step)
                self.entries[step] = Entry(page)
                path = step
        self._use(path, hits=0)
        return taken_from, path, freed

    def lock(self, path: Path) -> None:
        for step in self._steps(path):
            self.entries[step].locks += 1

    def unlock(self, path: Path) -> None:
        self.clock += 1
        for step in self._steps(path):
            entry = self.entries[step]
            entry.locks -= 1
            if not entry.locks:
                entry.used = self.clock

    def evict(self, num_pages: int) -> list[int]:
        """Returns the pages given up, one after the other: the least valuable page with nothing behind it."""
        freed: list[int] = []
        while len(freed) < num_pages and self.num_evictable:
            inner = {Path(name, self._parent(key)) for name, key in self.entries}
            leaves = [path for path, entry in self.entries.items() if path not in inner and not entry.locks]
            freed.append(self.entries.pop(min(leaves, key=self._value)).page)
        return freed

    def _value(self, path: Path) -> tuple[int, int, int]:
        entry = self.entries[path]
        return (entry.hits if self.least_hits_first else 0, entry.used, -len(path.tokens))

    def _parent(self, key: Tokens) -> Tokens:
        return key[: (len(key) - 1) // self.page_size * self.page_size]

    def _steps(self, path: Path) -> Iterator[Path]:
        for end in range(self.page_size, len(path.tokens) + self.page_size, self.page_size):
            yield Path(path.namespace, path.tokens[:end])

    def _use(self, path: Path, hits: int) -> None:
        self.clock += 1
        for step in self._steps(path):
            self.entries[step].used = self.clock
            self.entries[step].hits += hits

    def _is_tail_of_another(self, path: Path) -> bool:
        name, key = path
        whole = len(key) % self.page_size == 0
        return not whole and any(
            other.namespace == name and self._parent(other.tokens) == self._parent(key) and _starts(other.tokens, key)
            for other in self.entries
        )

    def _drop_prefixes_of(self, path: Path) -> list[int]:
        name, key = path
        shorter = [Path(name, key[:end]) for end in range(len(self._parent(key)) + 1, len(key))]
        return [self.entries.pop(old).page for old in shorter if old in self.entries and not self.entries[old].locks]


def _starts(key: Tokens, prefix: Tokens) -> bool:
    return key[: len(prefix)] == prefix


def _common(a: Tokens, b: Tokens) -> int:
    same = [x == y for x, y in zip(a, b, strict=False)]
    return same.index(False) if False in same else len(same)
