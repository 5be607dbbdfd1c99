"""Nondeterministic to deterministic automaton, over classes of characters: the subset construction.

Used by compiler.py; minimise.py and utf8.py go on from here. Invariant: every state can be reached, and from every
state a match can be completed (nfa.py makes no dead positions, so no set of them is dead).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .alphabet import Alphabet, Int32Array, make_alphabet, ranges
from .budget import Budget
from .errors import BudgetError
from .nfa import FINAL, Nfa, Positions

MAX_MEMBERS: Final = 2_500_000
"""Positions in all states together: about 100 MB, half a second."""

_Cells = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class CharDfa:
    """A deterministic automaton over classes of characters. State 0 is the start."""

    delta: Int32Array
    """The next state, int32 [states, classes], -1 where there is none."""
    final: npt.NDArray[np.bool_]
    """bool [states]"""
    alphabet: Alphabet


class _Determiniser:
    """The sets of positions found so far, and the edges between them.

    The members of a set are grouped by charset, and the charsets of a set cut the alphabet into cells, whose classes
    (bits of an int) all lead to the same set. So the work per state grows with its cells, not with the alphabet.
    """

    def __init__(self, nfa: Nfa, alphabet: Alphabet, budget: Budget) -> None:
        self.nfa = nfa
        self.budget = budget
        self.masks = [sum(1 << c for c in members.tolist()) for members in alphabet.members]
        self.cells_of: dict[tuple[int, ...], _Cells] = {}
        self.states: dict[Positions, int] = {nfa.start: 0}
        """By their sets, and by sets that are one of these once what is superfluous is left out."""
        self.queue = [nfa.start]
        """The set of each state."""
        self.sources: list[int] = []
        self.labels: list[int] = []
        self.targets: list[int] = []

    def run(self) -> None:
        queue, members = self.queue, 0
        for source, positions in enumerate(queue):
            if source & 0x7F == 0:
                self.budget.check()
            groups = self._groups(positions)
            for mask, numbers in self._cells(groups):
                follows = groups[numbers[0]] if len(numbers) == 1 else [f for n in numbers for f in groups[n]]
                union = follows[0] if len(follows) == 1 else frozenset().union(*follows)
                state = self.states.get(union)
                if state is None:
                    target = self.nfa.reduced(union)
                    state = self.states[union] = self.states.setdefault(target, len(queue))
                    members += len(union)
                    if members > MAX_MEMBERS:
                        raise BudgetError("positions in dfa states", MAX_MEMBERS)
                    if state == len(queue):
                        self.budget.need_dfa_states(state + 1)
                        queue.append(target)
                self.sources.append(source)
                self.labels.append(mask)
                self.targets.append(state)

    def _groups(self, positions: Positions) -> dict[int, list[Positions]]:
        """What may follow each charset of the set."""
        charset, follow = self.nfa.charset, self.nfa.follow
        groups: dict[int, list[Positions]] = {}
        for position in positions:
            if position != FINAL:
                groups.setdefault(charset[position], []).append(follow[position])
        return groups

    def _cells(self, groups: dict[int, list[Positions]]) -> _Cells:
        """Disjoint sets of classes, with the charsets that contain each."""
        key = tuple(sorted(groups)) if len(groups) > 1 else tuple(groups)
        cells = self.cells_of.get(key)
        if cells is None:
            cells = self.cells_of[key] = self._cut(key)
        return cells

    def _cut(self, key: tuple[int, ...]) -> _Cells:
        masks = [self.masks[number] for number in key]
        union = 0
        for mask in masks:
            union |= mask
        if sum(mask.bit_count() for mask in masks) == union.bit_count():
            return tuple((mask, (number,)) for mask, number in zip(masks, key, strict=True))
        cells: list[tuple[int, tuple[int, ...]]] = []
        for mask, number in zip(masks, key, strict=True):
            rest, cut = mask, []
            for cell, numbers in cells:
                both = cell & rest
                if both:
                    rest &= ~both
                    cut.append((both, (*numbers, number)))
                if cell & ~both:
                    cut.append((cell & ~both, numbers))
            cells = [*cut, (rest, (number,))] if rest else cut
        return tuple(cells)


def determinise(nfa: Nfa, budget: Budget) -> CharDfa:
    """Return an automaton of the same language, not minimal.

    Raises BudgetError: too many states, or too slow.
    """
    alphabet = make_alphabet(nfa.charsets)
    work = _Determiniser(nfa, alphabet, budget)
    work.run()
    labels = {mask: i for i, mask in enumerate(dict.fromkeys(work.labels))}
    members = [_bits(mask) for mask in labels]
    label = np.array([labels[mask] for mask in work.labels], np.int64)
    lengths = np.array([len(m) for m in members], np.int64)
    starts = np.cumsum(lengths) - lengths
    counts = lengths[label]
    column = ranges(starts[label], starts[label] + counts)
    classes = np.array([c for m in members for c in m], np.int64)[column]
    delta = np.full((len(work.queue), alphabet.size), -1, np.int32)
    delta[np.repeat(np.array(work.sources, np.int64), counts), classes] = np.repeat(np.array(work.targets), counts)
    final = np.fromiter((FINAL in positions for positions in work.queue), np.bool_, len(work.queue))
    return CharDfa(delta, final, alphabet)


def _bits(mask: int) -> list[int]:
    """The places of the ones."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found
