"""Classes of characters that a grammar does not tell apart, and the classes of bytes.

Used by dfa.py (characters) and utf8.py (bytes). Invariant: two characters of one class are in the same charsets of the
grammar, so an automaton needs one column per class instead of 1,112,064.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .syntax import LAST, Ranges

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

_RANDOM = np.random.default_rng()


def random_words(number: int) -> UInt64Array:
    """Fresh odd random words, for hashes by sums of products modulo 2**64.

    Nobody who writes a grammar knows them, and two different sums meet once in about 2**60 times.
    """
    return _RANDOM.integers(0, 1 << 63, number, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def numbered(keys: UInt64Array) -> tuple[Int32Array, Int32Array]:
    """Number equal keys alike, in the order of their first places: (number of each key, first place of each number)."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank[inverse.reshape(keys.shape)], first[order].astype(np.int32)


def ranges(first: Int64Array, last: Int64Array) -> Int64Array:
    """first[0], ..., last[0] - 1, first[1], ..., last[1] - 1, and so on."""
    lengths = last - first
    before: Int64Array = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(first - before, lengths)


def column_keys(table: Int32Array) -> UInt64Array:
    """A key per column of states, equal for equal columns; 0 for one of -1 only."""
    values = np.append(random_words(int(table.max(initial=0)) + 1), np.uint64(0))  # the last one is what -1 takes
    words = random_words(len(table))
    keys = np.zeros(table.shape[1], np.uint64)
    step = max(1, (1 << 18) // table.shape[1])  # rows whose products stay in the cache
    for start in range(0, len(table), step):
        keys += (values[table[start : start + step]] * words[start : start + step, None]).sum(0)
    return keys


@dataclass(frozen=True, slots=True)
class Alphabet:
    """Classes of code points: those from starts[i] on, up to the next start, are of class classes[i]."""

    size: int
    """Number of classes; class 0 is of the characters that no charset has."""
    starts: Int32Array
    classes: Int32Array
    members: tuple[Int32Array, ...]
    """Of each charset: its classes, ascending."""

    def of(self, codes: npt.NDArray[np.integer]) -> Int32Array:
        """The classes of code points, whatever the shape."""
        return self.classes[np.searchsorted(self.starts, codes, "right") - 1]


def make_alphabet(charsets: Sequence[Ranges]) -> Alphabet:
    """Return the coarsest classes of which each charset is a union.

    Each charset has a random weight; the sum of the weights of the sets that hold a character is its class.
    """
    counts = [len(ranges) for ranges in charsets]
    edges = np.array([edge for ranges in charsets for edge in ranges], np.int64).reshape(-1, 2)
    lows, highs = edges[:, 0], edges[:, 1] + 1
    starts = np.unique(np.concatenate([[0, LAST + 1], lows, highs]))
    weights = np.repeat(random_words(len(charsets)), counts)
    first, last = np.searchsorted(starts, lows), np.searchsorted(starts, highs)
    change = np.zeros(len(starts), np.uint64)
    np.add.at(change, first, weights)
    np.subtract.at(change, last, weights)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(change)])  # the zero makes class 0
    numbers, places = numbered(sums)
    classes = numbers[1:]
    covered = ranges(first, last)
    charset = np.repeat(np.repeat(np.arange(len(charsets)), counts), last - first)
    pairs = np.unique(charset * np.int64(len(places)) + classes[covered])
    ends = np.searchsorted(pairs, np.arange(1, len(charsets)) * np.int64(len(places)))
    members = np.split((pairs % len(places)).astype(np.int32), ends)
    return Alphabet(len(places), starts.astype(np.int32), classes, tuple(members))
