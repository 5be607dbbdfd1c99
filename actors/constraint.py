"""A request's grammar as the scheduler follows it: compiled tables, and the state after the tokens so far.

Used by schedule.py, which advances it with every token that it appends, and by the grammar store, which shares one
Grammar between all requests that have it. Invariant: the state is a function of the generated tokens, as everything of
a request is; so no round trip is needed to know what the sampler knows.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from ..fsm.token_table import END

DEAD: Final = -1


@dataclass(slots=True, eq=False)
class Grammar:
    """Tables of one grammar (fsm/token_table.py): V token ids, S states, K token classes."""

    handle: int
    """What the sampler knows it by."""
    token_class: np.ndarray
    """uint16 [V]"""
    transitions: np.ndarray
    """int16 [S, K]; -1: the token can't come."""
    canonical: np.ndarray
    """int32 [S]: the only token of a state, or -1."""
    _ender: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self.token_class.nbytes + self.transitions.nbytes + self.canonical.nbytes

    def step(self, state: int, token: int) -> int:
        """The state after a token, DEAD if it can't come."""
        if state < 0 or not 0 <= token < len(self.token_class):
            return DEAD
        return int(self.transitions.item(state, self.token_class.item(token)))

    def final(self, state: int) -> bool:
        """Whether the output may end here."""
        return state >= 0 and bool(self.transitions.item(state, END) >= 0)

    def ends(self, token: int) -> bool:
        """Whether it is one of the tokens that end an output."""
        return bool(self.token_class.item(token) == END)

    def ending(self, state: int) -> int:
        """The token that ends the output if nothing else may come; -1 if something may, or if several tokens end it."""
        if not self.final(state) or np.count_nonzero(self.transitions[state] >= 0) > 1:
            return -1
        if self._ender is None:
            enders = np.flatnonzero(self.token_class == END)
            self._ender = int(enders[0]) if len(enders) == 1 else -1
        return self._ender

    def forced(self, state: int) -> int:
        """The only token that may come, -1 if there is a choice."""
        return int(self.canonical.item(state)) if state >= 0 else -1


@dataclass(slots=True, eq=False)
class Constraint:
    """A grammar and a place in it."""

    grammar: Grammar
    state: int = 0

    @property
    def complete(self) -> bool:
        """Whether the output so far matches."""
        return self.grammar.final(self.state)

    def foresee(self, count: int, stops: tuple[int, ...]) -> tuple[int, int] | None:
        """(state, last token) after the next `count` tokens (-1 for none), if all of them are forced and none stops."""
        state, last = self.state, -1
        for _ in range(count):
            last = self.grammar.forced(state)
            if last < 0 or last in stops:
                return None
            state = self.grammar.step(state, last)
        return state, last

    def run(self, state: int, most: int, stops: tuple[int, ...]) -> tuple[list[int], int]:
        """(the forced tokens after a state, at most so many and before one that stops; the state after them)"""
        tokens: list[int] = []
        while len(tokens) < most and (token := self.grammar.forced(state)) >= 0 and token not in stops:
            tokens.append(token)
            state = self.grammar.step(state, token)
        return tokens, state


@dataclass(slots=True, eq=False)
class Guided:
    """A place in a grammar that no table can have (fsm/guidance.py): the fsm actor's matcher says what may come next.

    Invariant: `mask` is that of the token after all that the request has, so it goes with each new one.
    """

    grammar: str
    """messages.Translated.grammar"""
    mask: np.ndarray | None = None
    """int32 [words], bit i of word w for token 32 w + i; None until it comes."""
