"""The automaton over tokens while it is being made: sparse edges between the states of the automaton over bytes.

Made by token_walk.py, read by canonical.py and token_table.py. Most tokens are dead in most states, so a list of the
live (state, class, next state) is far smaller than a table. Invariant: tokens have the same class exactly if they did
the same to every state when the graph was made; later versions only lose edges.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .alphabet import Int32Array, Int64Array, ranges
from .budget import Budget
from .vocabulary import BoolArray


@dataclass(frozen=True, slots=True)
class TokenGraph:
    """E edges between S states, in the order of their classes, then of their sources."""

    states: int
    classes: int
    """K"""
    token_class: Int32Array
    """int32 [V]: the class of each token id; K for tokens that no state allows."""
    column: Int32Array
    """int32 [E]: the class of the edge."""
    source: Int32Array
    target: Int32Array
    """int32 [E]"""
    order: Int64Array
    """int64 [E]: the edges in the order of their sources."""
    bounds: Int64Array
    """int64 [S + 1]: the edges of a state are order[bounds[s] : bounds[s + 1]]."""

    def row(self, state: int) -> Int32Array:
        """The state after a token of each class, -1 if it can't come; int32 [K + 1]."""
        row = np.full(self.classes + 1, -1, np.int32)
        edges = self.order[self.bounds[state] : self.bounds[state + 1]]
        row[self.column[edges]] = self.target[edges]
        return row

    def after(self, states: npt.NDArray[np.integer]) -> Int32Array:
        """All states that one token leads to, several times maybe."""
        return self.target[self.order[ranges(self.bounds[states], self.bounds[states + 1])]]

    def only(self, kept: BoolArray) -> "TokenGraph":
        """The graph with these edges of its own, bool [E]."""
        return make_graph(
            self.states, self.classes, self.token_class, self.column[kept], self.source[kept], self.target[kept]
        )

    def live(self, final: BoolArray, budget: Budget) -> BoolArray:
        """The states from which a final one can be reached, bool [S]."""
        edges = np.unique(self.target * np.int64(self.states) + self.source)
        before = edges % self.states
        bounds = np.searchsorted(edges // self.states, np.arange(self.states + 1))
        live = final.copy()
        waiting = np.flatnonzero(final)
        while len(waiting):
            budget.check()
            sources = before[ranges(bounds[waiting], bounds[waiting + 1])]
            waiting = np.unique(sources[~live[sources]])
            live[waiting] = True
        return live


def make_graph(
    states: int,
    classes: int,
    token_class: Int32Array,
    column: Int32Array,
    source: Int32Array,
    target: Int32Array,
) -> TokenGraph:
    """The graph with these edges, which are in the order of their classes, then of their sources."""
    order = np.argsort(source.astype(np.uint16), kind="stable")  # 16 bits: a radix sort
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(source, minlength=states))])
    return TokenGraph(states, classes, token_class, column, source, target, order, bounds)
