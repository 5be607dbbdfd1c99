"""What each token does to each state of an automaton over bytes.

Used by token_table.py. A token is a function from states to states, and large vocabularies have few different ones:
most tokens are dead everywhere or do the same (the transition monoid of the automaton, as far as tokens reach into
it). So the trie is walked level by level with a function's number per node; a new function is computed once, from that
of its prefix, as a sparse list of (from, to), and recognised by a random sum. Invariant: nodes have the same number
exactly if they do the same to every state.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from .alphabet import Int32Array, Int64Array, numbered, random_words, ranges
from .budget import Budget
from .errors import BudgetError
from .token_graph import TokenGraph, make_graph
from .utf8 import ByteDfa
from .vocabulary import TokenizerTables

DEAD: Final = -1
_UNKNOWN: Final = -2
MAX_PAIRS: Final = 16_000_000


def walk_tokens(dfa: ByteDfa, tables: TokenizerTables, budget: Budget) -> TokenGraph:
    """Return the automaton over tokens. Raises BudgetError: too slow, or too many pairs of states."""
    functions = _Functions(dfa, budget)
    of_node = np.full(len(tables.parent), DEAD, np.int32)
    of_node[0] = 0
    for first, last in zip(tables.levels[1:-1], tables.levels[2:], strict=True):
        before = of_node[tables.parent[first:last]]
        alive = np.flatnonzero(before >= 0)
        if not len(alive):
            break
        of_node[first + alive] = functions.after(before[alive], dfa.byte_class[tables.byte[first + alive]])
    of_place = of_node[tables.node]
    used, renumbered = np.unique(np.append(of_place, DEAD), return_inverse=True)  # DEAD comes first
    classes = len(used) - 1
    token_class = np.full(tables.size, classes, np.int32)
    token_class[tables.order] = np.where(renumbered == 0, classes, renumbered - 1)[:-1]
    lengths, source, target = functions.pairs(used[1:])
    column = np.repeat(np.arange(classes, dtype=np.int32), lengths)
    return make_graph(len(dfa.final), classes, token_class, column, source, target)


class _Functions:
    """All functions found so far; number 0 is the identity."""

    def __init__(self, dfa: ByteDfa, budget: Budget) -> None:
        states, self.width = dfa.delta.shape
        self.delta = dfa.delta.ravel()
        self.budget = budget
        self.table = np.full(0, _UNKNOWN, np.int32)
        """int32 [functions * byte classes]: the function after one more byte."""
        self.offsets: list[int] = [0]
        self.source = np.zeros(1 << 16, np.int32)
        self.target = np.zeros(1 << 16, np.int32)
        self.numbers: dict[int, int] = {}
        self.from_words, self.to_words = random_words(states), random_words(states)
        everywhere = np.arange(states, dtype=np.int32)
        self._append(everywhere, everywhere, np.array([states]))
        self.numbers[int((self.from_words * self.to_words).sum())] = 0

    def after(self, before: Int32Array, column: npt.NDArray[np.uint8]) -> Int32Array:
        """The functions of prefixes with functions `before` and one more byte of class `column`, DEAD or a number."""
        key = before * np.int64(self.width) + column
        found: Int32Array = self.table[key]
        unknown = key[found == _UNKNOWN]
        if len(unknown):
            new = np.unique(unknown)
            self.table[new] = self._compose(*np.divmod(new, self.width))
            found = self.table[key]
        return found

    def _compose(self, before: Int64Array, column: Int64Array) -> Int32Array:
        """Compute functions: `before` and one more byte."""
        self.budget.check()
        offsets = np.array(self.offsets)
        lengths = offsets[before + 1] - offsets[before]
        if lengths.sum() > MAX_PAIRS:
            raise BudgetError("pairs of states per token length", MAX_PAIRS)
        pair = ranges(offsets[before], offsets[before + 1])
        target = self.delta[self.target[pair] * np.int64(self.width) + np.repeat(column, lengths)]
        alive = np.flatnonzero(target >= 0)
        source, target = self.source[pair[alive]], target[alive].astype(np.int32)
        counts = np.bincount(np.repeat(np.arange(len(before)), lengths)[alive], minlength=len(before))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(self.from_words[source] * self.to_words[target])])
        ends = np.cumsum(counts)
        keys = sums[ends] - sums[ends - counts]
        distinct, first = numbered(keys)
        numbers: list[int] = []
        new = 0
        kept = np.zeros(len(before), np.bool_)
        for place, key, size in zip(first.tolist(), keys[first].tolist(), counts[first].tolist(), strict=True):
            number = self.numbers.get(key) if size else DEAD
            if number is None:
                number = self.numbers[key] = len(self.offsets) - 1 + new
                kept[place] = True
                new += 1
            numbers.append(number)
        pairs = np.repeat(kept, counts)
        self._append(source[pairs], target[pairs], counts[kept])
        return np.array(numbers, np.int32)[distinct]

    def _append(self, source: Int32Array, target: Int32Array, counts: Int64Array) -> None:
        """Adds functions; `source` and `target` are their pairs, joined."""
        end = self.offsets[-1] + len(source)
        if end > MAX_PAIRS:
            raise BudgetError("pairs of states", MAX_PAIRS)
        if end > len(self.source):
            room = np.zeros(max(end, len(self.source)), np.int32)
            self.source, self.target = np.append(self.source, room), np.append(self.target, room)
        self.source[self.offsets[-1] : end] = source
        self.target[self.offsets[-1] : end] = target
        self.offsets += (self.offsets[-1] + np.cumsum(counts)).tolist()
        missing = (len(self.offsets) - 1) * self.width - len(self.table)
        if missing > 0:
            self.table = np.append(self.table, np.full(max(missing, len(self.table)), _UNKNOWN, np.int32))

    def pairs(self, functions: Int64Array) -> tuple[Int64Array, Int32Array, Int32Array]:
        """(how many pairs each of these functions has, from, to)"""
        offsets = np.array(self.offsets)
        pair = ranges(offsets[functions], offsets[functions + 1])
        return offsets[functions + 1] - offsets[functions], self.source[pair], self.target[pair]
