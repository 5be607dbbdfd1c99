"""The smallest automaton of the same language.

Used by compiler.py on automata over characters, before bytes multiply the states. What most grammars consist of, texts
and counted repeats, has no cycles: there a state is known by its row once its targets are (Revuz, "Minimisation of
acyclic deterministic automata in linear time", 1992). So the strongly connected components are taken with those they
lead to first; the states of a component that is a cycle are told apart by Moore's refinement, and the result is
compared with the cycles known so far. Invariant: no two states of the result accept the same texts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from .alphabet import Int32Array, UInt64Array, column_keys, numbered, random_words
from .budget import Budget
from .dfa import CharDfa

MANY: Final = 64
"""States of a cycle worth a look at long texts."""
_INSIDE: Final = -2
"""In a row: the target is in the component that is being looked at."""


def minimise(dfa: CharDfa, budget: Budget) -> CharDfa:
    """Return the minimal automaton; its states are numbered breadth first. Raises BudgetError when the time is up."""
    work = _Minimiser(dfa, budget)
    for number, component in enumerate(components(dfa.delta)):
        if number & 0xFF == 0:
            budget.check()
        work.add(component)
    return _breadth_first(np.array(work.rows, np.int32), np.array(work.final), int(work.block[0]), dfa)


@dataclass(slots=True)
class _Minimiser:
    dfa: CharDfa
    budget: Budget
    block: Int32Array = field(init=False)
    """The new state of each old one; the last entry is what -1, no state, becomes."""
    rows: list[Int32Array] = field(default_factory=list)
    final: list[bool] = field(default_factory=list)
    known: dict[tuple[bool, bytes], int] = field(default_factory=dict)
    before: dict[int, list[int]] = field(default_factory=dict)
    """The new states that lead to each new state."""
    closed: list[int] = field(default_factory=list)
    """The new states of cycles that lead nowhere else."""

    def __post_init__(self) -> None:
        self.block = np.full(len(self.dfa.delta) + 1, _INSIDE, np.int32)
        self.block[-1] = -1

    def add(self, component: list[int]) -> None:
        """Finds the new states of a component; those of all it leads to are known."""
        rows = self.block[self.dfa.delta[component]]
        if len(component) > 1 or (rows == _INSIDE).any():
            self._add_cycle(np.array(component), rows)
            return
        state = component[0]
        key = (bool(self.dfa.final[state]), rows.tobytes())
        new = self.known.get(key)
        self.block[state] = self._new(key[0], rows[0]) if new is None else new

    def _new(self, final: bool, row: Int32Array) -> int:
        state = self.known[final, row.tobytes()] = len(self.rows)
        self.rows.append(row)
        self.final.append(final)
        for target in set(row.tolist()):
            self.before.setdefault(target, []).append(state)
        return state

    def _add_cycle(self, states: npt.NDArray[np.int64], rows: Int32Array) -> None:
        final = self.dfa.final[states]
        place = np.zeros(len(self.block), np.int32)
        place[states] = np.arange(len(states), dtype=np.int32)
        inside = rows == _INSIDE
        targets = np.where(inside, place[self.dfa.delta[states]], 0)
        part, first = self._refine(rows, inside, targets, final)
        rows, inside, targets, final = rows[first], inside[first], part[targets[first]], final[first]
        for state, twin in self._twins(rows):
            found = self._same(state, twin, rows, inside, targets, final)
            if found is not None:
                self.block[states] = found[part]
                return
        start = len(self.rows)
        for row, f in zip(np.where(inside, start + targets, rows), final, strict=True):
            self._new(bool(f), row)
        if (rows < 0).all():
            self.closed += range(start, len(self.rows))
        self.block[states] = start + part

    def _twins(self, rows: Int32Array) -> Iterator[tuple[int, int]]:
        """One state of a cycle, with each new state that it could be by where they lead to.

        If one state of the cycle has a twin, all have: what it leads to in the cycle leads back to it.
        """
        place, column = np.nonzero(rows >= 0)
        ends = {(end, state) for state, end in zip(place.tolist(), rows[place, column].tolist(), strict=True)}
        exits = [(len(self.before.get(end, ())), state, end) for end, state in ends]
        _, state, end = min(exits, default=(0, 0, _INSIDE))
        for twin in self.closed if end == _INSIDE else self.before.get(end, ()):
            yield state, twin

    def _refine(
        self, rows: Int32Array, inside: npt.NDArray[np.bool_], targets: Int32Array, final: npt.NDArray[np.bool_]
    ) -> tuple[Int32Array, Int32Array]:
        """Moore's refinement: (the class of each state, one state of each class).

        It would take as many rounds as a text in the cycle has characters, so states begin apart if long texts show it.
        """
        words = random_words(rows.shape[1])
        values = random_words(len(self.block) + 2)
        base = (values[rows] * words).sum(1) + final
        if len(rows) > MANY:
            base = base + _paths(base, rows, inside, targets)
        part, first = numbered(base)
        while len(first) < len(part):
            self.budget.check()
            colours: UInt64Array = np.where(inside, values[part][targets], np.uint64(0))
            finer, places = numbered(base + (colours * words).sum(1) + values[part] * np.uint64(0x9E3779B97F4A7C15))
            if len(places) == len(first):
                break
            part, first = finer, places
        return part, first

    def _same(
        self,
        state: int,
        twin: int,
        rows: Int32Array,
        inside: npt.NDArray[np.bool_],
        targets: Int32Array,
        final: npt.NDArray[np.bool_],
    ) -> Int32Array | None:
        """The new state of each state of a cycle, if that of `state` can be `twin`."""
        twins = np.full(len(rows), -1, np.int32)
        twins[state] = twin
        waiting = [state]
        while waiting:
            state = waiting.pop()
            row, within = self.rows[twins[state]], inside[state]
            if self.final[twins[state]] != final[state] or (row[~within] != rows[state][~within]).any():
                return None
            for target, its in {(int(t), int(r)) for t, r in zip(targets[state][within], row[within], strict=True)}:
                if its < 0 or twins[target] not in (-1, its):
                    return None
                if twins[target] < 0:
                    twins[target] = its
                    waiting.append(target)
        return twins


def _paths(base: UInt64Array, rows: Int32Array, inside: npt.NDArray[np.bool_], targets: Int32Array) -> UInt64Array:
    """What is met, by its `base`, on the paths that begin in each state: by one class again and again, for each class,
    and by the only class there is. States that accept the same texts meet the same."""
    here = np.arange(len(rows), dtype=np.int32)
    only = np.where((rows != -1).sum(1) == 1, np.where(inside, targets, 0).sum(1, dtype=np.int32), here)
    places, _ = numbered(column_keys(np.where(inside, targets, -1)))
    columns = [int(np.flatnonzero(places == place)[0]) for place in range(int(places.max()) + 1)]
    met = np.zeros(len(rows), np.uint64)
    for step in [only, *(np.where(inside[:, c], targets[:, c], here) for c in columns)]:
        along = base
        for one, two in random_words(2 * len(rows).bit_length()).reshape(-1, 2):
            along = along * one + along[step] * two
            step = step[step]
        met = met * np.uint64(0x9E3779B97F4A7C15) + along
    return met


def components(delta: Int32Array) -> list[list[int]]:
    """The strongly connected components of all states, each behind those that it leads to.

    Tarjan, "Depth-first search and linear graph algorithms" (1972), without recursion.
    """
    number = len(delta)
    source, column = np.nonzero(delta >= 0)
    edges = np.unique(source * number + delta[source, column])
    bounds = np.searchsorted(edges // number, np.arange(number + 1)).tolist()
    targets = (edges % number).tolist()
    index, low = [-1] * number, [0] * number
    stack: list[int] = []
    found: list[list[int]] = []
    count = 0
    for root in range(number):
        if index[root] >= 0:
            continue
        path = [root]
        index[root] = low[root] = count
        count += 1
        stack.append(root)
        at = bounds[:]  # the next edge of each state
        while path:
            state = path[-1]
            if at[state] < bounds[state + 1]:
                target = targets[at[state]]
                at[state] += 1
                if index[target] < 0:
                    index[target] = low[target] = count
                    count += 1
                    stack.append(target)
                    path.append(target)
                elif index[target] < low[state]:
                    low[state] = index[target]
                continue
            path.pop()
            if path and low[state] < low[path[-1]]:
                low[path[-1]] = low[state]
            if low[state] == index[state]:
                place = len(stack) - 1
                while stack[place] != state:
                    place -= 1
                component = stack[place:]
                del stack[place:]
                for member in component:
                    index[member] = number  # no longer on the stack: never lowers anything
                found.append(component)
    return found


def _breadth_first(rows: Int32Array, final: npt.NDArray[np.bool_], start: int, dfa: CharDfa) -> CharDfa:
    """The automaton with its states numbered in the order in which they are met; 0 is the start."""
    order, place = [start], np.full(len(rows) + 1, -1, np.int32)
    place[start] = 0
    for state in order:
        row = rows[state]
        for target in dict.fromkeys(row[row >= 0].tolist()):
            if place[target] < 0:
                place[target] = len(order)
                order.append(target)
    return CharDfa(place[rows[order]], final[order], dfa.alphabet)
